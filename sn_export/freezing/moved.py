"""Undo of ``model.half()`` and ``model.to(device)`` inside a block.

`torch.nn.Module.to` swaps the memory under a parameter and keeps the object. Holding on to
the memory, without copying it, is enough to bring every bit back.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

from torch import Tensor, nn
from torch.nn.parameter import is_lazy


class Residence:
    """Where the parameters and buffers of the whole model lived at the start of a block."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        places = [
            (container, name, tensor)
            for module in modules
            for container in (module._parameters, module._buffers)
            for name, tensor in container.items()
            if tensor is not None
        ]
        self._places = places
        self._memory = [t if is_lazy(t) else t.detach() for _, _, t in places]
        self._grads = [
            (tensor, tensor.grad, tensor.grad.detach())
            for _, _, tensor in places
            if tensor.grad is not None
        ]

    def restore(self) -> None:
        """Bring every tensor back whose dtype or device is another one now."""
        for (container, name, tensor), memory in zip(self._places, self._memory, strict=True):
            now = container.get(name)
            if now is None or not _differs(now, memory):
                continue
            if _differs(tensor, memory):
                tensor.data = memory
            cast("dict[str, Tensor]", container)[name] = tensor
        for tensor, grad, memory in self._grads:
            if tensor.grad is not None and _differs(tensor.grad, memory):
                if _differs(grad, memory):
                    grad.data = memory
                tensor.grad = grad


def _differs(tensor: Tensor, memory: Tensor) -> bool:
    return tensor.dtype != memory.dtype or tensor.device != memory.device
