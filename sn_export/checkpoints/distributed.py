"""Checkpoints in pieces that several ranks wrote: read in one process, one tensor at a time.

Two writers of torch.distributed.checkpoint are known: its own folders, in which '.metadata' says
where each piece is, and the safetensors of HuggingFaceStorageWriter, each of which says so in
its header. Where the pieces of a tensor lie is checked before any is read: a piece that is
absent would leave memory as it happened to be, and that would pass for a weight.
"""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from ..errors import CheckpointError
from ..files import open_regular
from ..text import quote_name
from .lazy_tensors import SHARDING_INFO, LazyTensors, SafetensorsFiles, Spec
from .pickle_globals import is_count, is_shape
from .torch_file import read_pickle, read_torch_part

_METADATA = ".metadata"
_DEPTH = 32  # of nested keys


@dataclass(frozen=True)
class _Piece:
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
class _Sharded:
    """A tensor in pieces, which cover it without overlap."""

    spec: Spec
    pieces: tuple[_Piece, ...]

    def read(self) -> Tensor:
        """Return the whole tensor."""
        if len(self.pieces) == 1:
            return self.pieces[0].read()
        whole = torch.empty(self.spec.shape, dtype=self.spec.dtype)
        for piece in self.pieces:
            place = zip(piece.start, piece.shape, strict=True)
            whole[tuple(slice(start, start + size) for start, size in place)] = piece.read()
        return whole


def is_distributed(folder: Path) -> bool:
    """Whether ``folder`` holds a checkpoint of torch.distributed.checkpoint."""
    return (folder / _METADATA).is_file()


def read_distributed(folder: Path, trust_pickle: bool, unread: set[str]) -> Any:
    """Return the content of a distributed checkpoint, nested as it was saved.

    Tensors are read when they are asked for; everything else is read at once.

    Args:
        folder: it holds '.metadata' and the files that this names.
        trust_pickle: let pickled values run code.
        unread: receives the names of the classes of which a value was left unread.

    Raises:
        CheckpointError: if it is damaged, a tensor is not covered by its pieces, or a value
            wants to run code and is not trusted.
    """
    what = f"folder {quote_name(folder)}"
    metadata = _read_metadata(folder, what, trust_pickle)
    files = _Files(folder, what, metadata.storage_data)
    leaves: dict[str, Any] = {}
    for name, entry in metadata.state_dict_metadata.items():
        if type(name) is not str:
            raise _damaged(what, "it names something by no text")
        if isinstance(entry, TensorStorageMetadata):
            leaves[name] = _sharded(files, name, entry)
        elif isinstance(entry, BytesStorageMetadata):
            source = f"{what}: {quote_name(name)}"
            with files.open(MetadataIndex(name)) as part:
                leaves[name] = read_torch_part(part, source, trust_pickle, unread)
        else:
            raise _damaged(what, f"{quote_name(name)} is neither a tensor nor bytes")
    return _nest(leaves, metadata.planner_data, what)


def _read_metadata(folder: Path, what: str, trust_pickle: bool) -> Metadata:
    with open_regular(folder / _METADATA) as file:
        metadata = read_pickle(file, what, _METADATA, trust_pickle)
    if not isinstance(metadata, Metadata):
        raise _damaged(what, f"'{_METADATA}' holds a {type(metadata).__name__}, not its records")
    parts = (getattr(metadata, "state_dict_metadata", None), metadata.storage_data)
    if not all(isinstance(part, dict) for part in parts):
        raise _damaged(what, f"'{_METADATA}' does not say what is in it")
    return metadata


class _Files:
    """The files of a folder, and where in them each piece is."""

    def __init__(self, folder: Path, what: str, places: Mapping[Any, Any]) -> None:
        self._folder = folder.resolve()
        self.what = what
        self._places = places
        self._sizes: dict[Path, int] = {}

    def require(self, index: MetadataIndex, least: int = 1) -> None:
        """Raise unless the piece of ``index`` is in a file of the folder, whole.

        Raises:
            CheckpointError: naming the file.
        """
        path, offset, length = self._place(index)
        name = quote_name(path.relative_to(self._folder))
        if path not in self._sizes:
            if not path.exists():
                raise _damaged(self.what, f"{name} is absent")
            if not path.is_file():
                raise _damaged(self.what, f"{name} is no regular file")
            self._sizes[path] = path.stat().st_size
        size = self._sizes[path]
        if not size:
            raise _damaged(self.what, f"{name} is empty")
        if offset + length > size or length < least:
            raise _damaged(
                self.what,
                f"{name} has {size} bytes, and {quote_name(index.fqn)} should end at "
                f"{offset + max(length, least)}",
            )

    @contextmanager
    def open(self, index: MetadataIndex) -> Iterator[BinaryIO]:
        """Yield one piece as a file of its own, which is not read into memory for that."""
        self.require(index)
        path, offset, length = self._place(index)
        with open_regular(path) as file, io.BufferedReader(_Part(file, offset, length)) as part:
            yield part

    def _place(self, index: MetadataIndex) -> tuple[Path, int, int]:
        info = self._places.get(index)
        relative = getattr(info, "relative_path", None)
        offset, length = (getattr(info, name, None) for name in ("offset", "length"))
        if type(relative) is not str or not is_count(offset) or not is_count(length):
            raise _damaged(self.what, f"it does not say where {quote_name(index.fqn)} is")
        if getattr(info, "transform_descriptors", None):
            raise CheckpointError(
                f"{self.what} holds {quote_name(index.fqn)} compressed by an extension, which is "
                "not supported; save it without"
            )
        try:
            path = (self._folder / relative).resolve()
        except (OSError, ValueError, RuntimeError) as error:
            raise _damaged(self.what, f"{quote_name(relative)} is no path") from error
        if not path.is_relative_to(self._folder) or path == self._folder:
            raise _damaged(self.what, f"{quote_name(relative)} is not inside of it")
        return path, offset, length


class _Part(io.RawIOBase):
    """A part of a file, read as if it were all of it."""

    def __init__(self, file: BinaryIO, start: int, size: int) -> None:
        self._file, self._start, self._size = file, start, size
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        before = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = max(before + offset, 0)
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)[: max(self._size - self._position, 0)]
        self._file.seek(self._start + self._position)
        count: int = self._file.readinto(view)  # type: ignore[attr-defined]
        self._position += count
        return count


def _sharded(files: _Files, name: str, entry: TensorStorageMetadata) -> _Sharded:
    dtype = getattr(getattr(entry, "properties", None), "dtype", None)
    shape = _as_shape(getattr(entry, "size", None))
    chunks = getattr(entry, "chunks", None)
    if not isinstance(dtype, torch.dtype) or shape is None or not isinstance(chunks, list):
        raise _damaged(files.what, f"{quote_name(name)} has no dtype, shape or pieces")
    pieces = []
    for chunk in chunks:
        start, size = (_as_shape(getattr(chunk, part, None)) for part in ("offsets", "sizes"))
        if start is None or size is None or not len(start) == len(size) == len(shape):
            raise _damaged(files.what, f"a piece of {quote_name(name)} has no place")
        index, spec = MetadataIndex(name, start), Spec(dtype, size)
        if spec.nbytes:
            # The bytes are there uncompressed, and so bound what will be in memory.
            files.require(index, spec.nbytes)
        pieces.append(_Piece(start, size, partial(_read_piece, files, index, spec)))
    return _covered(_Sharded(Spec(dtype, shape), tuple(pieces)), name, files.what)


def _read_piece(files: _Files, index: MetadataIndex, spec: Spec) -> Tensor:
    if not math.prod(spec.shape):
        return torch.empty(spec.shape, dtype=spec.dtype)
    what = f"{files.what}: {quote_name(index.fqn)}"
    with files.open(index) as part:
        value = read_torch_part(part, what, False, set())
    if not isinstance(value, Tensor) or Spec(value.dtype, tuple(value.shape)) != spec:
        raise _damaged(files.what, f"a piece of {quote_name(index.fqn)} is not what it should be")
    if value.layout != torch.strided or value.device.type != "cpu":
        raise _damaged(files.what, f"a piece of {quote_name(index.fqn)} holds no values")
    return value.detach()


def _covered(sharded: _Sharded, name: str, what: str) -> _Sharded:
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
            raise _damaged(
                what,
                f"a piece of {quote_name(name)} ends outside of its shape {list(shape)}",
            )
    # Along the dimension that is cut most, few pieces lie beside each other.
    cut = max(range(len(shape)), key=lambda d: len({p.start[d] for p in pieces}), default=None)
    if cut is not None:
        pieces.sort(key=lambda piece: piece.start[cut])
    beside: list[_Piece] = []
    for piece in pieces:
        if cut is not None:
            beside = [p for p in beside if p.start[cut] + p.shape[cut] > piece.start[cut]]
        if any(_overlap(piece, other) for other in beside):
            raise _damaged(what, f"pieces of {quote_name(name)} overlap")
        beside.append(piece)
    there = sum(math.prod(piece.shape) for piece in pieces)
    if there != math.prod(shape):
        raise _damaged(
            what,
            f"the pieces of {quote_name(name)} hold {there} of its {math.prod(shape)} elements",
        )
    return sharded


def _overlap(one: _Piece, other: _Piece) -> bool:
    return all(
        a < b + m and b < a + n
        for a, n, b, m in zip(one.start, one.shape, other.start, other.shape, strict=True)
    )


def _as_shape(value: Any) -> tuple[int, ...] | None:
    """Return sizes or offsets from a file, or None if these are none."""
    return tuple(value) if is_shape(value) else None


def _nest(leaves: Mapping[str, Any], paths: Any, what: str) -> Any:
    """Return ``leaves`` nested as they were saved.

    Example::

        _nest({"net.w": w, "steps.0": 3}, {"net.w": ("net", "w"), "steps.0": ("steps", 0)}, "")
        # {"net": <lazy {"w": w}>, "steps": [3]}
    """
    root = _Node()
    for name, leaf in leaves.items():
        path = paths.get(name, (name,)) if isinstance(paths, dict) else (name,)
        known = type(path) is tuple and 0 < len(path) <= _DEPTH
        if not known or not all(type(part) in (str, int) for part in path):
            raise _damaged(what, f"the place of {quote_name(name)} is no list of keys")
        node: Any = root
        for part in path[:-1]:
            node = node.setdefault(part, _Node()) if isinstance(node, _Node) else None
        if not isinstance(node, _Node) or path[-1] in node:
            raise _damaged(what, f"{quote_name(name)} is where another value is")
        node[path[-1]] = leaf
    return _finish(root)


class _Node(dict[Any, Any]):
    """A mapping that paths go through; a saved value is never of this class."""


def _finish(node: _Node) -> Any:
    """Return a list where the keys number its items, or a mapping that reads its tensors later."""
    values = {k: _finish(v) if isinstance(v, _Node) else v for k, v in node.items()}
    tensors = {str(k): v for k, v in values.items() if isinstance(v, _Sharded)}
    if not tensors and values and set(values) == set(range(len(values))):
        return [values[i] for i in range(len(values))]
    if not tensors:  # of a list of which some items hold nothing, the numbers are kept as keys
        return {str(k): v for k, v in values.items()}
    others = {str(k): v for k, v in values.items() if not isinstance(v, _Sharded)}
    specs = {name: tensor.spec for name, tensor in tensors.items()}
    return LazyTensors(specs, lambda name: tensors[name].read(), others)


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
    pieces: dict[str, list[_Piece]] = {}
    dtypes: dict[str, set[torch.dtype]] = {}
    for path, text in places.items():
        if text is None:
            raise _damaged(what, f"{quote_name(path.name)} does not say what its pieces are of")
        starts = _parse_starts(text, files.specs[path], what, path)
        for name, spec in files.specs[path].items():
            read = partial(files.read, path, name)
            pieces.setdefault(name, []).append(_Piece(starts[name], spec.shape, read))
            dtypes.setdefault(name, set()).add(spec.dtype)
    sharded = {}
    for name, parts in pieces.items():
        if len(dtypes[name]) > 1 or len({len(part.shape) for part in parts}) > 1:
            raise _damaged(what, f"the pieces of {quote_name(name)} differ in dtype or dimensions")
        ends = ([a + n for a, n in zip(p.start, p.shape, strict=True)] for p in parts)
        shape = tuple(map(max, zip(*ends, strict=True)))
        spec = Spec(dtypes[name].pop(), shape)
        sharded[name] = _covered(_Sharded(spec, tuple(parts)), name, what)
    specs = {name: one.spec for name, one in sharded.items()}
    return LazyTensors(specs, lambda name: sharded[name].read())


def _parse_starts(
    text: str, specs: Mapping[str, Spec], what: str, path: Path
) -> dict[str, tuple[int, ...]]:
    try:
        given = json.loads(text)
        starts = {name: _as_shape(given[name]["saved_offsets"]) for name in specs}
    except (ValueError, KeyError, TypeError, RecursionError):
        starts = {}
    found = {}
    for name, spec in specs.items():
        start = starts.get(name)
        if start is None or len(start) != len(spec.shape):
            raise _damaged(
                what, f"{quote_name(path.name)} does not say where its {quote_name(name)} begins"
            )
        found[name] = start
    return found


def _damaged(what: str, reason: str) -> CheckpointError:
    return CheckpointError(f"{what} is damaged or incomplete: {reason}")
