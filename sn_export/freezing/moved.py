"""Undo of ``model.half()`` and ``model.to(device)`` inside a block.

`torch.nn.Module.to` swaps the memory under a parameter and keeps the object. Holding on to
the memory, without copying it, is enough to bring every bit back.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class Residence:
    """Where the parameters and buffers of the whole model lived at the start of a block."""

    def __init__(self) -> None:
        self._tensors: list[tuple[dict[str, Any], str, Tensor, Tensor]] = []
        self._grads: list[tuple[Tensor, Tensor, Tensor]] = []

    def note(self, module: nn.Module) -> None:
        """Remember the tensors of ``module`` itself, not of its children."""
        for container in (module._parameters, module._buffers):
            for name, tensor in container.items():
                if tensor is not None:
                    self._tensors.append((container, name, tensor, tensor.detach()))
                    if tensor.grad is not None:
                        self._grads.append((tensor, tensor.grad, tensor.grad.detach()))

    def restore(self) -> None:
        """Bring every tensor back whose dtype or device is another one now."""
        for container, name, tensor, memory in self._tensors:
            now = container.get(name)
            if now is None or not _differs(now, memory):
                continue
            if _differs(tensor, memory):
                tensor.data = memory
            container[name] = tensor
        for tensor, grad, memory in self._grads:
            if tensor.grad is not None and _differs(tensor.grad, memory):
                if _differs(grad, memory):
                    grad.data = memory
                tensor.grad = grad


def _differs(tensor: Tensor, memory: Tensor) -> bool:
    return tensor.dtype != memory.dtype or tensor.device != memory.device
