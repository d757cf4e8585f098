"""A frozen weight, and how to tell afterwards whether somebody edited it."""

from __future__ import annotations

import ctypes
from typing import Literal

from torch import Tensor, nn

from .site import Site

_SAMPLED_WHOLE = 4096  # bytes; larger weights are sampled
_CHUNKS, _CHUNK = 16, 256  # number and bytes of the samples


class FrozenWeight:
    """The value of one site while the block lasts.

    Attributes:
        site: where the value belongs.
        tensor: the plain `torch.nn.Parameter` (or buffer) that stands there.
    """

    __slots__ = ("_content", "_device", "_dtype", "_version", "site", "tensor")

    def __init__(self, site: Site, value: Tensor) -> None:
        self.site = site
        if value.requires_grad:
            value = value.detach()
        self.tensor: Tensor = value if site.is_buffer else nn.Parameter(value, requires_grad=False)
        self._dtype = value.dtype
        self._device = value.device
        self._version = value._version
        self._content = _content(value)

    def change(self) -> Literal["moved", "edited"] | None:
        """Return what was done to the weight since, if anything.

        Moved to another dtype or device; or edited, that is replaced or written to. Writes
        through ``.data`` leave no version behind. They are seen by comparing bytes: all of
        a small weight, 16 samples of a large one; on the CPU only.
        """
        module, name = self.site.module, self.site.tensor
        now: Tensor | None = module._parameters.get(name)
        if now is None:
            now = module._buffers.get(name)
        if now is None:
            return "edited"
        if now.dtype != self._dtype or now.device != self._device:
            return "moved"
        unchanged = (
            now is self.tensor and now._version == self._version and _content(now) == self._content
        )
        return None if unchanged else "edited"


def _content(tensor: Tensor) -> tuple[int, bytes]:
    """Return where ``tensor`` lies in memory, and what is there."""
    try:
        start = tensor.data_ptr()
    except RuntimeError:  # tensor subclasses without memory of their own
        return 0, b""
    if not tensor.is_cpu or type(tensor) not in (Tensor, nn.Parameter):
        return start, b""
    # A frozen weight is always dense, so its bytes are contiguous in some order.
    size = tensor.nbytes
    if size <= _SAMPLED_WHOLE:
        return start, ctypes.string_at(start, size)
    stride = (size - _CHUNK) // (_CHUNKS - 1)
    samples = (ctypes.string_at(start + i * stride, _CHUNK) for i in range(_CHUNKS))
    return start, b"".join(samples)
