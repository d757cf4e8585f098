"""Input sets: one call of the model each, cloned, drawn at random or resized."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

_SEED = 0


@dataclass(frozen=True)
class InputSet:
    """The arguments of one forward pass.

    Attributes:
        args: positional arguments; tensors may be nested in tuples, lists and dicts.
        kwargs: keyword arguments.
        label: what the set is, for messages: ``"the example input"``.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    label: str = "the input"

    def map(self, change: Callable[[Tensor], Tensor], label: str | None = None) -> InputSet:
        """Return a set with every tensor replaced by ``change(tensor)``."""
        args, kwargs = pytree.tree_map_only(Tensor, change, (self.args, dict(self.kwargs)))
        return InputSet(args, kwargs, label or self.label)

    def clone(self) -> InputSet:
        """Return a copy that a forward pass may write to; the caller's tensors stay."""
        return self.map(lambda tensor: tensor.detach().clone())

    def random_like(self, generator: torch.Generator, label: str) -> InputSet:
        """Return a set of the same shapes with random values: see `random_like`."""
        return self.map(lambda tensor: random_like(tensor, generator), label)

    def named_tensors(self, model: nn.Module) -> list[tuple[str, Tensor]]:
        """Return the tensors with their names in the forward signature, in its order."""
        named: list[tuple[str, Tensor]] = []
        for name, value in _bind(model, self).items():
            leaves = pytree.tree_flatten_with_path(value)[0]
            for path, leaf in leaves:
                if isinstance(leaf, Tensor):
                    named.append(("_".join([name, *map(_key, path)]), leaf))
        return named


def as_input_sets(inputs: Any, arity: int | None = None, label: str = "input") -> list[InputSet]:
    """Return what a user passes as ``inputs`` as a list of input sets.

    A tensor is one call; a dict one call by keywords; a tuple one call with these
    arguments; a list any number of calls. A tuple of tuples or dicts, or of more than
    ``arity`` tensors where the model takes fewer, also counts as several calls.

    Raises:
        TypeError: for anything else.
    """
    if inputs is None:
        return []
    if isinstance(inputs, tuple) and _is_several(inputs, arity):
        inputs = list(inputs)
    if isinstance(inputs, list):
        return [
            InputSet(one.args, one.kwargs, f"{label} {index}")
            for index, item in enumerate(inputs)
            for one in as_input_sets(item, None, label)
        ]
    if isinstance(inputs, InputSet):
        return [inputs]
    if isinstance(inputs, Tensor):
        return [InputSet((inputs,), {}, label)]
    if isinstance(inputs, Mapping):
        return [InputSet((), dict(inputs), label)]
    if isinstance(inputs, tuple):
        return [InputSet(inputs, {}, label)]
    raise TypeError(
        "inputs must be a tensor, a tuple of arguments, a dict of keyword arguments or a "
        f"list of these, got {type(inputs).__name__}"
    )


def random_sets(example: InputSet, count: int) -> list[InputSet]:
    """Return ``count`` random sets like ``example``, the same ones at every call."""
    generator = torch.Generator().manual_seed(_SEED)
    return [example.random_like(generator, f"random input {i}") for i in range(count)]


def random_like(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Return random values within the range of ``tensor``, of its shape, dtype and device.

    Floating values are uniform over the range seen (standard normal where the tensor is
    constant or not finite); integers too, ends included; booleans are fair coins. The
    global RNG is not used.
    """
    shape, dtype = tensor.shape, tensor.dtype
    if tensor.numel() == 0:
        return tensor.detach().clone()
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=generator).to(tensor)
    if dtype.is_complex:
        return torch.randn(shape, generator=generator, dtype=torch.complex64).to(tensor)
    if not dtype.is_floating_point:
        smallest, largest = (int(bound) for bound in torch.aminmax(tensor.detach().cpu()))
        end = None if largest == 2**63 - 1 else largest + 1
        drawn = torch.empty(shape, dtype=torch.int64)
        return drawn.random_(smallest, end, generator=generator).to(tensor)
    low, high = (bound.item() for bound in torch.aminmax(tensor.detach().to("cpu").double()))
    if not (low < high and abs(low) < float("inf") and abs(high) < float("inf")):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(tensor)
    uniform = torch.rand(shape, generator=generator, dtype=torch.float64)
    return (low * (1 - uniform) + high * uniform).clamp(low, high).to(tensor)


def tensor_leaves(value: Any) -> list[Tensor]:
    """Return the tensors in a nested output, in pytree order."""
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def _is_several(inputs: Sequence[Any], arity: int | None) -> bool:
    if inputs and all(isinstance(item, (tuple, Mapping, InputSet)) for item in inputs):
        return True
    return arity is not None and len(inputs) > arity


def _bind(model: nn.Module, inputs: InputSet) -> dict[str, Any]:
    # A forward without a usable signature (compiled code) gets positional names.
    try:
        bound = inspect.signature(model.forward).bind(*inputs.args, **inputs.kwargs)
    except (TypeError, ValueError):
        return {f"input_{i}": arg for i, arg in enumerate(inputs.args)} | dict(inputs.kwargs)
    arguments: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = bound.signature.parameters[name].kind
        arguments.update(value) if kind is inspect.Parameter.VAR_KEYWORD else arguments.update(
            {name: value}
        )
    return arguments


def _key(entry: Any) -> str:
    for attribute in ("key", "idx", "name"):
        if hasattr(entry, attribute):
            return str(getattr(entry, attribute))
    return str(entry)
