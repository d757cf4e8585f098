"""Where a file and its model part: the first module whose output differs.

Every module's output is recorded by a hook on one side, and made an output of a copy of the file
on the other, for one input set. It holds every activation of that input set twice.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .boundaries import ModuleValues, module_values
from .errors import ExportError, SnExportError
from .onnx_session import named_inputs, open_session, run_session
from .output_parity import OutputParity, RunningErrors
from .preserving import Preserved
from .reference import run_reference
from .samples import InputSet, tensor_leaves


@dataclass(frozen=True)
class ModuleParity:
    """How the output of one call of a module compares, on one input set.

    Attributes:
        module: path of the module in the model, ``""`` for the model itself.
        type: its class, such as ``"Conv2d"``.
        max_abs: largest absolute difference, in units of the output; NaN for NaN.
        max_rel: largest difference relative to the reference value, over non-zero ones.
        passed: whether every element is within tolerance.
        call: how many calls of the module came before.
        shape: shape of its (first) output in the model.
        dtype: its dtype, such as ``"float32"``.
        value: name of the compared value in the file.
    """

    module: str
    type: str
    max_abs: float
    max_rel: float
    passed: bool
    call: int = 0
    shape: tuple[int, ...] = ()
    dtype: str = ""
    value: str = ""


@dataclass(frozen=True)
class Divergence:
    """Where the file and the model part.

    Attributes:
        modules: the modules in the order in which they finish, a container after what it
            contains, the model itself last.
        first: path of the first module that is outside tolerance, ``""`` if only the model itself
            is; of the first that draws random numbers where the model is not deterministic; None
            where there is none or it cannot be told.
        reason: the finding in words.
        unmatched: paths of the modules that ran and have no value of their own in the file: they
            do nothing in eval mode, or were fused into others.
        is_deterministic: whether the model gave the same outputs for the same input twice.
        sample: label of the input set.
    """

    modules: tuple[ModuleParity, ...]
    first: str | None
    reason: str
    unmatched: tuple[str, ...] = ()
    is_deterministic: bool = True
    sample: str = ""


@dataclass(frozen=True)
class Strictness:
    """Tolerances that fit outputs of any size.

    Attributes:
        rtol: relative tolerance; None for the dtype's default.
        scaled_atol: absolute tolerance in units of the largest reference value; None likewise.
    """

    rtol: float | None = None
    scaled_atol: float | None = None

    @classmethod
    def of(cls, output: Tensor, rtol: float | None, atol: float | None) -> Strictness:
        """Return what ``rtol`` and ``atol`` mean for an output of the size of ``output``."""
        scale = _largest(output)
        return cls(rtol, None if atol is None or not scale else atol / scale)


@dataclass
class _Call:
    module: str
    type: str
    number: int
    outputs: list[Tensor]


def locate(
    model: nn.Module,
    state: Preserved,
    path: Path,
    inputs: InputSet,
    strictness: Strictness,
    providers: Sequence[str],
    by_position: bool = False,
    failed: bool = True,
) -> Divergence:
    """Compare every module's output on ``inputs``, and say where the file and the model part.

    Args:
        model: the model, held by ``state``.
        state: what puts the model back after a forward pass.
        path: the file.
        inputs: the input set.
        strictness: the tolerances for all modules.
        providers: onnxruntime execution providers.
        by_position: whether a user chose the names of the file's inputs.
        failed: whether the outputs are known to differ.
    """
    try:
        calls, again = _trace(model, state, inputs), _trace(model, state, inputs)
    except SnExportError as error:  # it did run, to be compared: it depends on what came before
        return Divergence((), None, f"cannot tell where: run again, {error}", sample=inputs.label)
    file = onnx.load(path, load_external_data=False)
    named = module_values(model, file)
    outputs = tuple(output.name for output in file.graph.output)
    named[""] = ModuleValues(outputs, outputs)
    try:
        session = open_session(path, providers, _with_all_values(file))
        feed = named_inputs(model, session, inputs, by_position)
        names = [output.name for output in session.get_outputs()]
        tensors = run_session(session, feed, inputs.label, names)
    except (ExportError, ValueError) as error:
        return Divergence((), None, f"cannot tell where: {error}", sample=inputs.label)
    values = {n: t for n, t in zip(names, tensors, strict=True) if t is not None}
    modules, unmatched = _compare_calls(calls, named, values, strictness)
    found = Divergence(
        tuple(modules), None, "", tuple(dict.fromkeys(unmatched)), sample=inputs.label
    )
    random = _first_random(calls, again, strictness)
    if random is not None:
        reason = (
            "the model is not deterministic: it gives different outputs for the same input, first "
            f"in {_title(random.module, random.type)}. No export can reproduce that"
        )
        return replace(found, first=random.module, reason=reason, is_deterministic=False)
    return _judged(found, failed)


def _judged(found: Divergence, failed: bool) -> Divergence:
    bad = next((entry for entry in found.modules if not entry.passed), None)
    root = found.modules[-1] if found.modules and not found.modules[-1].module else None
    if bad is None:
        return replace(
            found,
            reason=f"every module agrees on {found.sample}, run without onnxruntime's graph "
            "optimisations",
        )
    if len(found.modules) == 1 and bad is root and found.unmatched:
        return replace(found, reason="cannot tell where: no value of the file names its module")
    if failed and root is not None and root.passed:
        return replace(
            found,
            reason="without onnxruntime's graph optimisations the outputs agree on "
            f"{found.sample}: one of these makes the difference",
        )
    if bad is root:
        reason = (
            f"the difference arises in the forward of {_title('', bad.type)}: every module in "
            "it that has a value in the file agrees"
        )
        return replace(found, first="", reason=reason)
    return replace(
        found,
        first=bad.module,
        reason=f"the first module to differ is {_title(bad.module, bad.type)}"
        + (f" in call {bad.call + 1}" if bad.call else "")
        + f", max_abs {bad.max_abs:.3g} on {found.sample}",
    )


def _compare_calls(
    calls: Sequence[_Call],
    named: dict[str, ModuleValues],
    values: dict[str, Tensor],
    strictness: Strictness,
) -> tuple[list[ModuleParity], list[str]]:
    """Return how each call compares, and the paths of the calls without a value of their own."""
    count = Counter(call.module for call in calls)
    order = {name: position for position, name in enumerate(values)}
    results: dict[int, ModuleParity] = {}
    alone = [call for call in calls if call.module not in named]
    for index, call in enumerate(calls):
        if call.module not in named:
            continue
        own = named[call.module]
        # Calls cannot be told apart in the file, and one may feed the next.
        names = own.inside if count[call.module] > 1 else own.leaving
        found = _best(call, names, values, strictness)
        if found is None:
            continue
        if not found.passed and call.module:
            later = [name for name in values if order[name] > order[found.value]]
            elsewhere = _best(call, [n for n in later if n not in own.inside], values, strictness)
            if elsewhere is not None and elsewhere.passed:
                continue  # computed, but by nodes that count for another module
            heirs = (_best(other, [found.value], values, strictness) for other in alone)
            heir = next((heir for heir in heirs if heir is not None and heir.passed), None)
            if heir is not None:  # fused with a module that comes later, whose output this is
                results[next(i for i, c in enumerate(calls) if _is(c, heir))] = heir
                continue
        results[index] = found
    unmatched = [call.module for index, call in enumerate(calls) if index not in results]
    return [results[index] for index in sorted(results)], unmatched


def _best(
    call: _Call, names: Iterable[str], values: dict[str, Tensor], strictness: Strictness
) -> ModuleParity | None:
    """Compare each output of a call with the value among ``names`` that is nearest to it.

    Returns:
        The worst of its outputs; None where no value has the shape and dtype of any of them.
    """
    groups: dict[tuple[Any, ...], tuple[list[Tensor], list[str]]] = {}
    for output in call.outputs:
        groups.setdefault((output.shape, output.dtype), ([], []))[0].append(output)
    for name in names:
        if name in values and (values[name].shape, values[name].dtype) in groups:
            groups[values[name].shape, values[name].dtype][1].append(name)
    worst: tuple[OutputParity, str] | None = None
    for outputs, found_names in groups.values():
        errors = [
            [(_errors(name, output, values[name], strictness), name) for output in outputs]
            for name in found_names
        ]
        # Outputs that nothing reads are not in the file: then each value has its output.
        pairs = errors if len(found_names) < len(outputs) else list(zip(*errors, strict=True))
        nearest = [min(entries, key=_badness) for entries in pairs]
        worst = max([*nearest, *([worst] if worst else [])], key=_badness, default=None)
    if worst is None:
        return None
    found, name = worst
    return ModuleParity(
        call.module,
        call.type,
        found.max_abs,
        found.max_rel,
        found.passed,
        call.number,
        found.shape,
        found.dtype,
        name,
    )


def _badness(entry: tuple[OutputParity, str]) -> tuple[bool, float]:
    error = entry[0].max_abs
    return not entry[0].passed, math.inf if math.isnan(error) else error


def _errors(name: str, expected: Tensor, got: Tensor, strictness: Strictness) -> OutputParity:
    scaled = strictness.scaled_atol
    errors = RunningErrors(
        name, strictness.rtol, None if scaled is None else scaled * _largest(expected)
    )
    errors.add("", expected, got)
    return errors.result()


def _first_random(
    calls: Sequence[_Call], again: Sequence[_Call], strictness: Strictness
) -> _Call | None:
    """Return the first call that differs between two runs of the model."""
    for one, other in zip(calls, again, strict=False):
        if one.module != other.module or len(one.outputs) != len(other.outputs):
            return one
        for left, right in zip(one.outputs, other.outputs, strict=True):
            if not _errors("", left, right, strictness).passed and not _same_nan(left, right):
                return one
    return None


def _same_nan(left: Tensor, right: Tensor) -> bool:
    return torch.equal(torch.nan_to_num(left, 0.0), torch.nan_to_num(right, 0.0))


def _trace(model: nn.Module, state: Preserved, inputs: InputSet) -> list[_Call]:
    """Run the model and return the outputs of every module, in the order in which they finish."""
    calls: list[_Call] = []
    with _recording(model, calls):
        run_reference(model, state, inputs)
    return calls


@contextmanager
def _recording(model: nn.Module, calls: list[_Call]) -> Iterator[None]:
    count: Counter[str] = Counter()
    handles = []

    def watch(path: str, kind: str) -> Any:
        def note(module: nn.Module, args: Any, result: Any) -> None:
            # Copies, since what comes after may write to it.
            outputs = [leaf.detach().cpu().clone() for leaf in tensor_leaves(result)]
            calls.append(_Call(path, kind, count[path], outputs))
            count[path] += 1

        return note

    try:
        for path, module in model.named_modules():
            # The modules of a parametrization make weights and are not in the file.
            inside = "parametrizations" in path.split(".")
            if not inside and not isinstance(module, torch.jit.ScriptModule):
                kind = parametrize.type_before_parametrizations(module).__name__
                handles.append(module.register_forward_hook(watch(path, kind)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _with_all_values(file: onnx.ModelProto) -> bytes:
    """Return the file with every value as an output."""
    changed = onnx.ModelProto()
    changed.CopyFrom(file)
    known = {output.name for output in changed.graph.output}
    for node in changed.graph.node:
        for name in node.output:
            if name and name not in known:
                known.add(name)
                changed.graph.output.add(name=name)
    content: bytes = changed.SerializeToString()
    return content


def _is(call: _Call, found: ModuleParity) -> bool:
    return (call.module, call.number) == (found.module, found.call)


def _title(path: str, kind: str) -> str:
    return f"'{path}' ({kind})" if path else f"the model itself ({kind})"


def _largest(tensor: Tensor) -> float:
    wide = tensor.detach().cpu().to(torch.float64)
    finite = wide[torch.isfinite(wide)]
    return float(finite.abs().max()) if finite.numel() else 0.0
