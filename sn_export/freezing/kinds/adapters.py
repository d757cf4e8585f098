"""Spectral norm of your own: a small protocol, the list of those who follow it, and their sites.

What an adapter does becomes edits, so undoing stays exact.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Any, Protocol, TypeVar, cast, overload, runtime_checkable

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ...errors import FreezeError
from ...running import Guarded, Preserved, restore_container, undo_on_exit
from ...text import describe_error, qualify
from ..edits import Edits
from ..info import SpectralNormInfo
from ..introspection.sandbox import compute_in_sandbox
from ..site import Site


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


T = TypeVar("T")
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
        _require_method(instance, method, count)
    registration = Registration(cast(SpectralNormAdapter, instance))
    _adapters.insert(0, registration)
    return adapter if isinstance(adapter, type) else registration


def list_registrations() -> Sequence[Registration]:
    """Return what is registered, in the order in which it is asked; a live list."""
    return _adapters


def _require_method(adapter: object, method: str, count: int) -> None:
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


class AdaptedSite(Site):
    """A tensor that an adapter knows of."""

    __slots__ = ("adapter", "given_name", "owner")

    def __init__(
        self, path: str, module: nn.Module, tensor: str, adapter: SpectralNormAdapter
    ) -> None:
        super().__init__(path, module, tensor)
        self.adapter = adapter
        self.owner = module  # of the adapter; the weight may belong into a child of it
        self.given_name = tensor  # by the adapter; the tensor may be registered under another

    @property
    def kind(self) -> str:  # type: ignore[override]
        """The class of the adapter."""
        return type(self.adapter).__name__

    @property
    def sources(self) -> Iterable[Tensor]:
        """All tensors of the module, since only the adapter knows which of them count."""
        return (*self.owner.parameters(), *self.owner.buffers())

    def value(self) -> Tensor:
        """Ask the adapter, on copies."""
        value = self._call(
            "value",
            lambda: compute_in_sandbox(
                lambda: self.adapter.value(self.owner, self.given_name), self.owner.modules()
            ),
        )
        if not isinstance(value, Tensor):
            raise self._make_error(f"value returned {type(value).__name__}, not a tensor")
        if not value.is_floating_point() and not value.is_complex():
            raise self._make_error(f"value returned a tensor of {value.dtype}, which is no weight")
        return value.detach().clone()

    def plan(self, edits: Edits, frozen: Tensor) -> None:
        """Let the adapter freeze, plan what it changed as edits, and put all back for now."""
        owner = self.owner
        modules = list(owner.modules())
        snapshot = _Snapshot(modules, self._make_error)
        with undo_on_exit(snapshot.restore):
            snapshot.advance(edits)
            self._call("freeze", lambda: self.adapter.freeze(owner, self.given_name, frozen))  # type: ignore[arg-type]
            edits.call_before_undoing(self._restore)
            self._locate(frozen)
            snapshot.plan(edits)

    def _restore(self) -> None:
        snapshot = _Snapshot(list(self.owner.modules()), self._make_error)
        with undo_on_exit(snapshot.restore):
            self._call("restore", lambda: self.adapter.restore(self.owner, self.given_name))

    def _locate(self, frozen: Tensor) -> None:
        for path, module in self.owner.named_modules():
            for name, parameter in module._parameters.items():
                if parameter is frozen:
                    self.module, self.attributes, self.tensor = module, module.__dict__, name
                    if path:
                        self.path = qualify(self.path, path)
                    return
        raise self._make_error(
            "freeze left the weight it was given in no module: register it as a parameter"
        )

    def _call(self, method: str, call: Callable[[], T]) -> T:
        try:
            return call()
        except FreezeError:
            raise
        except Exception as error:
            raise self._make_error(f"{method} raised {describe_error(error)}") from error

    def _make_error(self, reason: str) -> FreezeError:
        return _make_error(self.path, self.given_name, self.adapter, reason)

    def describe(self) -> SpectralNormInfo:
        """Return what `find_spectral_norm` lists; only the adapter knows sigma."""
        return self.make_norm_info(self.value())


def find_adapted(path: str, module: nn.Module) -> list[AdaptedSite]:
    """Return the sites that registered adapters find in ``module``."""
    sites: dict[str, AdaptedSite] = {}
    for adapter in [registration.adapter for registration in list_registrations()]:
        for name in _ask_names(path, module, adapter):
            if name not in sites:
                sites[name] = AdaptedSite(path, module, name, adapter)
    return list(sites.values())


def _ask_names(path: str, module: nn.Module, adapter: SpectralNormAdapter) -> list[str]:
    try:
        names = adapter.find(module)
        names = [names] if isinstance(names, str) else list(names)
    except Exception as error:
        reason = f"find raised {describe_error(error)}"
        raise _make_error(path, "", adapter, reason) from error
    for name in names:
        if not isinstance(name, str):
            reason = f"find returned {name!r}, not the name of a tensor"
            raise _make_error(path, "", adapter, reason)
    return names


def _make_error(path: str, tensor: str, adapter: SpectralNormAdapter, reason: str) -> FreezeError:
    return FreezeError(
        (qualify(path, tensor) if tensor else path) or "the model",
        f"adapter {type(adapter).__name__}: {reason}",
        "Correct the adapter, or unregister it",
    )


class _Snapshot:
    """Modules as they were, to be put back."""

    def __init__(self, modules: Sequence[nn.Module], error: Callable[[str], FreezeError]) -> None:
        self._modules = modules
        self._make_error = error
        self._state = Preserved(modules)
        self._classes = [type(module) for module in modules]
        tensors = {
            id(t): t for m in modules for t in (*m._parameters.values(), *m._buffers.values())
        }
        self._guarded = [Guarded(t) for t in tensors.values() if t is not None and not is_lazy(t)]

    def restore(self) -> None:
        """Put everything back, tensors included; can be repeated."""
        self._state.restore()
        for module, cls in zip(self._modules, self._classes, strict=True):
            object.__setattr__(module, "__class__", cls)
        for guarded in self._guarded:
            guarded.restore()

    def advance(self, edits: Edits) -> None:
        """Go to the state that the edits planned so far would make."""
        for container, _ in self._state.containers:
            if isinstance(container, dict):
                restore_container(container, edits.get_planned(container))
        for module in self._modules:
            object.__setattr__(module, "__class__", edits.get_planned_class(module))

    def plan(self, edits: Edits) -> None:
        """Add the edits that lead from the snapshot to the state now."""
        for guarded in self._guarded:
            guarded.restore()
            if guarded.was_written:
                raise self._make_error(
                    "freeze wrote into a tensor; it may only register and delete"
                )
        for container, before in self._state.containers:
            if isinstance(container, dict):
                edits.replan(container, before)
            elif _differs(container, before):
                kind = type(container).__name__
                raise self._make_error(f"freeze changed a {kind} in place; set a new one instead")
        for module, cls in zip(self._modules, self._classes, strict=True):
            if type(module) is not cls:
                edits.set_class(module, type(module), cls)


def _differs(container: Any, before: Any) -> bool:
    if isinstance(container, set):
        return bool(container != before)
    return len(container) != len(before) or any(
        a is not b for a, b in zip(container, before, strict=True)
    )
