"""Writing safetensors files one tensor at a time, whole or in shards with an index."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..text import quote_name
from .lazy_tensors import DTYPES, Spec
from .reparametrizations import Entry

_CODES = {dtype: code for code, dtype in DTYPES.items()}
# Within one size, safetensors' own writer puts larger codes first.
_RANK = {dtype: rank for rank, dtype in enumerate(DTYPES.values())}
_PIECE = 2**24


def write_safetensors(
    folder: Path,
    name: str,
    entries: Mapping[str, Entry],
    texts: Mapping[str, str],
    max_shard_size: int | None,
    written: Callable[[str], None],
) -> list[Path]:
    """Write ``entries`` into ``folder`` and return the files made.

    One file ``name``; or, if ``max_shard_size`` bytes do not hold them,
    ``<stem>-00001-of-00003.safetensors`` and so on, and ``<name>.index.json``. A tensor
    larger than that has a shard of its own. Only one tensor is in memory at any time.

    Args:
        folder: where to write.
        name: name of the file, ending in ``.safetensors``.
        entries: the tensors.
        texts: what the headers hold beside them.
        max_shard_size: in bytes; None for one file.
        written: called with the name of each tensor that is written.

    Raises:
        CheckpointError: if something is no tensor, or of a dtype unknown to safetensors.
        OSError: if it cannot be written.
    """
    specs = {key: _require_storable(key, entry) for key, entry in entries.items()}
    shards = _shards(specs, max_shard_size)
    if len(shards) == 1:
        _write(folder / name, shards[0], specs, entries, texts, written)
        return [folder / name]
    files, weight_map = [], {}
    for number, keys in enumerate(shards, 1):
        shard = shard_name(name, number, len(shards))
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


def shard_name(name: str, number: int, count: int) -> str:
    """Return ``net-00001-of-00003.safetensors`` for the first of three of ``net.safetensors``."""
    return f"{name.removesuffix('.safetensors')}-{number:05d}-of-{count:05d}.safetensors"


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


def _shards(specs: Mapping[str, Spec], limit: int | None) -> list[list[str]]:
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
            _write_bytes(file, read_entry(key, entries[key], specs[key]))
            written(key)


def read_entry(key: str, entry: Entry, spec: Spec) -> Tensor:
    """Return the tensor that ``entry`` promises; raise a CheckpointError if it is another.

    The caller must not keep it in a variable: the next one is made while that still holds it.
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
