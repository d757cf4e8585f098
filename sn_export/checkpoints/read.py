"""Read checkpoints from disk; code in a file is run only if the caller trusts the file."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from ..errors import CheckpointError
from ..files import open_regular
from ..text import escape_unprintable, quote_name, quote_names
from .content import Checkpoint
from .distributed import is_distributed, read_distributed
from .first_bytes import is_of_torch, read_head
from .lazy_tensors import (
    LazyTensors,
    Piece,
    Sharded,
    Spec,
    as_shape,
    report_damage,
    require_covered,
)
from .safetensors_file import (
    SHARDING_INFO,
    SafetensorsFiles,
    read_index,
    read_safetensors,
    read_safetensors_index,
    report_missing_tensor,
)
from .torch_file import read_torch_file

_SAFETENSORS, _INDEX = ".safetensors", ".index.json"
_TORCH = (".bin", ".pt", ".pth", ".ckpt")
# The names that Hugging Face's libraries give to files of weights, beside other files.
_USUAL = (
    *("model.safetensors", "diffusion_pytorch_model.safetensors", "adapter_model.safetensors"),
    *("pytorch_model.bin", "diffusion_pytorch_model.bin", "adapter_model.bin"),
)
# Compressed arrays may unpack to so many bytes, or to so many times the size of their file.
_UNPACKED, _RATIO = 2**28, 100


def read_checkpoint(path: str | os.PathLike[str], *, trust_pickle: bool = False) -> Checkpoint:
    """Return what is in a checkpoint: a file of torch or safetensors, or a folder.

    Known are torch's zip and legacy formats, ``.safetensors``, numpy's ``.npz``, shards of
    ``.safetensors`` or ``.bin`` with an index (the index, or the folder it is in), folders with
    one such file, and those of `torch.distributed.checkpoint`, safetensors of several ranks among
    them. The format of a file is decided by its first bytes, not by its name.

    Args:
        path: the file or folder.
        trust_pickle: let pickled Python objects be built, which runs whatever code the
            file's author put there. Without it only tensors and plain data are read, and
            `Checkpoint.notes` names what was left unread.

    Raises:
        CheckpointError: if there is no file or folder, or it is no checkpoint, or it cannot be
            read without running code from it.
    """
    source = Path(path)
    if source.is_dir():
        return _read_folder(source, trust_pickle)
    head = read_head(source)
    if source.name.endswith(_INDEX):
        return _read_index(source, source, trust_pickle)
    if head[8:9] == b"{" or (source.suffix == _SAFETENSORS and not is_of_torch(head)):
        return Checkpoint(source, "safetensors", *read_safetensors(source))
    if head.startswith(b"PK") and _is_npz(source):
        return _read_npz(source)
    return _read_torch(source, source, trust_pickle)


def _read_npz(path: Path) -> Checkpoint:
    try:
        return Checkpoint(path, "numpy", read_npz(path))
    except ValueError as error:
        raise CheckpointError(str(error)) from error


def _is_npz(path: Path) -> bool:
    """Whether ``path`` is a zip archive that holds numpy arrays and nothing else."""
    try:
        with open_regular(path) as file, zipfile.ZipFile(file) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return False
    return bool(names) and all(name.endswith(".npy") for name in names)


def read_npz(path: Path) -> dict[str, Tensor]:
    """Return the arrays of a file that `numpy.savez` wrote, as tensors of the same dtypes.

    Raises:
        ValueError: if it is no such file, an array holds no numbers, or the arrays would unpack
            from a few bytes to more than memory should hold.
    """
    try:
        with open_regular(path) as file:
            too_large = _describe_excess(file)
            if not too_large:
                arrays = np.load(file, allow_pickle=False)
                return {name: _as_tensor(arrays[name]) for name in arrays.files}
    except Exception as error:  # numpy raises many kinds for a broken file
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{quote_name(path)} is no .npz of numeric arrays: {escape_unprintable(reason)}"
        ) from error
    raise ValueError(f"{quote_name(path)} {too_large}; save it with np.savez")


def _as_tensor(array: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> Tensor:
    native = array.astype(array.dtype.newbyteorder("="), copy=False)
    return torch.from_numpy(native)


def _describe_excess(file: BinaryIO) -> str:
    """Return ``"unpacks from 900 to 4000000000 bytes"`` if that is too much; otherwise ``""``."""
    with zipfile.ZipFile(file) as archive:
        unpacked = sum(entry.file_size for entry in archive.infolist())
    packed = file.seek(0, os.SEEK_END)
    file.seek(0)
    is_small = unpacked <= max(_UNPACKED, _RATIO * packed)
    return "" if is_small else f"unpacks from {packed} to {unpacked} bytes"


def _read_torch(path: Path, file: Path, trust_pickle: bool) -> Checkpoint:
    unread: set[str] = set()
    content = read_torch_file(file, trust_pickle, unread)
    return Checkpoint(path, "torch", content, notes=_describe_unread(unread))


def _read_index(path: Path, index: Path, trust_pickle: bool) -> Checkpoint:
    if not index.name.endswith(".bin" + _INDEX):
        return Checkpoint(path, "safetensors", *read_safetensors_index(index))
    places, unread = read_index(index), set[str]()
    shards: dict[Path, Any] = {}
    for file in dict.fromkeys(places.values()):
        shards[file] = read_torch_file(file, trust_pickle, unread)
    for name, file in places.items():
        if not isinstance(shards[file], Mapping) or name not in shards[file]:
            raise report_missing_tensor(file, name)
    content = {name: shards[file][name] for name, file in places.items()}
    return Checkpoint(path, "torch", content, notes=_describe_unread(unread))


def _read_folder(folder: Path, trust_pickle: bool) -> Checkpoint:
    if is_distributed(folder):
        unread: set[str] = set()
        content = read_distributed(folder, trust_pickle, unread)
        return Checkpoint(folder, "distributed", content, notes=_describe_unread(unread))
    files = sorted(path for path in folder.iterdir() if path.is_file())
    tensors = [path for path in files if path.suffix == _SAFETENSORS]
    for kind in (_SAFETENSORS, ".bin"):
        indexes = [path for path in files if path.name.endswith(kind + _INDEX)]
        if len(indexes) > 1:
            raise _report_several(folder, indexes)
        if indexes:
            return _read_index(folder, indexes[0], trust_pickle)
        if kind == _SAFETENSORS and tensors:
            return _read_safetensors_of(folder, tensors)
    if others := [path for path in files if path.suffix in _TORCH]:
        file = _choose_file(folder, others)
        return _read_torch(folder, file, trust_pickle)
    raise CheckpointError(
        f"folder {quote_name(folder)} is no checkpoint: it holds "
        + _describe_absence(files, folder)
    )


def _read_safetensors_of(folder: Path, files: list[Path]) -> Checkpoint:
    tensors: LazyTensors | None = read_sharded_safetensors(folder, files)
    if tensors is not None:
        return Checkpoint(folder, "safetensors", tensors)
    return Checkpoint(folder, "safetensors", *read_safetensors(_choose_file(folder, files)))


def _choose_file(folder: Path, files: list[Path]) -> Path:
    """Return the one file of weights; raise a CheckpointError if there may be several.

    Accelerate writes several networks of one training as ``model.safetensors``,
    ``model_1.safetensors`` and so on, so these count as several.
    """
    usual = [path for path in files if path.name in _USUAL]
    stems = {f"{path.stem}_{number}" for path in usual for number in range(1, len(files))}
    chosen = [path for path in files if path in usual or path.stem in stems] or files
    if len(chosen) > 1:
        raise _report_several(folder, chosen)
    return chosen[0]


def _describe_absence(files: Iterable[Path], folder: Path) -> str:
    parts = [path.name for path in files if path.name.endswith(".metadata")]
    if parts:
        return (
            f"{quote_names(parts)} of single ranks and no '.metadata', so the pieces cannot be put "
            "together"
        )
    inner = sorted(path.name for path in folder.iterdir() if path.is_dir())
    within = f"; give the one of its folders that is one: {quote_names(inner)}" if inner else ""
    return (
        "neither the '.metadata' of torch.distributed.checkpoint nor one "
        f"'*.safetensors{_INDEX}', '*.bin{_INDEX}' or file of weights{within}"
    )


def _report_several(folder: Path, files: Sequence[Path]) -> CheckpointError:
    is_zero = any(path.name.endswith("_optim_states.pt") for path in files)
    advice = "; where ZeRO of DeepSpeed split the weights, its zero_to_fp32.py joins them"
    return CheckpointError(
        f"folder {quote_name(folder)} holds several checkpoints; give one of "
        f"{quote_names(path.name for path in files)}{advice if is_zero else ''}"
    )


def _describe_unread(unread: Iterable[str]) -> tuple[str, ...]:
    # Of numpy these are private functions that rebuild arrays, which nobody knows by name.
    names = sorted({"numpy" if name.startswith("numpy.") else name for name in unread})
    if not names:
        return ()
    return (
        f"left unread: {quote_names(names)}, which weights do not need; --trust-pickle "
        "reads them, and lets the file run any code as you",
    )


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
    files = SafetensorsFiles(paths)
    places = {path: texts.get(SHARDING_INFO) for path, texts in files.texts.items()}
    if not any(places.values()):
        return None
    what = f"folder {quote_name(folder)}"
    pieces: dict[str, list[Piece]] = {}
    dtypes: dict[str, set[torch.dtype]] = {}
    for path, text in places.items():
        if text is None:
            raise report_damage(
                what, f"{quote_name(path.name)} does not say what its pieces are of"
            )
        starts = _parse_starts(text, files.specs[path], what, path)
        for name, spec in files.specs[path].items():
            read = partial(files.read, path, name)
            pieces.setdefault(name, []).append(Piece(starts[name], spec.shape, read))
            dtypes.setdefault(name, set()).add(spec.dtype)
    sharded = {}
    for name, parts in pieces.items():
        if len(dtypes[name]) > 1 or len({len(part.shape) for part in parts}) > 1:
            raise report_damage(
                what, f"the pieces of {quote_name(name)} differ in dtype or dimensions"
            )
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
            raise report_damage(
                what, f"{quote_name(path.name)} does not say where its {quote_name(name)} begins"
            )
        found[name] = start
    return found
