"""What is large: where memory counts for more than the time, or the room on disk, that saves it."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from .layouts import dense_parts

LARGE = 2**29  # bytes


def is_large(size: int) -> bool:
    """Whether so many bytes are."""
    return size > LARGE


def are_large(tensors: Iterable[Tensor]) -> bool:
    """Whether ``tensors`` are, together."""
    return is_large(sum(part.nbytes for tensor in tensors for part in dense_parts(tensor)))
