"""Archives of numpy arrays (``.npz``), read without pickle."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from ..files import open_regular

# What compressed arrays may unpack to, in bytes, or times the size of their file.
_UNPACKED, _RATIO = 2**28, 100


def is_npz(path: Path) -> bool:
    """Whether ``path`` is a zip archive that holds numpy arrays and nothing else."""
    try:
        with open_regular(path) as file, zipfile.ZipFile(file) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return False
    return bool(names) and all(name.endswith(".npy") for name in names)


def read_npz(path: Path) -> dict[str, Tensor]:
    """Return the arrays in the file that `numpy.savez` wrote, as tensors of the same dtypes.

    Raises:
        ValueError: if it is none, an array is no numbers, or it unpacks to too much.
    """
    try:
        with open_regular(path) as file:
            too_large = _describe_excess(file)
            if not too_large:
                arrays = np.load(file, allow_pickle=False)
                return {name: _tensor(arrays[name]) for name in arrays.files}
    except Exception as error:  # numpy raises many kinds for a broken file
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"'{path}' is no .npz of numeric arrays: {reason}") from error
    raise ValueError(f"'{path}' {too_large}; save it with np.savez")


def _tensor(array: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> Tensor:
    native = array.astype(array.dtype.newbyteorder("="), copy=False)
    return torch.from_numpy(native)


def _describe_excess(file: BinaryIO) -> str:
    """Return to how much a few bytes would unpack, if that is more than memory should hold."""
    with zipfile.ZipFile(file) as archive:
        unpacked = sum(entry.file_size for entry in archive.infolist())
    packed = file.seek(0, os.SEEK_END)
    file.seek(0)
    is_small = unpacked <= max(_UNPACKED, _RATIO * packed)
    return "" if is_small else f"unpacks from {packed} to {unpacked} bytes"
