"""Undo of ``model.half()`` and ``model.to(device)`` inside a block, and there and back.

`torch.nn.Module.to` swaps the memory under a parameter and keeps the object. Holding on to
the memory, without copying it, is enough to bring every bit back.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


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
        """Bring every tensor back whose dtype or device is another one now, or was between."""
        for (container, name, tensor), memory in zip(self._places, self._memory, strict=True):
            now = container.get(name)
            if now is None or not (_differs(now, memory) or _went_and_came(now, memory)):
                continue
            if _differs(tensor, memory) or tensor.data_ptr() != memory.data_ptr():
                tensor.data = memory
            cast("dict[str, Tensor]", container)[name] = tensor
        for tensor, grad, memory in self._grads:
            now = tensor.grad
            if now is None:
                continue
            # torch keeps the object here too; another one is a gradient of its own, and stays.
            if _differs(now, memory) or (now is grad and _went_and_came(now, memory)):
                if _differs(grad, memory) or grad.data_ptr() != memory.data_ptr():
                    grad.data = memory
                tensor.grad = grad


def _went_and_came(now: Tensor, memory: Tensor) -> bool:
    """Whether ``now`` is what is left of ``memory`` after ``half().float()`` and the like."""
    if is_lazy(now) or now.is_meta or not now.is_floating_point() or now.shape != memory.shape:
        return False
    if type(now) not in (Tensor, nn.Parameter) or now.data_ptr() == memory.data_ptr():
        return False
    content = torch.nan_to_num(now.detach())
    # By way of two dtypes: rounded twice is not always rounded once.
    return any(
        torch.equal(content, torch.nan_to_num(memory.to(first).to(second).to(now.dtype)))
        for first, second in product(_DTYPES, repeat=2)
    )


def _differs(tensor: Tensor, memory: Tensor) -> bool:
    return tensor.dtype != memory.dtype or tensor.device != memory.device
