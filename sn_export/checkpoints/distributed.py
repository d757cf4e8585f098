"""Read and write folders of torch.distributed.checkpoint in one process, tensor by tensor."""

from __future__ import annotations

import io
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.state_dict_saver import save

from ..errors import CheckpointError
from ..files import find_disk_error, open_regular
from ..text import describe_type, format_count, quote_name
from .content import replace_at
from .lazy_tensors import (
    Entry,
    LazyTensors,
    Piece,
    Sharded,
    Spec,
    as_shape,
    is_count,
    report_damage,
    require_covered,
)
from .torch_file import read_pickle, read_torch_part

_METADATA = ".metadata"
_DEPTH = 32  # of nested keys


def is_distributed(folder: Path) -> bool:
    """Whether ``folder`` holds a checkpoint of torch.distributed.checkpoint."""
    return (folder / _METADATA).is_file()


def read_distributed(folder: Path, trust_pickle: bool, unread: set[str]) -> Any:
    """Return the content of a distributed checkpoint, nested as it was saved.

    Tensors are read when they are accessed; everything else is read at once.

    Args:
        folder: the folder with '.metadata' and the files that this names.
        trust_pickle: let pickled values run code.
        unread: receives the names of the classes and functions that were left unread.

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
            raise report_damage(what, "it names something by no text")
        if isinstance(entry, TensorStorageMetadata):
            leaves[name] = _find_pieces(files, name, entry)
        elif isinstance(entry, BytesStorageMetadata):
            source = f"{what}: {quote_name(name)}"
            with files.open(MetadataIndex(name)) as part:
                leaves[name] = read_torch_part(part, source, trust_pickle, unread)
        else:
            raise report_damage(what, f"{quote_name(name)} is neither a tensor nor bytes")
    return _nest(leaves, metadata.planner_data, what)


def _read_metadata(folder: Path, what: str, trust_pickle: bool) -> Metadata:
    with open_regular(folder / _METADATA) as file:
        metadata = read_pickle(file, what, _METADATA, trust_pickle)
    if not isinstance(metadata, Metadata):
        raise report_damage(what, f"'{_METADATA}' holds {describe_type(metadata)}, not its records")
    parts = (getattr(metadata, "state_dict_metadata", None), metadata.storage_data)
    if not all(isinstance(part, dict) for part in parts):
        raise report_damage(what, f"'{_METADATA}' does not say what is in it")
    return metadata


class _Files:
    """The files of a folder, with the place of each piece in them."""

    def __init__(self, folder: Path, what: str, places: Mapping[Any, Any]) -> None:
        self._folder = folder.resolve()
        self.what = what
        self._places = places
        self._sizes: dict[Path, int] = {}

    def require(self, index: MetadataIndex, least: int = 1) -> None:
        """Raise unless a file of the folder holds the whole piece of ``index``.

        Raises:
            CheckpointError: naming the file, if it is absent or too short, or if the piece has
                fewer bytes than ``least``.
        """
        path, offset, length = self._find_place(index)
        name = quote_name(path.relative_to(self._folder))
        if path not in self._sizes:
            if not path.exists():
                raise report_damage(self.what, f"{name} is absent")
            if not path.is_file():
                raise report_damage(self.what, f"{name} is no regular file")
            self._sizes[path] = path.stat().st_size
        size = self._sizes[path]
        if not size:
            raise report_damage(self.what, f"{name} is empty")
        if offset + length > size or length < least:
            raise report_damage(
                self.what,
                f"{name} has {format_count(size, 'byte')}, and {quote_name(index.fqn)} should end "
                f"at {offset + max(length, least)}",
            )

    @contextmanager
    def open(self, index: MetadataIndex) -> Iterator[BinaryIO]:
        """Yield one piece as a file of its own, without reading it into memory."""
        self.require(index)
        path, offset, length = self._find_place(index)
        with open_regular(path) as file, io.BufferedReader(_Part(file, offset, length)) as part:
            yield part

    def _find_place(self, index: MetadataIndex) -> tuple[Path, int, int]:
        info = self._places.get(index)
        relative = getattr(info, "relative_path", None)
        offset, length = (getattr(info, name, None) for name in ("offset", "length"))
        if type(relative) is not str or not is_count(offset) or not is_count(length):
            raise report_damage(self.what, f"it does not say where {quote_name(index.fqn)} is")
        if getattr(info, "transform_descriptors", None):
            raise CheckpointError(
                f"{self.what} holds {quote_name(index.fqn)} compressed by an extension, which is "
                "not supported; save it without"
            )
        try:
            path = (self._folder / relative).resolve()
        except (OSError, ValueError, RuntimeError) as error:
            raise report_damage(self.what, f"{quote_name(relative)} is no path") from error
        if not path.is_relative_to(self._folder) or path == self._folder:
            raise report_damage(self.what, f"{quote_name(relative)} is not inside of it")
        return path, offset, length


class _Part(io.RawIOBase):
    """A part of a file that reads like a whole file."""

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


def _find_pieces(files: _Files, name: str, entry: TensorStorageMetadata) -> Sharded:
    dtype = getattr(getattr(entry, "properties", None), "dtype", None)
    shape = as_shape(getattr(entry, "size", None))
    chunks = getattr(entry, "chunks", None)
    if not isinstance(dtype, torch.dtype) or shape is None or not isinstance(chunks, list):
        raise report_damage(files.what, f"{quote_name(name)} has no dtype, shape or pieces")
    pieces = []
    for chunk in chunks:
        start, size = (as_shape(getattr(chunk, part, None)) for part in ("offsets", "sizes"))
        if start is None or size is None or not len(start) == len(size) == len(shape):
            raise report_damage(files.what, f"a piece of {quote_name(name)} has no place")
        index, spec = MetadataIndex(name, start), Spec(dtype, size)
        if spec.nbytes:
            # Values are stored uncompressed, so the file must have as many bytes as the tensor.
            files.require(index, spec.nbytes)
        pieces.append(Piece(start, size, partial(_read_piece, files, index, spec)))
    return require_covered(Sharded(Spec(dtype, shape), tuple(pieces)), name, files.what)


def _read_piece(files: _Files, index: MetadataIndex, spec: Spec) -> Tensor:
    if not math.prod(spec.shape):
        return torch.empty(spec.shape, dtype=spec.dtype)
    # Torch's FileSystemReader unpickles with a list of its own, and copies into a second tensor.
    # Here the one closed list decides for every format, and a piece is in memory once.
    what = f"{files.what}: {quote_name(index.fqn)}"
    with files.open(index) as part:
        value = read_torch_part(part, what, False, set())
    if not isinstance(value, Tensor) or Spec(value.dtype, tuple(value.shape)) != spec:
        raise report_damage(
            files.what, f"a piece of {quote_name(index.fqn)} is not what it should be"
        )
    if value.layout != torch.strided or value.device.type != "cpu":
        raise report_damage(files.what, f"a piece of {quote_name(index.fqn)} holds no values")
    return value.detach()


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
            raise report_damage(what, f"the place of {quote_name(name)} is no list of keys")
        node: Any = root
        for part in path[:-1]:
            node = node.setdefault(part, _Node()) if isinstance(node, _Node) else None
        if not isinstance(node, _Node) or path[-1] in node:
            raise report_damage(what, f"{quote_name(name)} is where another value is")
        node[path[-1]] = leaf
    return _finish(root)


class _Node(dict[Any, Any]):
    """A mapping on the way to a value. Its class tells it from a mapping that is a saved value."""


def _finish(node: _Node) -> Any:
    """Return ``node`` as a list if its keys are 0, 1, 2 ..., or as a mapping with lazy tensors."""
    values = {k: _finish(v) if isinstance(v, _Node) else v for k, v in node.items()}
    tensors = {str(k): v for k, v in values.items() if isinstance(v, Sharded)}
    if not tensors and values and set(values) == set(range(len(values))):
        return [values[i] for i in range(len(values))]
    if not tensors:  # keys may be numbers still: those of a list with items that hold nothing
        return {str(k): v for k, v in values.items()}
    others = {str(k): v for k, v in values.items() if not isinstance(v, Sharded)}
    specs = {name: tensor.spec for name, tensor in tensors.items()}
    return LazyTensors(specs, lambda name: tensors[name].read(), others)


def write_distributed(
    folder: Path,
    content: Any,
    path: tuple[str, ...],
    entries: Mapping[str, Entry],
    written: Callable[[str], None],
) -> None:
    """Write a folder that `torch.distributed.checkpoint.load` reads, on any number of ranks.

    Torch plans with tensors on the meta device, and each value is made just before it is written.
    Every tensor has a file of its own, since torch keeps in memory whatever it writes to a file
    until that file is closed.

    Args:
        folder: the folder to make.
        content: the content of the checkpoint. Its lazy tensors are read one at a time.
        path: keys in ``content`` of the state dict that ``entries`` replace.
        entries: the values of the new state dict.
        written: called with the name of each entry once it is made.

    Raises:
        CheckpointError: if a value cannot be computed.
        OSError: if it cannot be written.
    """
    planner = _LazyPlanner()
    outlined = {
        name: planner.outline(entry, partial(written, name)) for name, entry in entries.items()
    }
    state = planner.outline_all(replace_at(content, path, outlined))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns that there is one process, as intended
            writer = FileSystemWriter(folder, single_file_per_rank=False, sync_files=False)
            # The same bytes each time: without a random name, and that of the folder of drafts.
            writer.storage_meta = lambda: None  # type: ignore[method-assign]
            # An older torch, such as 2.6, decides itself by whether there are ranks.
            alone = {"no_dist": True} if "no_dist" in signature(save).parameters else {}
            save(state, storage_writer=writer, planner=planner, **alone)
    except CheckpointException as error:  # torch's wrapper of the real error
        raised = next(iter(error.failures.values()))[0]
        raise find_disk_error(raised) or raised from error


class _LazyPlanner(DefaultSavePlanner):
    """Plans with outlines, tensors without values, and makes each value when torch writes it."""

    def __init__(self) -> None:
        super().__init__()
        self._reads: dict[int, tuple[Tensor, Callable[[], Any]]] = {}
        self._last: Tensor | None = None

    def outline(self, entry: Entry, written: Callable[[], None] = lambda: None) -> Any:
        """Return an outline of ``entry``, or its value if that is no tensor."""
        if entry.spec is None:
            return entry.read()
        outline = torch.empty(entry.spec.shape, dtype=entry.spec.dtype, device="meta")

        def read() -> Any:
            value = entry.read()
            written()
            return value

        self._reads[id(outline)] = outline, read
        return outline

    def outline_all(self, node: Any) -> Any:
        """Return ``node`` with an outline for each lazy tensor."""
        if isinstance(node, LazyTensors):
            tensors = {
                name: self.outline(Entry(spec, partial(node.__getitem__, name)))
                for name, spec in node.specs.items()
            }
            return tensors | {name: self.outline_all(value) for name, value in node.others.items()}
        if type(node) is dict:
            return {name: self.outline_all(value) for name, value in node.items()}
        return list(map(self.outline_all, node)) if type(node) is list else node

    def lookup_object(self, index: MetadataIndex) -> Any:
        """Return the value of ``index``; torch calls this for each value that it writes."""
        value = super().lookup_object(index)
        outline, read = self._reads.get(id(value), (None, None))
        if read is None or outline is not value:
            return value
        if self._last is not None and self._last.untyped_storage().resizable():
            # The last value is written, but torch's loop still refers to it: free its memory.
            self._last.untyped_storage().resize_(0)
        self._last = read()
        return self._last
