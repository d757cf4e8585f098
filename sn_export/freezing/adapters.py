"""Spectral norm of your own: a small protocol, and the list of those who follow it."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Protocol, TypeVar, cast, overload, runtime_checkable

from torch import Tensor, nn


@runtime_checkable
class SpectralNormAdapter(Protocol):
    """Tells the block where an implementation of spectral norm keeps its weights.

    The model is safe from an adapter: `find` and `value` run on copies of the tensors or must
    only look, and whatever `freeze` and `restore` do to the module, its children and their
    dictionaries is put back exactly when the block ends.
    """

    def find(self, module: nn.Module) -> Iterable[str]:
        """Name the tensors that ``module`` itself normalises; none for a foreign module.

        The names are those that the plain network would have, such as ``"weight"``. Called for
        every module of a model, so it should look at the class first. It must change nothing.
        """
        ...

    def value(self, module: nn.Module, name: str) -> Tensor:
        """Return the normalised weight that an eval-mode forward would use now.

        Runs in eval mode, without gradients, on copies of the tensors of ``module`` and its
        children: it may call whatever normalises, also if that writes ``u`` and ``v``.
        """
        ...

    def freeze(self, module: nn.Module, name: str, weight: nn.Parameter) -> None:
        """Make ``module`` a plain one that uses ``weight`` as it is.

        Register ``weight`` where the plain network has it, delete what only serves to compute
        it (the raw weight, ``u``, ``v``, sigma), and see that forward normalises no more: set an
        attribute, or exchange ``module.__class__``. Tensors must not be written.
        """
        ...

    def restore(self, module: nn.Module, name: str) -> None:
        """Undo what `freeze` did outside ``module`` (a cache, a registry); often nothing."""
        ...


class Registration:
    """A registered adapter; call it, or leave it as a context manager, to unregister."""

    def __init__(self, adapter: SpectralNormAdapter) -> None:
        self.adapter = adapter

    def remove(self) -> None:
        """Unregister the adapter; nothing happens if it is not registered any more."""
        _adapters[:] = [entry for entry in _adapters if entry is not self]

    __call__ = remove

    def __enter__(self) -> Registration:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.remove()


C = TypeVar("C", bound=type)
_adapters: list[Registration] = []
_METHODS = {"find": 1, "value": 2, "freeze": 3, "restore": 2}


@overload
def register_spectral_norm(adapter: C) -> C: ...
@overload
def register_spectral_norm(adapter: SpectralNormAdapter) -> Registration: ...
def register_spectral_norm(adapter: C | SpectralNormAdapter) -> C | Registration:
    """Teach the block an implementation of spectral norm that it does not know.

    As a call with an object, or as the decorator of a class without arguments::

        registration = register_spectral_norm(MyAdapter(option=1))
        registration.remove()

        @register_spectral_norm
        class MyAdapter: ...

    An adapter is asked before everything that is built in, the last registered one first.

    Args:
        adapter: an object with the four methods of `SpectralNormAdapter`, or a class of such.

    Returns:
        For an object a `Registration`, to unregister it by; for a class the class.

    Raises:
        TypeError: if a method is missing, or takes other arguments.
    """
    instance = adapter() if isinstance(adapter, type) else adapter
    for method, count in _METHODS.items():
        _check(instance, method, count)
    registration = Registration(cast(SpectralNormAdapter, instance))
    _adapters.insert(0, registration)
    return adapter if isinstance(adapter, type) else registration


def adapters() -> Sequence[Registration]:
    """Return what is registered, in the order in which it is asked; a live list."""
    return _adapters


def _check(adapter: object, method: str, count: int) -> None:
    function = getattr(adapter, method, None)
    wanted = ", ".join(["module", "name", "weight"][:count])
    if not callable(function):
        raise TypeError(
            f"adapter {type(adapter).__name__} must have a method {method}({wanted}), found none"
        )
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # compiled code has no signature to read
        return
    try:
        signature.bind(*range(count))
    except TypeError as error:
        raise TypeError(
            f"method {method} of adapter {type(adapter).__name__} must take ({wanted}), "
            f"it takes {signature}"
        ) from error
