"""Tensors in pieces, as several ranks wrote them, and safetensors files that hold such pieces.

Where the pieces of a tensor lie is checked before any is read: a piece that is absent would
leave memory as it happened to be, and that would pass for a weight.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..text import quote_name
from .lazy_tensors import LazyTensors, Spec
from .pickle_globals import is_shape
from .safetensors_file import SHARDING_INFO, SafetensorsFiles


@dataclass(frozen=True)
class Piece:
    """A block of a tensor.

    Attributes:
        start: where it begins in the tensor.
        shape: its own shape.
        read: returns it.
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


def read_sharded_safetensors(folder: Path, paths: Iterable[Path]) -> LazyTensors | None:
    """Return the tensors of files that HuggingFaceStorageWriter wrote, one for each rank.

    Args:
        folder: where they are, for messages.
        paths: the safetensors files in it.

    Returns:
        The tensors; None if these are files of whole tensors.

    Raises:
        CheckpointError: if a file is damaged, or a tensor not covered by its pieces.
    """
    files = SafetensorsFiles(list(paths))
    places = {path: texts.get(SHARDING_INFO) for path, texts in files.texts.items()}
    if not any(places.values()):
        return None
    what = f"folder {quote_name(folder)}"
    pieces: dict[str, list[Piece]] = {}
    dtypes: dict[str, set[torch.dtype]] = {}
    for path, text in places.items():
        if text is None:
            raise damaged(what, f"{quote_name(path.name)} does not say what its pieces are of")
        starts = _parse_starts(text, files.specs[path], what, path)
        for name, spec in files.specs[path].items():
            read = partial(files.read, path, name)
            pieces.setdefault(name, []).append(Piece(starts[name], spec.shape, read))
            dtypes.setdefault(name, set()).add(spec.dtype)
    sharded = {}
    for name, parts in pieces.items():
        if len(dtypes[name]) > 1 or len({len(part.shape) for part in parts}) > 1:
            raise damaged(what, f"the pieces of {quote_name(name)} differ in dtype or dimensions")
        ends = ([a + n for a, n in zip(p.start, p.shape, strict=True)] for p in parts)
        shape = tuple(map(max, zip(*ends, strict=True)))
        spec = Spec(dtypes[name].pop(), shape)
        sharded[name] = require_covered(Sharded(spec, tuple(parts)), name, what)
    specs = {name: one.spec for name, one in sharded.items()}
    return LazyTensors(specs, lambda name: sharded[name].read())


def _parse_starts(
    text: str, specs: Mapping[str, Spec], what: str, path: Path
) -> dict[str, tuple[int, ...]]:
    try:
        given = json.loads(text)
        starts = {name: as_shape(given[name]["saved_offsets"]) for name in specs}
    except (ValueError, KeyError, TypeError, RecursionError):
        starts = {}
    found = {}
    for name, spec in specs.items():
        start = starts.get(name)
        if start is None or len(start) != len(spec.shape):
            raise damaged(
                what, f"{quote_name(path.name)} does not say where its {quote_name(name)} begins"
            )
        found[name] = start
    return found


def require_covered(sharded: Sharded, name: str, what: str) -> Sharded:
    """Return ``sharded`` if its pieces are its whole, each element once.

    Pieces inside the tensor that do not overlap cover it exactly where they have as many
    elements as it has.

    Raises:
        CheckpointError: if an element is in no piece, or in several.
    """
    shape = sharded.spec.shape
    pieces = [piece for piece in sharded.pieces if math.prod(piece.shape)]
    for piece in pieces:
        if any(a + n > m for a, n, m in zip(piece.start, piece.shape, shape, strict=True)):
            raise damaged(
                what,
                f"a piece of {quote_name(name)} ends outside of its shape {list(shape)}",
            )
    # Along the dimension that is cut most, few pieces lie beside each other.
    cut = max(range(len(shape)), key=lambda d: len({p.start[d] for p in pieces}), default=None)
    if cut is not None:
        pieces.sort(key=lambda piece: piece.start[cut])
    beside: list[Piece] = []
    for piece in pieces:
        if cut is not None:
            beside = [p for p in beside if p.start[cut] + p.shape[cut] > piece.start[cut]]
        if any(_overlap(piece, other) for other in beside):
            raise damaged(what, f"pieces of {quote_name(name)} overlap")
        beside.append(piece)
    there = sum(math.prod(piece.shape) for piece in pieces)
    if there != math.prod(shape):
        raise damaged(
            what,
            f"the pieces of {quote_name(name)} hold {there} of its {math.prod(shape)} elements",
        )
    return sharded


def _overlap(one: Piece, other: Piece) -> bool:
    return all(
        a < b + m and b < a + n
        for a, n, b, m in zip(one.start, one.shape, other.start, other.shape, strict=True)
    )


def as_shape(value: Any) -> tuple[int, ...] | None:
    """Return sizes or offsets from a file, or None if these are none."""
    return tuple(value) if is_shape(value) else None


def damaged(what: str, reason: str) -> CheckpointError:
    """Return the error about a folder whose records or files cannot be right."""
    return CheckpointError(f"{what} is damaged or incomplete: {reason}")
