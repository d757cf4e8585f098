"""Read and write safetensors one tensor at a time: single files, and shards with an index."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import CheckpointError
from ..files import open_regular, require_regular
from ..text import join_lines, quote_name, quote_names
from .first_bytes import read_head, refuse_other_format
from .lazy_tensors import MOST_DIMS, Entry, LazyTensors, Spec

# A key in the header of the files of single ranks, as HuggingFaceStorageWriter writes them.
SHARDING_INFO = "DCP_SHARDING_INFO"
_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    **({"F8_E8M0": torch.float8_e8m0fnu} if hasattr(torch, "float8_e8m0fnu") else {}),  # from 2.7
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "C64": torch.complex64,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}

# A file is opened anew after so many bytes: what was read stays mapped until it is closed.
_REOPEN_AFTER = 2**26
_INDEX_BYTES = 2**27  # more of an index is not read
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
# The order of dtypes in a file of safetensors' own writer, which puts the last one first.
_RANK = {dtype: rank for rank, dtype in enumerate(_DTYPES.values())}
_PIECE = 2**24  # bytes that are written at once


class SafetensorsFiles:
    """Safetensors files, one of which is open at a time.

    Attributes:
        texts: the metadata in the header of each file.
        specs: dtype and shape of each tensor of each file.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self.texts: dict[Path, Mapping[str, str]] = {}
        self.specs: dict[Path, dict[str, Spec]] = {}
        self._open: tuple[Path, Any] | None = None
        self._read = 0
        for path in paths:
            handle = _open(path)
            self.texts[path] = dict(handle.metadata() or {})
            self.specs[path] = {name: _read_spec(handle, path, name) for name in handle.keys()}  # noqa: SIM118

    def read(self, path: Path, name: str) -> Tensor:
        """Return one tensor of one file."""
        if self._open is None or self._open[0] != path or self._read > _REOPEN_AFTER:
            self._open, self._read = (path, _open(path)), 0
        self._read += self.specs[path][name].nbytes
        tensor: Tensor = self._open[1].get_tensor(name)
        return tensor


def read_safetensors(path: Path) -> tuple[LazyTensors, Mapping[str, str]]:
    """Return the tensors of one file, and the texts in its header.

    Raises:
        CheckpointError: if it is damaged, or holds the part of one rank.
    """
    files = SafetensorsFiles([path])
    if SHARDING_INFO in files.texts[path]:
        raise CheckpointError(
            f"{quote_name(path)} is one rank's part of a checkpoint, and its tensors may be "
            f"pieces; give its folder {quote_name(path.parent)} instead"
        )
    return LazyTensors(files.specs[path], lambda name: files.read(path, name)), files.texts[path]


def read_safetensors_index(index: Path) -> tuple[LazyTensors, Mapping[str, str]]:
    """Return the tensors of the shards that an index lists, and the texts of the first one.

    Raises:
        CheckpointError: if the index or a shard is damaged or absent.
    """
    places = read_index(index)
    files = SafetensorsFiles(dict.fromkeys(places.values()))
    for name, path in places.items():
        if name not in files.specs[path]:
            raise report_missing_tensor(path, name)
    specs = {name: files.specs[path][name] for name, path in places.items()}
    texts = next((texts for texts in files.texts.values() if texts), {})
    return LazyTensors(specs, lambda name: files.read(places[name], name)), texts


def read_index(index: Path) -> dict[str, Path]:
    """Return the shard of each tensor that an index lists.

    Example::

        {"metadata": {}, "weight_map": {"head.weight": "model-00001-of-00002.safetensors"}}

    Raises:
        CheckpointError: if it is no index, or lists shards that are absent or no regular files.
    """
    kind = ".bin" if index.name.endswith(".bin.index.json") else "safetensors"
    try:
        with open_regular(index) as file:
            weights = json.loads(file.read(_INDEX_BYTES))["weight_map"]
        files = {str(name): index.with_name(Path(file).name) for name, file in weights.items()}
    except OSError as error:
        raise CheckpointError(f"cannot read {quote_name(index)}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{quote_name(index)} is no index of {kind} shards: it holds no 'weight_map'"
        ) from error
    _require_shards(index, files.values())
    return files


def _require_shards(index: Path, paths: Collection[Path]) -> None:
    """Raise if a shard that ``index`` lists is absent, or a folder, pipe or device."""
    # os.path also takes a name that is impossible, such as one that is too long.
    for is_sound, fault in (
        (os.path.exists, "shards that are absent"),
        (os.path.isfile, "what is no regular file"),
    ):
        if wrong := sorted({path.name for path in paths if not is_sound(path)}):
            raise CheckpointError(f"{quote_name(index)} lists {fault}: {quote_names(wrong)}")


def report_missing_tensor(path: Path, name: str) -> CheckpointError:
    """Return the error for a shard that lacks a tensor which its index lists for it."""
    return CheckpointError(f"{quote_name(path)} lacks {quote_name(name)}, which its index promises")


def _read_spec(handle: Any, path: Path, name: str) -> Spec:
    try:
        part = handle.get_slice(name)
        code, shape = part.get_dtype(), tuple(part.get_shape())
    except Exception as error:  # for a dtype that safetensors itself does not know
        raise CheckpointError(
            f"{quote_name(path)}: safetensors cannot read {quote_name(name)}: "
            f"{join_lines(str(error))}"
        ) from error
    if code not in _DTYPES:
        raise CheckpointError(
            f"{quote_name(path)}: {quote_name(name)} has the dtype {quote_name(code)}, which is "
            "not supported"
        )
    if len(shape) > MOST_DIMS:
        raise CheckpointError(
            f"{quote_name(path)}: {quote_name(name)} has {len(shape)} dimensions, and torch "
            f"knows at most {MOST_DIMS}"
        )
    return Spec(_DTYPES[code], shape)


def _open(path: Path) -> Any:
    try:
        require_regular(path)
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError, ValueError) as error:
        refuse_other_format(path, read_head(path))
        raise CheckpointError(
            f"{quote_name(path)} is damaged or truncated: safetensors cannot read it "
            f"({join_lines(str(error))})"
        ) from error


def write_safetensors(
    folder: Path,
    name: str,
    entries: Mapping[str, Entry],
    texts: Mapping[str, str],
    max_shard_size: int | None,
    written: Callable[[str], None],
) -> list[Path]:
    """Write ``entries`` into ``folder`` and return the files, an index last.

    They are written to one file ``name``. If they take more than ``max_shard_size`` bytes, they are
    written to ``<stem>-00001-of-00003.safetensors`` and so on, with ``<name>.index.json``. A tensor
    larger than that has a shard of its own. Only one tensor is in memory at any time.

    Args:
        folder: where to write.
        name: name of the file, ending in ``.safetensors``.
        entries: the tensors.
        texts: the metadata for the headers.
        max_shard_size: in bytes; None for one file.
        written: called with the name of each tensor that is written.

    Raises:
        CheckpointError: if an entry is no dense tensor, or has a dtype that safetensors lacks.
        OSError: if it cannot be written.
    """
    specs = {key: _require_storable(key, entry) for key, entry in entries.items()}
    shards = _split_shards(specs, max_shard_size)
    if len(shards) == 1:
        _write(folder / name, shards[0], specs, entries, texts, written)
        return [folder / name]
    files, weight_map = [], {}
    for number, keys in enumerate(shards, 1):
        shard = name_shard(name, number, len(shards))
        _write(folder / shard, keys, specs, entries, texts, written)
        files.append(folder / shard)
        weight_map.update(dict.fromkeys(keys, shard))
    index = {
        "metadata": {"total_size": sum(spec.nbytes for spec in specs.values())},
        "weight_map": dict(sorted(weight_map.items())),
    }
    files.append(folder / f"{name}.index.json")
    files[-1].write_text(json.dumps(index, indent=2) + "\n", "utf-8")
    return files


def name_shard(name: str, number: int, count: int) -> str:
    """Return ``net-00001-of-00003.safetensors`` for the first of three of ``net.safetensors``."""
    return f"{name.removesuffix('.safetensors')}-{number:05d}-of-{count:05d}.safetensors"


def find_stale_shards(files: Sequence[Path]) -> list[Path]:
    """Return the shards of an earlier conversion that no index will name once ``files`` are there.

    A shard counts if the old index lists it and its name is that of a shard of the same target:
    no other file is removed because an index says so.
    """
    index = files[-1]
    if len(files) == 1 or not index.exists():
        return []
    try:
        listed = set(read_index(index).values())
    except CheckpointError:
        return []
    stem = re.escape(index.name.removesuffix(".safetensors.index.json"))
    is_shard = re.compile(rf"{stem}-\d{{5}}-of-\d{{5}}\.safetensors").fullmatch
    return sorted(path for path in listed.difference(files) if is_shard(path.name))


def require_unambiguous(target: Path, made: list[Path]) -> None:
    """Raise if an old single file would lie beside a new index, or an old index beside a new file.

    A reader takes one of the two, and that could be the old one.

    Args:
        target: the file that was asked for, ``net.safetensors``.
        made: what `write_safetensors` returned.

    Raises:
        CheckpointError: naming what is in the way.
    """
    index = target.with_name(f"{target.name}.index.json")
    stale = index if len(made) == 1 else target
    if target.suffix == ".safetensors" and os.path.lexists(stale):
        raise CheckpointError(
            f"'{stale}' is there and would contradict the new "
            f"{'file' if len(made) == 1 else 'shards'}; remove it or choose another name"
        )


def _require_storable(key: str, entry: Entry) -> Spec:
    try:
        key.encode()
    except UnicodeEncodeError as error:
        raise CheckpointError(
            f"safetensors has names in UTF-8 alone, and {quote_name(key)} is not; write a .pt"
        ) from error
    if entry.spec is None:
        value = entry.read()
        what = "sparse" if isinstance(value, Tensor) else type(value).__name__
        raise CheckpointError(
            f"safetensors holds dense tensors only, and {quote_name(key)} is {what}; write a .pt"
        )
    if entry.spec.dtype not in _CODES:
        raise CheckpointError(
            f"safetensors has no dtype for {quote_name(key)}, which is {entry.spec.dtype}; "
            "write a .pt"
        )
    return entry.spec


def _split_shards(specs: Mapping[str, Spec], limit: int | None) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for key, spec in specs.items():
        if limit is not None and shards[-1] and size + spec.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(key)
        size += spec.nbytes
    return shards


def _write(
    path: Path,
    keys: list[str],
    specs: Mapping[str, Spec],
    entries: Mapping[str, Entry],
    texts: Mapping[str, str],
    written: Callable[[str], None],
) -> None:
    # The order of safetensors' own writer: it keeps every tensor aligned to its dtype.
    ordered = sorted(keys, key=lambda key: (-_RANK[specs[key].dtype], key))
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **texts}}
    start = 0
    for key in ordered:
        spec = specs[key]
        end = start + spec.nbytes
        header[key] = {
            "dtype": _CODES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for key in ordered:
            _write_bytes(file, _read_entry(key, entries[key], specs[key]))
            written(key)


def _read_entry(key: str, entry: Entry, spec: Spec) -> Tensor:
    """Return the tensor of ``entry``; raise a CheckpointError if it has another dtype or shape.

    The caller must not assign it to a variable, which would keep it in memory while the next
    tensor is made.
    """
    value: Tensor = entry.read()
    if Spec(value.dtype, tuple(value.shape)) != spec:
        raise CheckpointError(
            f"'{key}' came out as {value.dtype} {list(value.shape)}, not as "
            f"{spec.dtype} {list(spec.shape)}"
        )
    return value


def _write_bytes(file: Any, tensor: Tensor) -> None:
    dense = tensor.detach().resolve_conj().resolve_neg().contiguous().flatten()
    if dense.numel():
        data = dense.view(torch.uint8).numpy().data
        for start in range(0, len(data), _PIECE):
            file.write(data[start : start + _PIECE])
