"""The reference: what the model itself says, in eval mode, leaving no trace."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..errors import SnExportError
from ..text import without_frames
from .input_set import InputSet
from .nested import is_plain, paths_of_tensors, unseen_tensors
from .preservation import Preserved, set_by_hooks
from .tensor_layouts import are_large, as_real_pairs
from .undo import undoing


@dataclass(frozen=True)
class Reference:
    """An input set and the model's outputs for it.

    Attributes:
        inputs: what the model was given.
        outputs: the tensors that it returned, complex ones as pairs of reals.
        paths: where each stood in the result.
        is_plain: whether the result had nothing but tensors in containers that torch knows.
        unseen: what else held tensors in the result, which are not among the outputs.
    """

    inputs: InputSet
    outputs: tuple[Tensor, ...]
    paths: tuple[tuple[str, ...], ...] = ()
    is_plain: bool = True
    unseen: tuple[str, ...] = ()


def run_reference(model: nn.Module, state: Preserved, inputs: InputSet) -> Reference:
    """Run ``model`` without grad on a copy of ``inputs``, from the state it started in.

    Raises:
        SnExportError: if the model rejects the inputs or returns no tensor.
    """
    try:
        result = _run(model, state, inputs)
    except (Exception, SystemExit) as error:  # a network that exits has not run
        raise SnExportError(
            f"the model fails on {inputs.label}: {type(error).__name__}: "
            f"{without_frames(str(error))}{_place_of(error, model)}"
        ) from error
    found = paths_of_tensors(result)
    outputs = tuple(as_real_pairs(leaf.detach()).clone() for _, leaf in found)
    state.reset()
    if not outputs:
        raise SnExportError(
            f"the model returns no tensor for {inputs.label}: got {type(result).__name__}"
        )
    paths = tuple(path for path, _ in found)
    unseen = tuple(
        f"{kind} at {'_'.join(('output', *path))!r}" for path, kind in unseen_tensors(result)
    )
    return Reference(inputs.clone(), outputs, paths, is_plain(result), unseen)


def _place_of(error: BaseException, model: nn.Module) -> str:
    """Return where below ``model`` an error was raised: ``; in 'body.0' (Conv2d)``."""
    paths = {id(module): path for path, module in reversed(list(model.named_modules()))}
    place = ""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        module = frame.f_locals.get("self")
        if isinstance(module, nn.Module) and paths.get(id(module)):
            kind = parametrize.type_before_parametrizations(module).__name__
            place = f"; in '{paths[id(module)]}' ({kind})"
    return place


def _run(model: nn.Module, state: Preserved, inputs: InputSet) -> Any:
    if are_large(model.parameters()):
        try:
            with _weights_dropped(model):
                return _call(model, inputs)
        except Exception:  # it may need one of them later
            state.reset()
    return _call(model, inputs)


def _call(model: nn.Module, inputs: InputSet) -> Any:
    given = inputs.clone()
    with torch.no_grad():
        return model(*given.args, **given.kwargs)


@undoing
def _weights_dropped(model: nn.Module) -> Iterator[None]:
    """Free each weight that a hook of torch's has set once its module has run.

    It is deleted, not replaced: a forward that reads it later fails, and gets no other value.
    """
    with ExitStack() as stack:
        for module, name in list(set_by_hooks(model.modules())):
            stack.callback(module.register_forward_hook(partial(_drop, name)).remove)
        yield


def _drop(name: str, module: nn.Module, *_: object) -> None:
    module.__dict__.pop(name, None)
