"""A frozen weight, and how to tell afterwards whether somebody edited or moved it.

`torch.nn.Module.to` and ``model.half()`` swap the memory under a parameter and keep the object.
Holding on to that memory, without copying it, is enough to bring every bit back.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from functools import cache
from itertools import product
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..running import list_dense_parts
from .site import Site

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

_PLAIN = (Tensor, nn.Parameter)
_SAMPLED_WHOLE = 4096  # bytes; larger weights are sampled
_CHUNKS, _CHUNK = 16, 256  # number and bytes of the samples


class FrozenWeight:
    """The value of one site while the block lasts.

    Attributes:
        site: where the value belongs.
        tensor: the plain `torch.nn.Parameter` (or buffer) that stands there.
    """

    __slots__ = ("_state", "site", "tensor")

    def __init__(self, site: Site, value: Tensor) -> None:
        self.site = site
        if value.requires_grad:
            value = value.detach()
        self.tensor: Tensor = value if site.is_buffer else nn.Parameter(value, requires_grad=False)
        self._state = _record_state(value)

    def change(self) -> Literal["moved", "edited"] | None:
        """Return what was done to the weight since, if anything.

        Moved to another dtype or device; or edited, that is replaced or written to. Writes
        through ``.data`` leave no version behind. They are seen by comparing bytes: all of
        a small weight, 16 samples of a large one; on the CPU only.
        """
        attributes, name = self.site.attributes, self.site.tensor
        now: Tensor | None = attributes["_parameters"].get(name)
        if now is None:
            now = attributes["_buffers"].get(name)
        if now is None:
            return "edited"
        state = _record_state(now)
        if now is self.tensor and state == self._state:
            return None
        return "moved" if state[:2] != self._state[:2] else "edited"


_State = tuple[torch.dtype, torch.device, int, int, bytes]


def _record_state(tensor: Tensor) -> _State:
    """Return dtype, device, version and address of ``tensor``, and the bytes that are there."""
    dtype, device, version = tensor.dtype, tensor.device, tensor._version
    try:
        start = tensor.data_ptr()
    except RuntimeError:  # tensor subclasses without memory of their own
        return dtype, device, version, 0, b""
    if not tensor.is_cpu or type(tensor) not in _PLAIN:
        return dtype, device, version, start, b""
    # A frozen weight is always dense, so its bytes are contiguous in some order.
    size = tensor.nbytes
    if size <= _SAMPLED_WHOLE:
        return dtype, device, version, start, _read(start, size)
    places = ((size - _CHUNK) * i // (_CHUNKS - 1) for i in range(_CHUNKS))  # both ends too
    return dtype, device, version, start, b"".join(_read(start + p, _CHUNK) for p in places)


def _read(start: int, size: int) -> bytes:
    return _make_array_type(size).from_address(start).raw


@cache  # `ctypes.string_at` takes longer, for a small weight
def _make_array_type(size: int) -> type[ctypes.Array[ctypes.c_char]]:
    return ctypes.c_char * size


class Residence:
    """Where parameters and buffers of a model lived at the start of a block.

    Args:
        places: each tensor with the container that holds it and its name there.
    """

    def __init__(self, places: Iterable[tuple[dict[str, Any], str, Tensor]]) -> None:
        self._places = places = list(places)
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
            if _differs(tensor, memory) or not _is_on(tensor, memory):
                tensor.data = memory
            container[name] = tensor
        for tensor, grad, memory in self._grads:
            now = tensor.grad
            if now is None:
                continue
            # torch keeps the object here too; another one is a gradient of its own, and stays.
            if _differs(now, memory) or (now is grad and _went_and_came(now, memory)):
                if _differs(grad, memory) or not _is_on(grad, memory):
                    grad.data = memory
                tensor.grad = grad


def _went_and_came(now: Tensor, memory: Tensor) -> bool:
    """Whether ``now`` is what is left of ``memory`` after ``half().float()`` and the like."""
    if is_lazy(now) or now.is_meta or not now.is_floating_point():
        return False
    if type(now) not in _PLAIN or _is_on(now, memory):
        return False
    parts, others = list_dense_parts(now.detach()), list_dense_parts(memory)
    # By way of two dtypes: rounded twice is not always rounded once.
    return len(parts) == len(others) and any(
        all(
            _is_rounded(part, other, first, second)
            for part, other in zip(parts, others, strict=True)
        )
        for first, second in product(_DTYPES, repeat=2)
    )


def _is_rounded(part: Tensor, other: Tensor, first: torch.dtype, second: torch.dtype) -> bool:
    if not part.is_floating_point():  # the indices of a sparse tensor
        return torch.equal(part, other)
    rounded = other.to(first).to(second).to(part.dtype)
    return torch.equal(torch.nan_to_num(part), torch.nan_to_num(rounded))


def _is_on(tensor: Tensor, memory: Tensor) -> bool:
    parts, others = list_dense_parts(tensor.detach()), list_dense_parts(memory)
    return [part.data_ptr() for part in parts] == [other.data_ptr() for other in others]


def _differs(tensor: Tensor, memory: Tensor) -> bool:
    return tensor.dtype != memory.dtype or tensor.device != memory.device
