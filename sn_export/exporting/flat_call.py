"""Any call as one that exporters take: the model is given tensors alone, and returns tensors.

Numbers, None, keywords, nested containers, dataclasses and objects of any class are put back by
a pre-hook before the model's own hooks and forward see the call. Nothing of the model changes
but two hooks and the signature that the exporters read, and these are gone afterwards.
"""

from __future__ import annotations

import contextlib
import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from ..running import InputSet, Reference, paths_of_tensors, undoing


class FlatCall(NamedTuple):
    """A call with tensors alone.

    Attributes:
        tensors: in the order of the forward's signature.
        is_hidden: whether the signature that exporters read is ``(*args, **kwargs)``.
    """

    tensors: tuple[Tensor, ...]
    is_hidden: bool


@undoing
def flat_call(model: nn.Module, reference: Reference) -> Iterator[FlatCall]:
    """Let ``model`` be called with the tensors of the example alone, and return tensors alone.

    Args:
        model: it is given two hooks while the block lasts, unless it is compiled code.
        reference: the example; every call inside has the structure and the constants of its
            inputs, and returns what is a tensor in its result.

    Yields:
        The call.
    """
    example = reference.inputs.clone()
    tensors = tuple(tensor for _, tensor in example.named_tensors())
    if isinstance(model, torch.jit.ScriptModule):
        yield FlatCall(tensors, False)
        return
    is_hidden = not _is_flat(model, tensors, example)
    position = {id(tensor): index for index, tensor in enumerate(tensors)}

    def unflatten(module: nn.Module, args: Any, kwargs: Any) -> Any:
        full = example.map(lambda tensor: args[position[id(tensor)]])
        return full.args, dict(full.kwargs)

    def only_tensors(module: nn.Module, args: Any, result: Any) -> Any:
        # By their places: while a model is traced, sizes are tensors too.
        found = dict(paths_of_tensors(result))
        return tuple(found[path] for path in reference.paths)

    with contextlib.ExitStack() as stack:
        if is_hidden:
            stack.enter_context(_hidden_signature(model))
            stack.enter_context(_first_pre_hook(model, unflatten))
        if not reference.is_plain:
            stack.enter_context(_last_hook(model, only_tensors))
        yield FlatCall(tensors, is_hidden)


def _is_flat(model: nn.Module, tensors: Sequence[Tensor], example: InputSet) -> bool:
    # A parameter left at its default would be filled in by the TorchScript exporter.
    parameters = inspect.signature(model.forward).parameters.values()
    return (
        len(tensors) == len(example.args) == len(parameters)
        and not any(p.kind is p.VAR_POSITIONAL for p in parameters)
        and not example.kwargs
        and all(tensor is arg for tensor, arg in zip(tensors, example.args, strict=True))
    )


# The dictionaries are written to directly: a handle would count up torch's number of hooks.


@undoing
def _first_pre_hook(model: nn.Module, hook: Callable[..., Any]) -> Iterator[None]:
    key: Any = object()
    hooks = cast("OrderedDict[Any, Any]", model._forward_pre_hooks)
    try:
        hooks[key] = hook
        hooks.move_to_end(key, last=False)
        model._forward_pre_hooks_with_kwargs[key] = True
        yield
    finally:
        hooks.pop(key, None)
        model._forward_pre_hooks_with_kwargs.pop(key, None)


@undoing
def _last_hook(model: nn.Module, hook: Callable[..., Any]) -> Iterator[None]:
    key: Any = object()
    try:
        model._forward_hooks[key] = hook
        yield
    finally:
        model._forward_hooks.pop(key, None)


@undoing
def _hidden_signature(model: nn.Module) -> Iterator[None]:
    # Exporters bind what they are given to the signature, and fill in defaults.
    attributes, forward = model.__dict__, model.forward
    own = attributes.get("forward")

    def any_forward(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    attributes["forward"] = any_forward
    try:
        yield
    finally:
        if own is None:
            attributes.pop("forward", None)
        else:
            attributes["forward"] = own
