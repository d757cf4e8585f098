"""Tensors that are read when they are accessed, one at a time, whole or in pieces.

The places of all pieces of a tensor are checked before one is read: where a piece is absent, the
memory would keep what it happened to hold, and that would be taken for a weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..text import format_count, quote_name

MOST_DIMS = 64  # the most that torch computes with
_ALIGNMENT = 64  # of torch's CPU allocator


@dataclass(frozen=True)
class Spec:
    """Dtype and shape of a tensor, which are known without reading it."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Number of bytes of the values."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Entry:
    """A value of a state dict that will be written, and is read or computed only then.

    Attributes:
        spec: its dtype and shape; None if it is no dense tensor, as an extra state.
        read: returns the value.
    """

    spec: Spec | None
    read: Callable[[], Any]


class LazyTensors(Mapping[str, Any]):
    """A mapping whose tensors are read when they are asked for; only that one is in memory.

    Attributes:
        specs: dtype and shape of each tensor.
        others: values that are no tensors, such as an extra state or a nested mapping.
    """

    def __init__(
        self,
        specs: Mapping[str, Spec],
        read: Callable[[str], Tensor],
        others: Mapping[str, Any] | None = None,
    ) -> None:
        self.specs = specs
        self.others = others or {}
        self._read = read

    def __getitem__(self, name: str) -> Any:
        return self._read(name) if name in self.specs else self.others[name]

    def __iter__(self) -> Iterator[str]:
        yield from self.specs
        yield from self.others

    def __len__(self) -> int:
        return len(self.specs) + len(self.others)

    def __contains__(self, name: object) -> bool:
        return name in self.specs or name in self.others


@dataclass(frozen=True)
class Piece:
    """A block of a tensor.

    Attributes:
        start: index in the tensor of its first element.
        shape: shape of the block.
        read: returns the block.
    """

    start: tuple[int, ...]
    shape: tuple[int, ...]
    read: Callable[[], Tensor]


@dataclass(frozen=True)
class Sharded:
    """A tensor in pieces, which cover it without overlap."""

    spec: Spec
    pieces: tuple[Piece, ...]

    def read(self) -> Tensor:
        """Return the whole tensor."""
        if len(self.pieces) == 1:
            return self.pieces[0].read()
        whole = torch.empty(self.spec.shape, dtype=self.spec.dtype)
        for piece in self.pieces:
            place = zip(piece.start, piece.shape, strict=True)
            whole[tuple(slice(start, start + size) for start, size in place)] = piece.read()
        return whole


def require_covered(sharded: Sharded, name: str, what: str) -> Sharded:
    """Return ``sharded`` if each of its elements is in exactly one piece.

    That is so if the pieces lie inside of the tensor, do not overlap, and have as many elements as
    the tensor.

    Raises:
        CheckpointError: if an element is in no piece, or in several.
    """
    shape = sharded.spec.shape
    pieces = [piece for piece in sharded.pieces if math.prod(piece.shape)]
    for piece in pieces:
        if any(a + n > m for a, n, m in zip(piece.start, piece.shape, shape, strict=True)):
            raise report_damage(
                what,
                f"a piece of {quote_name(name)} ends outside of its shape {list(shape)}",
            )
    # Sorted along the dimension with the most cuts, a piece can overlap few of those before it.
    cut = max(range(len(shape)), key=lambda d: len({p.start[d] for p in pieces}), default=None)
    if cut is not None:
        pieces.sort(key=lambda piece: piece.start[cut])
    beside: list[Piece] = []
    for piece in pieces:
        if cut is not None:
            beside = [p for p in beside if p.start[cut] + p.shape[cut] > piece.start[cut]]
        if any(_overlap(piece, other) for other in beside):
            raise report_damage(what, f"pieces of {quote_name(name)} overlap")
        beside.append(piece)
    there = sum(math.prod(piece.shape) for piece in pieces)
    if there != math.prod(shape):
        raise report_damage(
            what,
            f"the pieces of {quote_name(name)} hold {there} of its {math.prod(shape)} elements",
        )
    return sharded


def _overlap(one: Piece, other: Piece) -> bool:
    return all(
        a < b + m and b < a + n
        for a, n, b, m in zip(one.start, one.shape, other.start, other.shape, strict=True)
    )


def is_count(value: Any) -> TypeGuard[int]:
    """Whether ``value`` is a size or a number of elements."""
    return type(value) is int and value >= 0


def is_shape(value: Any) -> bool:
    """Whether ``value`` is a list of sizes, or of offsets, that torch can take."""
    return (
        isinstance(value, (tuple, list)) and len(value) <= MOST_DIMS and all(map(is_count, value))
    )


def as_shape(value: Any) -> tuple[int, ...] | None:
    """Return a value from a file as a tuple of sizes or offsets; None if it is no such list."""
    return tuple(value) if is_shape(value) else None


def report_damage(what: str, reason: str) -> CheckpointError:
    """Return the error for a folder whose files contradict each other or are not all there."""
    return CheckpointError(f"{what} is damaged or incomplete: {reason}")


def is_tensor(tensors: Mapping[str, Any], name: str) -> bool:
    """Whether ``tensors[name]`` is a tensor; it is not read."""
    if isinstance(tensors, LazyTensors):
        return name in tensors.specs
    return isinstance(tensors[name], Tensor)


def get_spec(tensors: Mapping[str, Any], name: str) -> Spec:
    """Return dtype and shape of one tensor; a lazy one is not read."""
    if isinstance(tensors, LazyTensors):
        return tensors.specs[name]
    tensor = tensors[name]
    return Spec(tensor.dtype, tuple(tensor.shape))


def get_dense_spec(tensors: Mapping[str, Any], key: str) -> Spec | None:
    """Return dtype and shape of a dense tensor that has values; None for anything else."""
    if isinstance(tensors, LazyTensors):
        return tensors.specs.get(key)
    value = tensors.get(key)
    if not isinstance(value, Tensor) or value.layout is not torch.strided or value.is_meta:
        return None
    return Spec(value.dtype, tuple(value.shape))


def get_float_spec(tensors: Mapping[str, Any], key: str) -> Spec | None:
    """Return dtype and shape of a dense floating or complex tensor; None for anything else."""
    spec = get_dense_spec(tensors, key)
    if spec is None or not (spec.dtype.is_floating_point or spec.dtype.is_complex):
        return None
    return spec


def require_finite(key: str, tensor: Tensor) -> Tensor:
    """Return ``tensor``; raise a CheckpointError that names ``key`` if it holds NaN or infinity."""
    if not is_finite(tensor):
        values = _take_values(tensor)
        raise CheckpointError(
            f"'{key}' is NaN or infinite in {int((~torch.isfinite(values)).sum())} of "
            f"{format_count(values.numel(), 'value')}"
        )
    return tensor


def is_finite(tensor: Tensor) -> bool:
    """Whether all values are finite; unlike `torch.isfinite`, no copy is made."""
    if not tensor.dtype.is_floating_point and not tensor.dtype.is_complex:
        return True
    values = _take_values(tensor)
    parts = torch.view_as_real(values.resolve_conj()) if values.is_complex() else values
    # If a value is NaN or infinite, so is the smallest or the largest one.
    return not parts.numel() or all(map(math.isfinite, map(float, torch.aminmax(parts))))


def _take_values(tensor: Tensor) -> Tensor:
    """Return the values that are stored, of a sparse tensor too; float8 as float32, to compare."""
    values = tensor.detach()
    if values.layout is not torch.strided:
        values = values._values() if values.layout is torch.sparse_coo else values.values()
    return values.float() if values.dtype.itemsize == 1 else values


def align_memory(tensor: Tensor) -> Tensor:
    """Return ``tensor``, copied if its memory is not aligned as torch's own.

    Values in a mapped file can lie at any address. For such memory torch's matrix products take
    another path, whose last bits differ from those of the network.
    """
    return tensor if tensor.data_ptr() % _ALIGNMENT == 0 else tensor.clone()
