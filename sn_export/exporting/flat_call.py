"""Any call as one that exporters take: a module is given tensors alone, and returns tensors.

Numbers, None, keywords, nested containers, dataclasses and objects of any class are put back before
the model, or the method of it that is exported, sees the call. What the exporters are given then is
a module of our own, which has the very parameters, buffers and children of the model under the same
names, and calls it; nothing of the model changes.
"""

from __future__ import annotations

import inspect
import keyword
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..running import InputSet, Reference, paths_of_tensors

# What a module shares with its model, so that weights keep their names; the rest, as hooks, is new.
_SHARED = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")


class FlatCall(NamedTuple):
    """A call with tensors alone.

    Attributes:
        module: what is called: the model, or a module around it.
        tensors: in the order of the signature.
    """

    module: nn.Module
    tensors: tuple[Tensor, ...]


def flat_call(model: nn.Module, reference: Reference) -> FlatCall:
    """Return the call of a module that takes the tensors of the example, and returns tensors.

    Args:
        model: it is called by that module, and exported itself where that is the same.
        reference: the example; every call has the structure and the constants of its inputs, and
            returns what is a tensor in its result.
    """
    example = reference.inputs.clone()
    tensors = dict(example.named_tensors())
    is_compiled = isinstance(model, torch.jit.ScriptModule)
    if is_compiled or (reference.is_plain and _is_flat(model, example)):
        return FlatCall(model, tuple(tensors.values()))
    return FlatCall(_Call(model, example, tensors, reference.paths), tuple(tensors.values()))


class _Call(nn.Module):
    """A model that is called in one way, with its own parameters, buffers and children."""

    def __init__(
        self,
        model: nn.Module,
        example: InputSet,
        tensors: Mapping[str, Tensor],
        paths: Sequence[tuple[str, ...]],
    ) -> None:
        super().__init__()
        own = self.__dict__
        own["training"] = model.training
        # torch names constants of the file by the attributes that hold them.
        own.update({key: value for key, value in model.__dict__.items() if key not in own})
        own.update({key: model.__dict__[key] for key in _SHARED})
        position = {id(tensor): index for index, tensor in enumerate(tensors.values())}

        def forward(*args: Tensor) -> tuple[Tensor, ...]:
            full = example.map(lambda tensor: args[position[id(tensor)]])
            # By their places: while a model is traced, sizes are tensors too.
            found = dict(paths_of_tensors(full.call(model)))
            return tuple(found[path] for path in paths)

        # torch 2.9 has no guards for dimensions of ``*args``; others call them by their position.
        forward.__signature__ = _signature(tensors)  # type: ignore[attr-defined]
        own["forward"] = forward


def _signature(names: Iterable[str]) -> inspect.Signature:
    """Return that of ``def forward(x, pair_0)`` for these names; of no keyword: ``input_1``."""
    fitting = (
        name if name.isidentifier() and not keyword.iskeyword(name) else f"input_{index}"
        for index, name in enumerate(names)
    )
    return inspect.Signature(
        [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in fitting]
    )


def _is_flat(model: nn.Module, example: InputSet) -> bool:
    tensors = [tensor for _, tensor in example.named_tensors()]
    if example.method is not None or example.draws is not None:
        return False
    # A parameter left at its default would be filled in by the TorchScript exporter.
    parameters = inspect.signature(model.forward).parameters.values()
    return (
        len(tensors) == len(example.args) == len(parameters)
        and not any(p.kind is p.VAR_POSITIONAL for p in parameters)
        and not example.kwargs
        and all(tensor is arg for tensor, arg in zip(tensors, example.args, strict=True))
    )
