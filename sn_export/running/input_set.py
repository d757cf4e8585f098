"""Input sets: one call of the model each, with the names of its arguments."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MethodType
from typing import Any

from torch import Tensor, nn

from .draws import drawing
from .nested import find_tensors, find_unseen_tensors, make_distinct, map_tensors
from .tensor_memory import is_dense
from .torch_private import pytree

Place = int | slice | str  # index of a positional argument, those of ``*args``, a keyword


@dataclass(frozen=True)
class Binding:
    """Where each argument of a forward's signature stands in a call.

    For ``forward(self, x, *rest, **more)``, called with ``(a, b, c, scale=d)``::

        Binding({"x": 0, "rest": slice(1, 3), "scale": "scale"}, "more", {"scale": "scale"})

    Attributes:
        places: the place in the call by name of the argument, in the order of the signature.
        collector: name of the signature's ``**kwargs``, if it has such.
        collected: name of the argument by each keyword that ``**kwargs`` takes in; it differs from
            the keyword where a parameter has that name.
    """

    places: Mapping[str, Place]
    collector: str | None = None
    collected: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class InputSet:
    """The arguments of one forward pass.

    Attributes:
        args: positional arguments; tensors may be nested in tuples, lists and dicts.
        kwargs: keyword arguments.
        label: what the set is, for messages: ``"the example input"``.
        binding: the names of the arguments, once `bind` has asked a forward for them.
        method: the method of the model that is called in place of the model itself.
        draws: ``"zeros"`` for a call without random numbers: see `draws`.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    label: str = "the input"
    binding: Binding | None = None
    method: MethodType | None = None
    draws: str | None = None

    def bind(self, model: nn.Module, method: MethodType | None = None) -> InputSet:
        """Return the set with the names of its arguments, and its keywords in their order.

        Args:
            model: the names are those of the arguments of its forward,
            method: or of this method, if it is called in place of the model.
        """
        method = method or self.method
        binding = _bind(method or model.forward, self)
        keywords = [place for place in binding.places.values() if isinstance(place, str)]
        kwargs = {keyword: self.kwargs[keyword] for keyword in keywords}
        return replace(self, kwargs=kwargs, binding=binding, method=method)

    def call(self, model: nn.Module) -> Any:
        """Return what ``model``, or its method, returns for the arguments; it may write to them."""
        with drawing(self.draws):
            return (self.method or model)(*self.args, **self.kwargs)

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments by name, in the order of the signature; `bind` must have been called."""
        assert self.binding is not None
        return {
            name: self.kwargs[place] if isinstance(place, str) else self.args[place]
            for name, place in self.binding.places.items()
        }

    def map(self, change: Callable[[Tensor], Tensor], label: str | None = None) -> InputSet:
        """Return a set with every tensor replaced by ``change(tensor)``."""
        args, kwargs = map_tensors(change, (self.args, dict(self.kwargs)))
        return replace(self, args=args, kwargs=kwargs, label=label or self.label)

    def clone(self) -> InputSet:
        """Return a copy that a forward pass may write to; the caller's tensors stay."""
        return self.map(lambda tensor: tensor.detach().clone())

    def named_tensors(self) -> list[tuple[str, Tensor]]:
        """Return the tensors with their names, in the order of the signature.

        Those nested in an argument are named by their way: ``pair=(a, {"b": b})`` gives ``pair_0``
        and ``pair_1_b``. `bind` must have been called.
        """
        named = [
            ("_".join((name, *path)), tensor)
            for name, value in self.arguments.items()
            for path, tensor in find_tensors(value)
        ]
        names = make_distinct(name for name, _ in named)
        return [(name, tensor) for name, (_, tensor) in zip(names, named, strict=True)]


def _bind(forward: Callable[..., Any], inputs: InputSet) -> Binding:
    """Return where the arguments of ``forward`` stand in a call.

    A forward without a usable signature (compiled code), and one that the call does not fit, has
    the names ``input_0`` and on for what is positional.
    """
    try:
        signature = inspect.signature(forward)
        bound = signature.bind(*inputs.args, **inputs.kwargs).arguments
    except (TypeError, ValueError):
        positions = {f"input_{index}": index for index in range(len(inputs.args))}
        return Binding({**positions, **{name: name for name in inputs.kwargs}})
    places: dict[str, Place] = {}
    collector = None
    for index, (name, parameter) in enumerate(signature.parameters.items()):
        if parameter.kind is parameter.VAR_KEYWORD:
            collector = name
        elif name not in bound:
            continue  # left at its default
        elif parameter.kind is parameter.VAR_POSITIONAL:
            places[name] = slice(index, None)
        else:
            is_positional = parameter.kind is not parameter.KEYWORD_ONLY
            places[name] = index if is_positional and index < len(inputs.args) else name
    collected = {}
    for keyword in bound.get(collector or "", ()):
        name = f"{collector}_{keyword}" if keyword in places else keyword
        places[name], collected[keyword] = keyword, name
    return Binding(places, collector, collected)


def as_kwargs(kwargs: Any, option: str) -> dict[str, Any]:
    """Return the keyword arguments of a call.

    Raises:
        TypeError: if they are no mapping by name.
    """
    if not isinstance(kwargs, Mapping):
        raise TypeError(
            f"{option} must be a dict of keyword arguments, got {type(kwargs).__name__}"
        )
    for name in kwargs:
        if not isinstance(name, str):
            raise TypeError(f"{option} must be by name of the argument, got the key {name!r}")
    return dict(kwargs)


def as_input_sets(
    model: nn.Module,
    inputs: Any,
    arity: int | None = None,
    label: str = "input",
    example: InputSet | None = None,
    method: MethodType | None = None,
) -> list[InputSet]:
    """Return what a user passes as ``inputs`` as input sets, bound to ``method`` or ``model``.

    A tensor is one call; a dict one call by keywords; a tuple one call with these
    arguments; a list any number of calls. A tuple of tuples or dicts, or of more than
    ``arity`` tensors where the model takes fewer, also counts as several calls, unless it is
    nested like the arguments of ``example``.

    Raises:
        TypeError: for anything else.
    """
    if inputs is None:
        return []
    return [one.bind(model, method) for one in _make_input_sets(inputs, arity, label, example)]


def _make_input_sets(
    inputs: Any, arity: int | None, label: str, example: InputSet | None
) -> list[InputSet]:
    if isinstance(inputs, tuple) and _is_several(inputs, arity):
        is_call = example is not None and (
            pytree.tree_structure(inputs) == pytree.tree_structure(example.args)
        )
        inputs = inputs if is_call else list(inputs)
    if isinstance(inputs, list):
        return [
            InputSet(one.args, one.kwargs, f"{label} {index}")
            for index, item in enumerate(inputs)
            for one in _make_input_sets(item, None, label, None)
        ]
    if isinstance(inputs, InputSet):
        return [inputs]
    if isinstance(inputs, Tensor):
        return [InputSet((inputs,), {}, label)]
    if isinstance(inputs, Mapping):
        return [InputSet((), as_kwargs(inputs, "inputs"), label)]
    if isinstance(inputs, tuple):
        return [InputSet(inputs, {}, label)]
    raise TypeError(
        "inputs must be a tensor, a tuple of arguments, a dict of keyword arguments or a "
        f"list of these, got {type(inputs).__name__}"
    )


def require_seen(inputs: InputSet, example: InputSet | None = None) -> None:
    """Raise unless every tensor of ``inputs`` can become an input of a file.

    Args:
        inputs: a bound set.
        example: the bound set whose tensors are the file's inputs, if these are others.

    Raises:
        TypeError: for a sparse tensor, a numpy array, or an object whose tensors no exporter
            sees: they would be constants of the file.
        ValueError: for a tensor that ``example`` does not have.
    """
    for name, value in inputs.arguments.items():
        for path, kind in find_unseen_tensors(value):
            raise TypeError(
                f"{'_'.join((name, *path))!r} in {inputs.label} is of type {kind}, whose content "
                "would be a constant of the file: pass tensors, in tuples, lists, dicts or "
                "dataclasses, or register the type with torch.utils._pytree"
            )
    tensors = inputs.named_tensors()
    for name, tensor in tensors:
        if not is_dense(tensor):
            kind = "is nested" if tensor.is_nested else f"has the layout {tensor.layout}"
            kind = "is quantized" if tensor.is_quantized else kind
            raise TypeError(f"'{name}' in {inputs.label} {kind}; a file takes dense tensors alone")
    known = {name for name, _ in (example or inputs).named_tensors()}
    for name, _ in tensors:
        if name not in known:
            raise ValueError(
                f"{inputs.label} has the tensor '{name}', which the example input does not have; "
                f"it has {', '.join(sorted(known))}"
            )


def _is_several(inputs: Sequence[Any], arity: int | None) -> bool:
    if inputs and all(isinstance(item, (tuple, Mapping, InputSet)) for item in inputs):
        return True
    return arity is not None and len(inputs) > arity
