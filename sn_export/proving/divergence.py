"""Where a file diverges from its model: the first module whose output differs.

Every module's output is recorded by a hook on one side, and made an output of a copy of the file
on the other, for one input set. It holds every activation of that input set, on both sides.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

import onnx
import torch
from google.protobuf.message import EncodeError
from torch import Tensor, nn

from ..errors import ExportError, SnExportError
from ..files import read_onnx
from ..results import Divergence, ModuleParity
from ..running import Dropouts, InputSet, Preserved, name_type
from ..text import quote_names
from .module_errors import (
    ModuleCall,
    Strictness,
    compare_calls,
    compare_nearest,
    compare_whole,
    find_first_random,
    trace,
    trace_inputs,
)
from .module_scopes import find_module_values
from .session import name_inputs, open_session, run_session
from .tolerances import ProofSettings

_SHOWN = 4  # how many modules a finding names
_NOISE = (
    "No export can reproduce that. Where the noise has a scale among the inputs, a proof is made "
    "with 0 as its value in the example and samples=0; draws='zeros' makes and proves a file "
    "without the noise; else take the noise itself as an input of the model"
)
_OTHER_NOISE = (
    "It draws what draws='zeros' does not replace: whole numbers, or by something else than "
    "torch's functions"
)
_IDLE = (nn.Identity, Dropouts)  # they return their input in eval mode


def locate(
    model: nn.Module,
    state: Preserved,
    path: Path,
    inputs: InputSet,
    strictness: Strictness,
    settings: ProofSettings,
    failed: bool,
) -> Divergence:
    """Compare every module's output on ``inputs``, and say where the file diverges.

    Args:
        model: the model, held by ``state``.
        state: what puts the model back after a forward pass.
        path: the file.
        inputs: the input set.
        strictness: the tolerances for all modules.
        settings: how the file is run.
        failed: whether the outputs are known to differ.
    """
    try:
        calls, again = trace(model, state, inputs), trace(model, state, inputs)
    except SnExportError as error:  # it ran once already: it depends on what ran before
        return Divergence((), None, f"cannot tell where: run again, {error}", sample=inputs.label)
    file = read_onnx(path)
    named = find_module_values(model, file, {call.module for call in calls})
    try:
        session = open_session(path, settings.providers, _expose_all_values(file))
        feed = name_inputs(session, inputs, settings.input_names)
        names = [*_list_made_values(file), *(output.name for output in file.graph.output)]
        tensors = run_session(session, feed, inputs.label, names)
    except (ExportError, ValueError, EncodeError, MemoryError) as error:
        return Divergence((), None, f"cannot tell where: {error}", sample=inputs.label)
    end = len(names) - len(file.graph.output)
    values = {n: t for n, t in zip(names[:end], tensors, strict=False) if t is not None}
    modules, unmatched = compare_calls(calls[:-1], named, values, strictness)
    modules.append(compare_whole(calls[-1], names[end:], tensors[end:], strictness))
    found = Divergence(
        tuple(modules), None, "", tuple(dict.fromkeys(unmatched)), sample=inputs.label
    )
    random = find_first_random(calls, again, strictness)
    if random is not None:
        return _blame_random(found, random, model, state, inputs, calls, strictness)
    undefined = next((call for call in calls if _has_nan(call)), None)
    if undefined is not None and _has_nan(calls[-1]):
        title = _format_title(undefined.module, undefined.type)
        reason = (
            f"the model itself gives NaN on {inputs.label}, first in {title}: no file can be held "
            "against that"
        )
        return replace(found, first=undefined.module, reason=reason)
    found = _judge(found, failed)
    bad = next((entry for entry in found.modules if not entry.passed), None)
    if bad is None or not bad.module or bad.module != found.first:
        return found
    given = trace_inputs(model, state, inputs, bad.module, bad.call)
    call = ModuleCall(bad.module, bad.type, bad.call, given)
    entering = compare_nearest(call, named[bad.module].entering, {**feed, **values}, strictness)
    addition = _describe_before(bad, entering, model, calls, found.modules, feed.values())
    return replace(found, reason=found.reason + addition)


def _has_nan(call: ModuleCall) -> bool:
    return any(bool(output.isnan().any()) for output in call.outputs)


def _describe_before(
    bad: ModuleParity,
    entering: ModuleParity | None,
    model: nn.Module,
    calls: Sequence[ModuleCall],
    compared: Sequence[ModuleParity],
    given: Collection[Tensor],
) -> str:
    """Return an addition to the reason, if the cause may lie before the first module to differ.

    Args:
        bad: that module.
        entering: how its inputs compare; None where the file has no value for them.
        model: the model.
        calls: every call of a module.
        compared: the calls that have a value in the file.
        given: the inputs of the model.
    """
    idle = {path for path, module in model.named_modules() if isinstance(module, _IDLE)}
    before = _list_hidden_before(bad, calls, compared, given)
    hidden = [path for path in before if path not in idle]
    if hidden:
        untold = quote_names(hidden, _SHOWN)
        return f"; nothing can be told of {untold} before it, for want of a value in the file"
    if entering is None or entering.passed:
        return ""
    _, title = _find_caller(bad.module, model, calls)
    return (
        "; what it is given differs already, so the cause lies before it, in the forward of "
        f"{title}"
    )


def _blame_random(
    found: Divergence,
    first: ModuleCall,
    model: nn.Module,
    state: Preserved,
    inputs: InputSet,
    calls: Sequence[ModuleCall],
    strictness: Strictness,
) -> Divergence:
    """Say which module draws at random: the first to differ, or the one that calls it."""
    path, title = first.module, _format_title(first.module, first.type)
    if path:
        one, other = (
            replace(first, outputs=trace_inputs(model, state, inputs, path, first.number))
            for _ in range(2)
        )
        if find_first_random([one], [other], strictness) is not None:
            path, title = _find_caller(path, model, calls)
            title = f"the forward of {title}"
    reason = (
        "the model is not deterministic: it gives different outputs for the same input, first in "
        f"{title}. {_NOISE if inputs.draws is None else _OTHER_NOISE}"
    )
    return replace(found, first=path, reason=reason, is_deterministic=False)


def _find_caller(path: str, model: nn.Module, calls: Sequence[ModuleCall]) -> tuple[str, str]:
    """Return the module that calls the one at ``path``, and its title."""
    called = {"", *(call.module for call in calls)}
    around = path.rpartition(".")[0]
    while around not in called:  # past a ModuleList
        around = around.rpartition(".")[0]
    kind = name_type(model.get_submodule(around)) if around else calls[-1].type
    return around, _format_title(around, kind)


def _list_hidden_before(
    bad: ModuleParity,
    calls: Sequence[ModuleCall],
    compared: Sequence[ModuleParity],
    given: Collection[Tensor],
) -> list[str]:
    """Return the modules without a value to compare that ran after the last that agrees."""
    known = {(entry.module, entry.call) for entry in compared}
    end = next(i for i, c in enumerate(calls) if (c.module, c.number) == (bad.module, bad.call))
    hidden: list[str] = []
    for index in range(end - 1, -1, -1):
        call = calls[index]
        if (call.module, call.number) in known:
            break
        # A module that returns its input, such as dropout, hides nothing.
        before = [*given, *(output for earlier in calls[:index] for output in earlier.outputs)]
        if not all(any(_is_same(output, one) for one in before) for output in call.outputs):
            hidden.insert(0, call.module)
    return hidden


def _is_same(left: Tensor, right: Tensor) -> bool:
    return left.dtype == right.dtype and torch.equal(left, right.cpu())


def _judge(found: Divergence, failed: bool) -> Divergence:
    bad = next((entry for entry in found.modules if not entry.passed), None)
    root = found.modules[-1]
    if failed and root.passed:
        return replace(
            found,
            reason="without onnxruntime's graph optimisations the outputs agree on "
            f"{found.sample}: one of these makes the difference",
        )
    if bad is None:
        return replace(
            found,
            reason=f"every module with a value in the file agrees on {found.sample}, run without "
            "onnxruntime's graph optimisations",
        )
    if len(found.modules) == 1 and bad is root and found.unmatched:
        reason = "cannot tell where: no value of the file could be matched with a module"
        return replace(found, reason=reason)
    if bad is root:
        reason = (
            f"the difference arises in the forward of {_format_title('', bad.type)}: every module "
            "in it that has a value in the file agrees"
        )
        if found.unmatched:
            reason += f", which cannot be told of {quote_names(found.unmatched, _SHOWN)}"
        return replace(found, first="", reason=reason)
    return replace(
        found,
        first=bad.module,
        reason=f"the first module to differ is {_format_title(bad.module, bad.type)}"
        + (f" in call {bad.call + 1}" if bad.call else "")
        + f", max_abs {bad.max_abs:.3g} on {found.sample}",
    )


def _list_made_values(file: onnx.ModelProto) -> list[str]:
    """Return the names of the values that the nodes of a file make, in its order."""
    return [name for node in file.graph.node for name in node.output if name]


def _expose_all_values(file: onnx.ModelProto) -> bytes:
    """Make every value an output of ``file``, and return its bytes."""
    known = {output.name for output in file.graph.output}
    for name in _list_made_values(file):
        if name not in known:
            file.graph.output.add(name=name)
    content: bytes = file.SerializeToString()
    return content


def _format_title(path: str, kind: str) -> str:
    return f"'{path}' ({kind})" if path else f"the model itself ({kind})"
