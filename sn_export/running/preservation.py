"""Run modules in eval mode, as often as needed, and leave them as if never run."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from operator import is_
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from .plain_objects import PlainObjects
from .tensor_memory import Copies, Watch, are_large, find_on_memory_of, have_same_bits, is_in_place
from .torch_private import (
    disable_dispatch_modes,
    get_hooks_of_all_modules,
    get_original,
    set_version,
)
from .undo import undo_on_exit, undoing

T = TypeVar("T")

_UNCHANGING = frozenset({bool, int, float, str, type(None)})  # most of what modules hold


@undoing
def preserved_globals() -> Iterator[None]:
    """Put back the random states of torch (all devices), numpy and python, and torch's grad mode.

    Grad mode is among them since an interrupt may strike where a ``with torch.no_grad()`` has ended
    and its ``__exit__`` was not called yet. Hooks for all modules that torch itself registers
    inside are removed: where an export fails, torch 2.9 leaves one behind.
    """
    grad = torch.is_grad_enabled()
    python_state, numpy_state = random.getstate(), np.random.get_state()
    torch_state = torch.get_rng_state()
    cuda_states = torch.cuda.get_rng_state_all() if _is_cuda_used() else []
    hooks = [(of_all, set(of_all)) for of_all in get_hooks_of_all_modules()]

    def restore() -> None:
        for of_all, before in hooks:
            for key in of_all.keys() - before:
                if str(getattr(of_all[key], "__module__", "")).startswith("torch."):
                    del of_all[key]
        torch.set_grad_enabled(grad)
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)
        torch.cuda.set_rng_state_all(cuda_states)

    with undo_on_exit(restore):
        yield


class Preserved:
    """Modules in eval mode whose every trace of use can be taken back.

    Forward passes and exporters replace attributes by equal copies, write buffers, append
    to lists. All that lives in containers that the modules reach, which are remembered entry
    by entry. Buffers and tensors in attributes are swapped for copies, so nothing ever writes
    to the originals; where those are views of each other, so are the copies. Parameters are
    written by very few forwards: `guard_parameters` and `settle` find out whether this is one, and
    leave tensors that share memory with a parameter on it.

    Args:
        modules: they are in eval mode from `begin` to `restore`. ``train()`` and ``eval()``
            are not called, since overrides of them may fuse or fold weights. Modules that stand
            in their attributes and lists without being registered are remembered too; as
            ``model.eval()`` does, `begin` leaves these in their mode.
        with_objects: also remember numpy arrays, and the attributes of plain objects, that the
            modules hold. Arrays are restored in place. Past 512 MB the rest of the arrays, and
            of the tensors in such objects, is left alone.
        left: modules that keep what happens to them.
    """

    def __init__(
        self,
        modules: Iterable[nn.Module],
        with_objects: bool = False,
        left: Iterable[nn.Module] = (),
    ) -> None:
        modules = list(modules)
        self._modules = [m for m in modules if not isinstance(m, torch.jit.ScriptModule)]
        self._own = len(self._modules)  # those within attributes and lists keep their mode
        # Compiled code keeps its attributes elsewhere.
        self._scripted = [(m, m.training) for m in modules if isinstance(m, torch.jit.ScriptModule)]
        self._containers: list[tuple[Any, Any]] = []
        self._attributes: list[Tensor] = []
        left = list(left)
        seen = {id(m._buffers) for m in self._modules} | {id(m.__dict__) for m in left}
        others: list[Any] = []
        known = set(map(id, (*modules, *left)))
        for module in self._modules:  # grows on the way
            found: list[Any] = []
            self._remember(module.__dict__, seen, found)
            for thing in found:
                if not isinstance(thing, nn.Module):
                    others.append(thing)
                    continue
                for inner in thing.modules():
                    if id(inner) not in known and not isinstance(inner, torch.jit.ScriptModule):
                        known.add(id(inner))
                        seen.add(id(inner._buffers))
                        self._modules.append(inner)
        objects = PlainObjects(others if with_objects else (), seen)
        self._containers += objects.containers
        self._attributes += objects.tensors
        self._arrays = objects.arrays
        # What a hook computes anew on each call needs no copy to compute with. A forward may write
        # it before the call, so it is guarded as parameters are.
        held = (m.__dict__.get(name) for m, name in find_set_by_hooks(self._modules))
        self._computed = {id(t): t for t in held if isinstance(t, Tensor) and not t.is_meta}
        self._attributes = [t for t in self._attributes if id(t) not in self._computed]
        self._originals = [(m._buffers, m._buffers.copy()) for m in self._modules]
        self._copies = Copies(())
        self._swapped: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self._guarded: list[Guarded] = []
        self._watch: Watch | None = None
        self.is_large = False  # whether the parameters that are guarded are those of a large model

    def _remember(self, container: Any, seen: set[int], others: list[Any]) -> None:
        if id(container) in seen:
            return
        seen.add(id(container))
        self._containers.append((container, container.copy()))
        for value in container.values() if isinstance(container, dict) else container:
            if isinstance(value, (dict, list, set, deque)):
                self._remember(value, seen, others)
            elif type(value) in _UNCHANGING:
                continue
            elif not isinstance(value, Tensor):
                others.append(value)
            elif not isinstance(value, nn.Parameter):
                self._attributes.append(value)

    @property
    def containers(self) -> list[tuple[Any, Any]]:
        """Every dict, list, set and deque that the modules reach, each with its old content.

        With ``with_objects`` those of plain objects, too.
        """
        return [*self._containers, *self._originals]

    @property
    def tensors(self) -> list[Tensor]:
        """The buffers, and the tensors in attributes that no hook of torch's computes anew."""
        buffers = (b for _, content in self._originals for b in content.values())
        return [tensor for tensor in (*self._attributes, *buffers) if tensor is not None]

    def guard_parameters(self) -> None:
        """Before `begin`: keep a copy of every parameter; of a large model, of those written."""
        parameters = {id(p): p for m in self._modules for p in m._parameters.values()}
        tensors: list[Tensor] = [p for p in parameters.values() if p is not None and not p.is_meta]
        self.is_large = are_large(tensors)
        tensors += self._computed.values()
        views = find_on_memory_of(tensors, self.tensors)
        self._guarded = [Guarded(tensor, later=self.is_large) for tensor in (*tensors, *views)]
        if self.is_large:
            self._watch = Watch((g.tensor, g.keep) for g in self._guarded)
            self._watch.start()

    def begin(self) -> None:
        """Switch to eval mode and to copies of the buffers."""
        # Exporters take no compiled code, and nothing is to be compiled on the way.
        replaced: dict[int, Any] = {
            id(m): original for m in self._modules if (original := get_original(m)) is not None
        } | {id(m._compiled_call_impl): None for m in self._modules if m._compiled_call_impl}
        guarded = {id(g.tensor) for g in self._guarded}
        self._copies = Copies(tensor for tensor in self.tensors if id(tensor) not in guarded)
        replaced |= self._copies.of
        self._swapped = [
            (container, _replace_copies(content, replaced))
            for container, content in (*self._containers, *self._originals)
        ]
        own = {id(module.__dict__) for module in self._modules[: self._own]}
        for container, content in self._swapped:
            if id(container) in own:
                content["training"] = False
        self._start_over()

    def settle(self) -> None:
        """Forget the copies of parameters that the forward passes so far did not write."""
        self._stop_watching()
        self._guarded = [guarded for guarded in self._guarded if guarded.was_written]

    def _stop_watching(self) -> None:
        if self._watch is not None:
            self._watch.stop()
            self._watch = None

    def reset(self) -> None:
        """Give the next forward pass the state that the first one had."""
        self._copies.reset()
        self._restore_memory()
        self._start_over()

    def restore(self) -> None:
        """Put everything back; can be repeated from any point where it was interrupted."""
        self._stop_watching()
        for container, content in (*self._containers, *self._originals):
            restore_container(container, content)
        for scripted, training in self._scripted:
            scripted.training = training
        self._restore_memory()

    def _start_over(self) -> None:
        for container, content in self._swapped:
            if container or content:  # most of a module's dictionaries are empty
                restore_container(container, content)
        for scripted, _ in self._scripted:
            scripted.training = False

    def _restore_memory(self) -> None:
        for guarded in self._guarded:
            guarded.restore()
        for array in self._arrays:
            array.restore()


def find_set_by_hooks(modules: Iterable[nn.Module]) -> Iterator[tuple[nn.Module, str]]:
    """Yield module and name of each attribute that a hook of torch's sets anew at each call."""
    for module in modules:
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, (SpectralNorm, WeightNorm)):
                yield module, hook.name


class Guarded:
    """A parameter, the memory under it and a copy of its content.

    Args:
        tensor: the parameter.
        later: leave the copy to `keep`, which is to be called before the memory is written.
    """

    def __init__(self, tensor: Tensor, later: bool = False) -> None:
        self.tensor = tensor
        self.memory = tensor.detach()
        self.content: Tensor | None = None if later else self.memory.clone()
        self.was_written = False
        # Autograd checks it in a backward of the user's that may be pending.
        self._version = None if tensor.is_inference() else tensor._version

    def keep(self) -> None:
        """Copy the content, once."""
        if self.content is None:
            with disable_dispatch_modes():
                self.content = self.memory.clone()

    def restore(self) -> None:
        """Put memory and content back, and note whether that was needed."""
        if not is_in_place(self.tensor, self.memory):
            self.was_written = True
            self.tensor.data = self.memory
        if self.content is not None and not have_same_bits(self.memory, self.content):
            self.was_written = True
            self.memory.data.copy_(self.content)
        if self._version is not None and self._version != self.tensor._version:
            set_version(self.tensor, self._version)


@undoing
def preserved(model: nn.Module) -> Iterator[Preserved]:
    """Hold ``model`` in eval mode and leave it, and the global RNG, as they were."""
    with preserved_globals():
        state = Preserved(model.modules(), with_objects=True)
        with undo_on_exit(state.restore):
            state.guard_parameters()
            state.begin()
            yield state


def run_without_trace(
    run: Callable[[], T], modules: Iterable[nn.Module], parameters: bool = True
) -> T:
    """Return ``run()``, with ``modules`` in eval mode, and put everything back.

    Args:
        run: uses the modules.
        modules: those that may be changed.
        parameters: whether that may happen to their parameters too.
    """
    with preserved_globals():
        state = Preserved(modules, with_objects=True)
        with undo_on_exit(state.restore):
            if parameters:
                state.guard_parameters()
            state.begin()
            return run()


def _is_cuda_used() -> bool:
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def _replace_copies(content: Any, copies: dict[int, Any]) -> Any:
    if isinstance(content, dict):
        return {key: copies.get(id(value), value) for key, value in content.items()}
    return type(content)(copies.get(id(value), value) for value in content)


def restore_container(container: Any, content: Any) -> None:
    """Give a dict, list, set or deque its old content; nothing is touched that is there."""
    if not container and not content:  # most of a module's dictionaries
        return
    if isinstance(container, dict):
        same = list(container) == list(content) and all(
            map(is_, container.values(), content.values())
        )
    elif isinstance(container, set):
        same = container == content
    else:
        same = len(container) == len(content) and all(map(is_, container, content))
    if not same:
        container.clear()
        (container.extend if isinstance(container, (list, deque)) else container.update)(content)
