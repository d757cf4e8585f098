"""Tensors of safetensors files, read one at a time when they are asked for."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import CheckpointError
from ..text import quote_names

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
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


@dataclass(frozen=True)
class Spec:
    """What is known of a tensor without reading it."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size of the values."""
        return math.prod(self.shape) * self.dtype.itemsize


class LazyTensors(Mapping[str, Tensor]):
    """Tensors by name, in the order of the files; only the one asked for is in memory.

    Attributes:
        specs: dtype and shape of each.
        file_metadata: the texts that the first file's header holds beside the tensors.
    """

    def __init__(self, files: Mapping[str, Path]) -> None:
        self._files = files
        self._open: tuple[Path, Any] | None = None
        self._read = 0
        self.specs: dict[str, Spec] = {}
        self.file_metadata: dict[str, str] = {}
        for path in dict.fromkeys(files.values()):
            handle = _open(path)
            self.file_metadata = self.file_metadata or dict(handle.metadata() or {})
            present = set(handle.keys())
            for name in (name for name, home in files.items() if home == path):
                if name not in present:
                    raise CheckpointError(f"'{path}' lacks '{name}', which its index promises")
                part = handle.get_slice(name)
                self.specs[name] = Spec(DTYPES[part.get_dtype()], tuple(part.get_shape()))

    @classmethod
    def from_file(cls, path: Path) -> LazyTensors:
        """Return the tensors of one file.

        Raises:
            CheckpointError: if it is damaged.
        """
        return cls({name: path for name in _open(path).keys()})  # noqa: SIM118

    @classmethod
    def from_index(cls, index: Path) -> LazyTensors:
        """Return the tensors of the shards that an index lists.

        Raises:
            CheckpointError: if the index or a shard is damaged or absent.
        """
        try:
            weights = json.loads(index.read_text("utf-8"))["weight_map"]
            files = {str(name): index.with_name(Path(file).name) for name, file in weights.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"'{index}' is no index of safetensors shards: it holds no 'weight_map'"
            ) from error
        absent = sorted({path.name for path in files.values() if not path.is_file()})
        if absent:
            raise CheckpointError(f"'{index}' lists shards that are absent: {quote_names(absent)}")
        return cls(files)

    def __getitem__(self, name: str) -> Tensor:
        path = self._files[name]
        if self._open is None or self._open[0] != path or self._read > _REOPEN_AFTER:
            self._open, self._read = (path, _open(path)), 0
        self._read += self.specs[name].nbytes
        tensor: Tensor = self._open[1].get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def index_in(folder: Path) -> Path | None:
    """Return the one index in ``folder``, if there is exactly one."""
    found = list(folder.glob("*.safetensors.index.json"))
    return found[0] if len(found) == 1 else None


def spec_of(tensors: Mapping[str, Any], name: str) -> Spec:
    """Return dtype and shape of one tensor, without reading it where that is possible."""
    if isinstance(tensors, LazyTensors):
        return tensors.specs[name]
    tensor = tensors[name]
    return Spec(tensor.dtype, tuple(tensor.shape))


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"'{path}' is damaged or truncated: safetensors cannot read it ({error})"
        ) from error
