"""Tensors that are read one at a time when they are asked for, and safetensors files of them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import CheckpointError
from ..files import open_regular, require_regular
from ..text import join_lines, quote_name, quote_names

# In the header of each rank's file that HuggingFaceStorageWriter did not consolidate.
SHARDING_INFO = "DCP_SHARDING_INFO"
DTYPES = {
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

# Pages that were read stay mapped, and count as memory, until the file is closed.
_REOPEN_AFTER = 2**26
_DIMS = 64  # the most that torch computes with
_INDEX_BYTES = 2**27


@dataclass(frozen=True)
class Spec:
    """What is known of a tensor without reading it."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size of the values."""
        return math.prod(self.shape) * self.dtype.itemsize


class LazyTensors(Mapping[str, Any]):
    """A mapping whose tensors are read when they are asked for; only that one is in memory.

    Attributes:
        specs: dtype and shape of each tensor.
        others: what is no tensor, such as an extra state or a nested mapping.
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


class SafetensorsFiles:
    """Safetensors files, one of which is open at a time.

    Attributes:
        texts: what the header of each holds beside the tensors.
        specs: dtype and shape of each tensor of each.
    """

    def __init__(self, paths: Iterator[Path] | list[Path]) -> None:
        self.texts: dict[Path, Mapping[str, str]] = {}
        self.specs: dict[Path, dict[str, Spec]] = {}
        self._open: tuple[Path, Any] | None = None
        self._read = 0
        for path in paths:
            handle = _open(path)
            self.texts[path] = dict(handle.metadata() or {})
            self.specs[path] = {name: _spec(handle, path, name) for name in handle.keys()}  # noqa: SIM118

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
        CheckpointError: if it is damaged, or one rank's part of a checkpoint.
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
    files = SafetensorsFiles(list(dict.fromkeys(places.values())))
    for name, path in places.items():
        if name not in files.specs[path]:
            raise lacking(path, name)
    specs = {name: files.specs[path][name] for name, path in places.items()}
    texts = next((texts for texts in files.texts.values() if texts), {})
    return LazyTensors(specs, lambda name: files.read(places[name], name)), texts


def read_index(index: Path) -> dict[str, Path]:
    """Return the shard of each tensor that an index lists.

    Example::

        {"metadata": {}, "weight_map": {"head.weight": "model-00001-of-00002.safetensors"}}

    Raises:
        CheckpointError: if it is no index, or lists shards that are absent.
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
    absent = sorted({path.name for path in files.values() if not path.is_file()})
    if absent:
        raise CheckpointError(
            f"{quote_name(index)} lists shards that are absent: {quote_names(absent)}"
        )
    return files


def lacking(path: Path, name: str) -> CheckpointError:
    """Return the error about a shard in which a tensor of its index is not."""
    return CheckpointError(f"{quote_name(path)} lacks {quote_name(name)}, which its index promises")


def is_tensor(tensors: Mapping[str, Any], name: str) -> bool:
    """Whether ``tensors[name]`` is a tensor; nothing is read to tell it."""
    if isinstance(tensors, LazyTensors):
        return name in tensors.specs
    return isinstance(tensors[name], Tensor)


def spec_of(tensors: Mapping[str, Any], name: str) -> Spec:
    """Return dtype and shape of one tensor, without reading it where that is possible."""
    if isinstance(tensors, LazyTensors):
        return tensors.specs[name]
    tensor = tensors[name]
    return Spec(tensor.dtype, tuple(tensor.shape))


def _spec(handle: Any, path: Path, name: str) -> Spec:
    try:
        part = handle.get_slice(name)
        code, shape = part.get_dtype(), tuple(part.get_shape())
    except Exception as error:  # of a dtype that safetensors itself does not know
        raise CheckpointError(
            f"{quote_name(path)}: safetensors cannot read {quote_name(name)}: "
            f"{join_lines(str(error))}"
        ) from error
    if code not in DTYPES:
        raise CheckpointError(
            f"{quote_name(path)}: {quote_name(name)} has the dtype {quote_name(code)}, which is "
            "not supported"
        )
    if len(shape) > _DIMS:
        raise CheckpointError(
            f"{quote_name(path)}: {quote_name(name)} has {len(shape)} dimensions, and torch "
            f"knows at most {_DIMS}"
        )
    return Spec(DTYPES[code], shape)


def _open(path: Path) -> Any:
    try:
        require_regular(path)
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{quote_name(path)} is damaged or truncated: safetensors cannot read it "
            f"({join_lines(str(error))})"
        ) from error
