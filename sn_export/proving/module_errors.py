"""The outputs of every module, recorded by hooks while the model runs, and how a file compares."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..results import ModuleParity, OutputParity
from ..running import (
    InputSet,
    Preserved,
    as_real_pairs,
    is_dense,
    list_tensors,
    name_type,
    run_reference,
)
from ..text import name_dtype
from .module_scopes import ModuleValues
from .output_errors import RunningErrors
from .tolerances import DEFAULT_TOLERANCES, find_largest

_SAMPLED = 4096  # elements that are enough to tell most values apart
_CLOSE = 1e-3  # of the largest value: values whose samples are nearer are compared in full


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
    def of(
        cls,
        output: Tensor,
        rtol: float | None,
        atol: float | None,
        coarsest: str | None = None,
    ) -> Strictness:
        """Return what ``rtol`` and ``atol`` mean for an output of the size of ``output``."""
        scale = find_largest(output)
        scaled = None if atol is None or not scale else atol / scale
        if coarsest is None or coarsest == name_dtype(output):
            return cls(rtol, scaled)
        # Modules within may return a finer dtype than the one that limits their precision.
        defaults = DEFAULT_TOLERANCES[coarsest]
        return cls(defaults[0] if rtol is None else rtol, defaults[1] if scaled is None else scaled)

    def relax(self, scaled_atol: float, dtype: str) -> Strictness:
        """Return the tolerances with an absolute one of at least ``scaled_atol``."""
        default = DEFAULT_TOLERANCES[dtype][1] if self.scaled_atol is None else self.scaled_atol
        return replace(self, scaled_atol=max(default, scaled_atol))


@dataclass(frozen=True)
class ModuleCall:
    """One call of a module, and the tensors that it returned."""

    module: str
    type: str
    number: int
    outputs: list[Tensor]


def compare_calls(
    calls: Sequence[ModuleCall],
    named: Mapping[str, ModuleValues],
    values: Mapping[str, Tensor],
    strictness: Strictness,
) -> tuple[list[ModuleParity], list[str]]:
    """Return how each call compares, and the paths of the calls without a value of their own."""
    count = Counter(call.module for call in calls)
    order = {name: position for position, name in enumerate(values)}
    results: dict[int, ModuleParity] = {}
    is_astray = False
    alone = [call for call in calls if call.module not in named]
    for index, call in enumerate(calls):
        if call.module not in named:
            continue
        own = named[call.module]
        # Calls cannot be told apart in the file, and one may feed the next.
        names = own.inside if count[call.module] > 1 else own.leaving
        found = compare_nearest(call, names, values, strictness)
        if found is None:
            continue
        if not found.passed and not is_astray:
            if _is_of_others(call, calls, own.leaving, values, strictness):
                continue  # it was folded, since it depends on no input
            later = [name for name in values if order[name] > order[found.value]]
            elsewhere = compare_nearest(
                call, [n for n in later if n not in own.inside], values, strictness
            )
            if elsewhere is not None and elsewhere.passed:
                continue  # computed, but by nodes that count for another module
            heirs = (compare_nearest(other, [found.value], values, strictness) for other in alone)
            heir = next((heir for heir in heirs if heir is not None and heir.passed), None)
            if heir is not None:  # fused with a module that comes later, whose output this is
                results[next(i for i, c in enumerate(calls) if _is(c, heir))] = heir
                continue
            is_astray = True  # all later values differ anyway
        results[index] = found
    unmatched = [call.module for index, call in enumerate(calls) if index not in results]
    return [results[index] for index in sorted(results)], unmatched


def _is_of_others(
    call: ModuleCall,
    calls: Sequence[ModuleCall],
    leaving: Sequence[str],
    values: Mapping[str, Tensor],
    strictness: Strictness,
) -> bool:
    """Whether each value that leaves a module is of another call, so that ``call`` has none."""
    kinds = {(output.shape, output.dtype) for output in call.outputs}
    there = [n for n in leaving if n in values and (values[n].shape, values[n].dtype) in kinds]
    others = [one for one in calls if one.module == call.module and one is not call]
    return bool(there) and all(
        any(
            found is not None and found.passed
            for found in (compare_nearest(other, [name], values, strictness) for other in others)
        )
        for name in there
    )


def compare_whole(
    call: ModuleCall, names: Sequence[str], values: Sequence[Tensor | None], strictness: Strictness
) -> ModuleParity:
    """Compare the outputs of the model itself, each with its own."""
    compared = [
        (measure_errors(name, output, value, strictness), name)
        for name, output, value in zip(names, call.outputs, values, strict=False)
        if value is not None
    ]
    return _make_entry(call, *max(compared, key=_rate_entry))


def compare_nearest(
    call: ModuleCall, names: Iterable[str], values: Mapping[str, Tensor], strictness: Strictness
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
    compared = []
    for outputs, found in groups.values():
        # The file lacks outputs that nothing reads: then each value is paired, not each output.
        if len(found) < len(outputs):
            pairs = [(outputs[_find_nearest(values[name], outputs)], name) for name in found]
        else:
            there = [values[name] for name in found]
            pairs = [(output, found[_find_nearest(output, there)]) for output in outputs]
        for output, name in pairs:
            compared.append((measure_errors(name, output, values[name], strictness), name))
    worst = max(compared, key=_rate_entry, default=None)
    return _make_entry(call, *worst) if worst is not None else None


def _make_entry(call: ModuleCall, found: OutputParity, name: str) -> ModuleParity:
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


def _rate_entry(entry: tuple[OutputParity, str]) -> tuple[bool, float]:
    error = entry[0].max_abs
    return not entry[0].passed, math.inf if math.isnan(error) else error


def measure_errors(
    name: str, expected: Tensor, got: Tensor, strictness: Strictness
) -> OutputParity:
    """Return the errors of one tensor against its reference."""
    scaled = strictness.scaled_atol
    errors = RunningErrors(
        name, strictness.rtol, None if scaled is None else scaled * find_largest(expected)
    )
    errors.add("", expected, got)
    return errors.make_result()


def _find_nearest(wanted: Tensor, among: Sequence[Tensor]) -> int:
    """Return the position of the nearest tensor, found by samples as far as these tell."""
    step = max(wanted.numel() // _SAMPLED, 1)
    sample = wanted.flatten()[::step]
    rough = [_measure_distance(sample, tensor.flatten()[::step]) for tensor in among]
    close = max(4 * min(rough), _CLOSE * find_largest(sample))
    left = [position for position, distance in enumerate(rough) if distance <= close]
    if len(left) == 1:
        return left[0]
    return min(left, key=lambda position: _measure_distance(wanted, among[position]))


def _measure_distance(left: Tensor, right: Tensor) -> float:
    if not left.numel():
        return 0.0
    apart = torch.where(left == right, 0.0, (left.double() - right.double()).abs())
    return float(apart.nan_to_num(math.inf).max())


def _is(call: ModuleCall, found: ModuleParity) -> bool:
    return (call.module, call.number) == (found.module, found.call)


def trace(model: nn.Module, state: Preserved, inputs: InputSet) -> list[ModuleCall]:
    """Run the model and return the outputs of every module, in the order in which they finish.

    The model itself is last. The modules of a parametrization, which make weights and are not in
    the file, are left out.

    Raises:
        SnExportError: if the model rejects the inputs.
    """
    calls: list[ModuleCall] = []
    with _record_calls(model, calls):
        reference = run_reference(model, state, inputs)
    kind = name_called(model, inputs)
    return [*calls, ModuleCall("", kind, 0, [output.cpu() for output in reference.outputs])]


def name_called(model: nn.Module, inputs: InputSet) -> str:
    """Return the name of a model's class, with the method that is called: ``"Net.decode"``."""
    method = inputs.method
    return name_type(model) if method is None else f"{name_type(model)}.{method.__name__}"


def trace_inputs(
    model: nn.Module, state: Preserved, inputs: InputSet, path: str, number: int
) -> list[Tensor]:
    """Run the model and return the tensors that one call of the module at ``path`` is given.

    Raises:
        SnExportError: if the model rejects the inputs.
    """
    calls: list[list[Tensor]] = []

    def note(module: nn.Module, args: Any, kwargs: Any) -> None:
        calls.append(_copy_tensors((args, kwargs)) if len(calls) == number else [])

    # It runs after the hooks of the user's, which may exchange the arguments.
    handle = model.get_submodule(path).register_forward_pre_hook(note, with_kwargs=True)
    try:
        run_reference(model, state, inputs)
    finally:
        handle.remove()
    return calls[number] if number < len(calls) else []


@contextmanager
def _record_calls(model: nn.Module, calls: list[ModuleCall]) -> Iterator[None]:
    count: Counter[str] = Counter()
    handles = []

    def watch(path: str, kind: str) -> Any:
        def note(module: nn.Module, args: Any, result: Any) -> None:
            calls.append(ModuleCall(path, kind, count[path], _copy_tensors(result)))
            count[path] += 1

        return note

    try:
        for path, module in model.named_modules():
            inside = "parametrizations" in path.split(".")
            if path and not inside and not isinstance(module, torch.jit.ScriptModule):
                kind = name_type(module)
                handles.append(module.register_forward_hook(watch(path, kind)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _copy_tensors(value: Any) -> list[Tensor]:
    """Return copies of the tensors in ``value``, since what comes after may write to them.

    Complex numbers are pairs, as in a file. What is not dense has no value there.
    """
    leaves = [leaf.detach().cpu() for leaf in list_tensors(value) if is_dense(leaf)]
    return [as_real_pairs(leaf).clone() for leaf in leaves]


def find_first_random(
    calls: Sequence[ModuleCall], again: Sequence[ModuleCall], strictness: Strictness
) -> ModuleCall | None:
    """Return the first call that differs between two runs of the model."""
    for one, other in zip(calls, again, strict=False):
        if one.module != other.module or len(one.outputs) != len(other.outputs):
            return one
        for left, right in zip(one.outputs, other.outputs, strict=True):
            if not measure_errors("", left, right, strictness).passed and not _has_same_nan(
                left, right
            ):
                return one
    return None


def _has_same_nan(left: Tensor, right: Tensor) -> bool:
    if left.dtype != right.dtype:
        return False
    return torch.equal(torch.nan_to_num(left, 0.0), torch.nan_to_num(right, 0.0))
