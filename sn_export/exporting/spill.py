"""Frozen weights in files without a name: a large export holds no weight twice in memory."""

from __future__ import annotations

import ctypes
import mmap
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from ..running import are_large, is_dense

_SMALLEST = 2**20  # bytes of a weight


class Spill:
    """Keeps large weights in files that are mapped: only what is read of them takes memory.

    A mapping is private, and its file is gone from the disk with the weight.

    Args:
        model: what the weights are of. Only past 512 MB of parameters are there files, and only
            on systems that let an open file be deleted.
        folder: where they lie; a disk with room for the ONNX file.
    """

    def __init__(self, model: nn.Module, folder: Path) -> None:
        is_worth_it = os.name == "posix" and are_large(model.parameters())
        self._folder = folder if is_worth_it else None
        self._kept: list[Tensor] = []

    def keep(self, values: Iterable[Tensor]) -> list[Tensor]:
        """Return tensors of the same bits, in files; one after the other is in memory.

        Small weights stay in memory, and what is not on the CPU or not contiguous; so does what
        the folder has no room for.
        """
        self._kept = []  # of one block at a time: those of an earlier one go with their weights
        return list(map(self._keep, values))

    def _keep(self, value: Tensor) -> Tensor:
        if self._folder is None or not _can_be_kept(value):
            return value
        try:
            with tempfile.NamedTemporaryFile(dir=self._folder) as file:
                value.detach().flatten().view(torch.uint8).numpy().tofile(file)
                size, name = value.nbytes, file.name
                content = torch.from_file(name, shared=False, size=size, dtype=torch.uint8)
        except (OSError, RuntimeError):  # a full disk; a file system that maps nothing
            return value
        self._kept.append(content)
        return content.view(value.dtype).view(value.shape)

    def release(self) -> None:
        """Free the memory that reading the weights took; what was written to them is lost."""
        for content in self._kept:
            start, size = ctypes.c_void_p(content.data_ptr()), ctypes.c_size_t(content.nbytes)
            ctypes.CDLL(None).madvise(start, size, mmap.MADV_DONTNEED)


def _can_be_kept(value: Tensor) -> bool:
    is_plain = type(value) in (Tensor, nn.Parameter) and is_dense(value) and value.is_contiguous()
    # The bytes of a lazy conjugate are not its values.
    has_own_bits = not (value.is_conj() or value.is_neg())
    return is_plain and value.is_cpu and has_own_bits and value.nbytes >= _SMALLEST
