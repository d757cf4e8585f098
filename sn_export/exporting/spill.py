"""Frozen weights in a file without a name: a large export holds no weight twice in memory."""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Iterable
from io import FileIO
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..running import are_large, is_dense

_SMALLEST = 2**20  # bytes of a weight
# Bytes at a time: Linux maps what was written at once as one, for whoever reads an element.
_WRITTEN = 2**16


class _Place(NamedTuple):
    start: int  # in bytes
    shape: torch.Size
    dtype: torch.dtype

    def of(self, content: mmap.mmap | bytearray) -> Tensor:
        count = self.shape.numel()
        flat = torch.frombuffer(content, dtype=self.dtype, count=count, offset=self.start)
        return flat.view(self.shape)


class Spill:
    """Keeps large weights in a file that is mapped: only what is read of them takes memory.

    The mapping is private, and the file is gone from the disk with the last of the weights.

    Args:
        model: what the weights are of. Only past 512 MB of parameters is there a file, and only
            on systems that let it have no name.
        folder: where it lies; a disk with room for the ONNX file.
    """

    def __init__(self, model: nn.Module, folder: Path) -> None:
        is_worth_it = os.name == "posix" and are_large(model.parameters())
        self._folder = folder if is_worth_it else None
        self._content: mmap.mmap | bytearray | None = None

    def keep(self, values: Iterable[Tensor]) -> list[Tensor]:
        """Return tensors of the same bits: the large ones of the CPU lie in the file.

        One after the other is in memory. What the folder does not take stays there.
        """
        file = self._file()
        if file is None:
            return list(values)
        kept: list[Tensor | _Place] = []
        with file:
            for value in values:
                kept.append(_written(value, file) or value)
                del value  # before the next one is made
            content = self._content = _mapped(file)
        return [e.of(content) if isinstance(e, _Place) else e for e in kept]

    def release(self) -> None:
        """Free the memory that reading the weights took; what was written to them is lost."""
        if isinstance(self._content, mmap.mmap):
            self._content.madvise(mmap.MADV_DONTNEED)

    def _file(self) -> FileIO | None:
        if self._folder is None:
            return None
        try:
            return tempfile.TemporaryFile(dir=self._folder, buffering=0)
        except OSError:
            return None


def _written(value: Tensor, file: FileIO) -> _Place | None:
    """Write the bytes of ``value`` to the end of ``file``; None where it has to stay in memory."""
    is_plain = type(value) in (Tensor, nn.Parameter) and is_dense(value)
    if not (is_plain and value.is_cpu and value.is_contiguous() and value.nbytes >= _SMALLEST):
        return None
    if value.is_conj() or value.is_neg():  # its bytes are not its values
        return None
    start = -(-file.seek(0, os.SEEK_END) // mmap.PAGESIZE) * mmap.PAGESIZE
    left = value.detach().flatten().view(torch.uint8).numpy().data
    try:
        file.seek(start)
        while left:
            left = left[file.write(left[:_WRITTEN]) :]
    except OSError:  # no room
        return None
    return _Place(start, value.shape, value.dtype)


def _mapped(file: FileIO) -> mmap.mmap | bytearray:
    size = file.seek(0, os.SEEK_END)
    try:
        return mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)
    except (OSError, ValueError):  # an empty file, or a file system that maps nothing
        content = bytearray(size)
        file.seek(0)
        file.readinto(content)
        return content
