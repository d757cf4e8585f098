"""A class for one frozen instance: the user's class with a few methods that compute nothing.

Handwritten spectral norm is code, so it cannot be taken out of a module like a hook. The
instance is given a subclass of its class, under the same name, in which the methods that
normalise return the frozen weight. The user's class is shared, and stays as it is.
"""

from __future__ import annotations

import copyreg
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

from torch import nn

How = Literal["method", "property", "argument", "nothing", "call", "forward", "base"]


class Override(NamedTuple):
    """One attribute of the class of a frozen instance.

    Attributes:
        name: the attribute.
        how: what it does there. ``"method"`` and ``"property"`` return the tensor ``target``;
            ``"argument"`` returns its argument if that is the tensor ``target``; ``"nothing"``
            returns None; ``"call"`` and ``"forward"`` call the child ``target``, with its hooks
            or without; ``"base"`` is that attribute of the nearest class of torch.
        target: name of the tensor or child.
    """

    name: str
    how: How
    target: str = ""


class Frozen:
    """Marks the instances whose own spectral norm stands still."""

    _sn_export_overrides: tuple[type, tuple[Override, ...]]

    def __init_subclass__(cls) -> None:
        """Keep the news from registries in the user's ``__init_subclass__``."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copy and pickle by the user's class, since this one has no importable name."""
        reduced = super().__reduce_ex__(protocol)
        if not isinstance(reduced, tuple) or reduced[0] is not copyreg.__newobj__:  # type: ignore[attr-defined]
            return reduced
        cls, overrides = type(self)._sn_export_overrides
        return (_new, (cls, overrides, *reduced[1][1:]), *reduced[2:])


def frozen_class(cls: type, overrides: Iterable[Override]) -> type:
    """Return a subclass of ``cls`` with its name, in which ``overrides`` are replaced."""
    overrides = tuple(overrides)
    if issubclass(cls, Frozen):  # for another tensor of the same instance
        cls, others = cls._sn_export_overrides
        overrides = (*others, *(o for o in overrides if o not in others))
    namespace: dict[str, Any] = {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "_sn_export_overrides": (cls, overrides),
    }
    for override in overrides:
        namespace[override.name] = _attribute(cls, override)
    # Not by calling the metaclass, which may keep a list of classes.
    new: type = type.__new__(type(cls), cls.__name__, (Frozen, cls), namespace)
    return new


def torch_base(cls: type) -> type[nn.Module] | None:
    """Return the nearest class of torch behind ``cls``, unless that is `nn.Module` itself."""
    for base in cls.__mro__:
        if base.__module__.startswith("torch.nn.modules."):
            return base if base is not nn.Module else None
    return None


def _new(cls: type, overrides: tuple[Override, ...], *args: Any) -> Any:
    new = frozen_class(cls, overrides)
    return new.__new__(new, *args)


def _attribute(cls: type, override: Override) -> Any:
    name, how, target = override
    if how == "property":
        if name == target:  # the class attribute hides the parameter of that name
            return property(lambda self: self._parameters[target])
        return property(lambda self: getattr(self, target))
    if how == "base":
        return getattr(torch_base(cls), name)
    return _set_name(name, _FUNCTIONS[how](target, getattr(cls, name)))


def _set_name(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    function.__name__ = name
    return function


def _method(target: str, _: Any) -> Callable[..., Any]:
    return lambda self, *args, **kwargs: getattr(self, target)


def _argument(target: str, original: Any) -> Callable[..., Any]:
    def normalise(self: Any, weight: Any, *args: Any, **kwargs: Any) -> Any:
        if weight is getattr(self, target):
            return weight
        return original(self, weight, *args, **kwargs)

    return normalise


def _do_nothing(target: str, original: Any) -> Callable[..., Any]:
    return lambda self, *args, **kwargs: None


def _call(target: str, original: Any) -> Callable[..., Any]:
    return lambda self, *args, **kwargs: getattr(self, target)(*args, **kwargs)


def _forward(target: str, original: Any) -> Callable[..., Any]:
    return lambda self, *args, **kwargs: getattr(self, target).forward(*args, **kwargs)


_FUNCTIONS: dict[str, Callable[[str, Any], Callable[..., Any]]] = {
    "method": _method,
    "argument": _argument,
    "nothing": _do_nothing,
    "call": _call,
    "forward": _forward,
}
