"""Run modules in eval mode, as often as needed, and leave them as if never run."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

T = TypeVar("T")


@contextmanager
def preserved_rng() -> Iterator[None]:
    """Put back the global random states of torch (all devices), numpy and python."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count())) if _cuda_is_used() else []
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


class Preserved:
    """Modules in eval mode whose every trace of use can be taken back.

    Forward passes and exporters replace attributes by equal copies, write buffers, append
    to lists. Modules keep all that in dictionaries, which are remembered entry by entry.
    Buffers are swapped for copies, so nothing ever writes to the originals. Parameters are
    written by very few forwards: `guard_parameters` and `settle` find out whether this is one.

    Args:
        modules: they are in eval mode until `restore`. ``train()`` and ``eval()`` are not
            called, since overrides of them may fuse or fold weights.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        modules = list(modules)
        self._modules = [m for m in modules if not isinstance(m, torch.jit.ScriptModule)]
        self._scripted = [(m, m.training) for m in modules if isinstance(m, torch.jit.ScriptModule)]
        for (
            scripted,
            _,
        ) in self._scripted:  # compiled code keeps its attributes elsewhere
            scripted.training = False
        self._containers: list[tuple[Any, Any]] = []
        self._originals: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self._parameters: list[tuple[Tensor, Tensor]] = []
        self._working: list[tuple[Tensor, Tensor]] = []  # a copy and its original
        self._swapped: list[tuple[dict[str, Any], dict[str, Any]]] = []
        copies: dict[int, Tensor] = {}
        for module in self._modules:
            self._containers.append((module.__dict__, module.__dict__.copy()))
            for name, value in vars(module).items():
                if name == "_buffers":
                    self._originals.append((value, value.copy()))
                elif isinstance(value, (dict, list, set)):
                    self._containers.append((value, value.copy()))
        for module in self._modules:
            module.__dict__["training"] = False
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    if id(buffer) not in copies:
                        copies[id(buffer)] = buffer.detach().clone()
                        self._working.append((copies[id(buffer)], buffer))
                    module._buffers[name] = copies[id(buffer)]
            self._swapped.append((module._buffers, module._buffers.copy()))

    def guard_parameters(self) -> None:
        """Keep a copy of every parameter from here on."""
        unique = {id(p): p for m in self._modules for p in m._parameters.values() if p is not None}
        self._parameters = [(p, p.detach().clone()) for p in unique.values()]

    def settle(self) -> None:
        """Forget the copies of parameters that the forward passes so far did not write."""
        self._parameters = [
            (p, content) for p, content in self._parameters if not _same(p.detach(), content)
        ]

    def reset(self) -> None:
        """Give the next forward pass the state that the first one had."""
        for container, content in (*self._containers, *self._swapped):
            _restore_container(container, content)
        for module in self._modules:
            module.__dict__["training"] = False
        with torch.no_grad():
            for copy, original in self._working:
                if not _same(copy, original):
                    copy.copy_(original)
        self._restore_parameters()

    def restore(self) -> None:
        """Put everything back: attributes, modes, buffers, parameters."""
        for container, content in (*self._containers, *self._originals):
            _restore_container(container, content)
        for scripted, training in self._scripted:
            scripted.training = training
        self._restore_parameters()

    def _restore_parameters(self) -> None:
        for parameter, content in self._parameters:
            if not _same(parameter.detach(), content):
                parameter.data.copy_(content)


@contextmanager
def preserved(model: nn.Module) -> Iterator[Preserved]:
    """Hold ``model`` in eval mode and leave it, and the global RNG, as they were."""
    with preserved_rng():
        state = Preserved(model.modules())
        try:
            state.guard_parameters()
            yield state
        finally:
            state.restore()


def without_trace(run: Callable[[], T], modules: Iterable[nn.Module]) -> T:
    """Return ``run()``, with ``modules`` in eval mode, and put back everything but parameters."""
    with preserved_rng():
        state = Preserved(modules)
        try:
            return run()
        finally:
            state.restore()


def _cuda_is_used() -> bool:
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def _same(left: Tensor, right: Tensor) -> bool:
    if left.is_meta or right.is_meta:
        return True
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    return torch.equal(_bits(left), _bits(right))


def _bits(tensor: Tensor) -> Tensor:
    # NaN equals itself bit for bit.
    real = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    return real.flatten().view(torch.uint8)


def _restore_container(container: Any, content: Any) -> None:
    if isinstance(container, dict):
        if list(container) != list(content) or any(
            container[key] is not content[key] for key in content
        ):
            container.clear()
            container.update(content)
    elif isinstance(container, list):
        if len(container) != len(content) or any(
            now is not then for now, then in zip(container, content, strict=True)
        ):
            container[:] = content
    elif container != content:
        container.clear()
        container.update(content)
