"""What every module returns while the model runs, recorded by hooks that are gone afterwards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..running import InputSet, Preserved, as_real_pairs, is_dense, run_reference, tensor_leaves
from .module_errors import ModuleCall, Strictness, errors_of


def trace(model: nn.Module, state: Preserved, inputs: InputSet) -> list[ModuleCall]:
    """Run the model and return the outputs of every module, in the order in which they finish.

    The model itself is last. The modules of a parametrization, which make weights and are not in
    the file, are left out.

    Raises:
        SnExportError: if the model rejects the inputs.
    """
    calls: list[ModuleCall] = []
    with _recording(model, calls):
        reference = run_reference(model, state, inputs)
    kind = type_name(model)
    return [*calls, ModuleCall("", kind, 0, [output.cpu() for output in reference.outputs])]


def type_name(module: nn.Module) -> str:
    """Return the name of a module's class, as it was before something was parametrized."""
    return parametrize.type_before_parametrizations(module).__name__


def trace_inputs(
    model: nn.Module, state: Preserved, inputs: InputSet, path: str, number: int
) -> list[Tensor]:
    """Run the model and return the tensors that one call of the module at ``path`` is given.

    Raises:
        SnExportError: if the model rejects the inputs.
    """
    calls: list[list[Tensor]] = []

    def note(module: nn.Module, args: Any, kwargs: Any) -> None:
        calls.append(_copies((args, kwargs)) if len(calls) == number else [])

    # After the hooks that are there, which may exchange the arguments.
    handle = model.get_submodule(path).register_forward_pre_hook(note, with_kwargs=True)
    try:
        run_reference(model, state, inputs)
    finally:
        handle.remove()
    return calls[number] if number < len(calls) else []


@contextmanager
def _recording(model: nn.Module, calls: list[ModuleCall]) -> Iterator[None]:
    count: Counter[str] = Counter()
    handles = []

    def watch(path: str, kind: str) -> Any:
        def note(module: nn.Module, args: Any, result: Any) -> None:
            calls.append(ModuleCall(path, kind, count[path], _copies(result)))
            count[path] += 1

        return note

    try:
        for path, module in model.named_modules():
            inside = "parametrizations" in path.split(".")
            if path and not inside and not isinstance(module, torch.jit.ScriptModule):
                kind = type_name(module)
                handles.append(module.register_forward_hook(watch(path, kind)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _copies(value: Any) -> list[Tensor]:
    """Return copies of the tensors in ``value``, since what comes after may write to them.

    Complex numbers are pairs, as in a file. What is not dense has no value there.
    """
    leaves = [leaf.detach().cpu() for leaf in tensor_leaves(value) if is_dense(leaf)]
    return [as_real_pairs(leaf).clone() for leaf in leaves]


def first_random(
    calls: Sequence[ModuleCall], again: Sequence[ModuleCall], strictness: Strictness
) -> ModuleCall | None:
    """Return the first call that differs between two runs of the model."""
    for one, other in zip(calls, again, strict=False):
        if one.module != other.module or len(one.outputs) != len(other.outputs):
            return one
        for left, right in zip(one.outputs, other.outputs, strict=True):
            if not errors_of("", left, right, strictness).passed and not _same_nan(left, right):
                return one
    return None


def _same_nan(left: Tensor, right: Tensor) -> bool:
    if left.dtype != right.dtype:
        return False
    return torch.equal(torch.nan_to_num(left, 0.0), torch.nan_to_num(right, 0.0))
