"""Reading checkpoints from disk; nothing in a file is run unless the caller trusts it."""

from __future__ import annotations

import os
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError
from .content import Checkpoint
from .distributed import forbidden_call, is_distributed, read_distributed, refusal
from .lazy_tensors import LazyTensors, index_in


def read_checkpoint(path: str | os.PathLike[str], *, trust_pickle: bool = False) -> Checkpoint:
    """Return what is in a checkpoint: a file of torch or safetensors, or a folder.

    Known are torch's zip and legacy formats, ``.safetensors``, shards of it with an index
    (the index, or the folder it is in) and the folders of `torch.distributed.checkpoint`.
    What a file is shows in its first bytes, not in its name.

    Args:
        path: the file or folder.
        trust_pickle: let pickled Python objects be built, which runs whatever code the
            file's author put there. Without it only tensors and plain data are read.

    Raises:
        CheckpointError: if there is nothing, or nothing that can be read without running
            code from it.
    """
    source = Path(path)
    if source.is_dir():
        return _read_folder(source, trust_pickle)
    if not source.is_file():
        raise CheckpointError(f"there is no checkpoint at '{source}'")
    try:
        with source.open("rb") as file:
            head = file.read(9)
    except OSError as error:
        raise CheckpointError(f"cannot read '{source}': {error.strerror}") from error
    if not head:
        raise CheckpointError(f"'{source}' is empty")
    if source.name.endswith(".index.json"):
        return _lazy(source, LazyTensors.from_index(source))
    if source.suffix == ".safetensors" or head[8:] == b"{":
        return _lazy(source, LazyTensors.from_file(source))
    if not head.startswith((b"PK\x03\x04", b"\x80")):
        raise CheckpointError(
            f"'{source}' is no checkpoint: it starts with {head[:8]!r}, which is neither torch's "
            "format nor safetensors"
        )
    return Checkpoint(source, "torch", _load(source, trust_pickle))


def _read_folder(folder: Path, trust_pickle: bool) -> Checkpoint:
    if is_distributed(folder):
        return Checkpoint(folder, "distributed", read_distributed(folder, trust_pickle))
    index = index_in(folder)
    if index is not None:
        return _lazy(folder, LazyTensors.from_index(index))
    raise CheckpointError(
        f"folder '{folder}' is no checkpoint: it holds neither the '.metadata' of "
        "torch.distributed.checkpoint nor one '*.safetensors.index.json'"
    )


def _lazy(path: Path, tensors: LazyTensors) -> Checkpoint:
    return Checkpoint(path, "safetensors", tensors, tensors.file_metadata)


def _load(path: Path, trust_pickle: bool) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle, which is dealt with here
            return torch.load(
                path,
                map_location="cpu",
                weights_only=not trust_pickle,
                mmap=zipfile.is_zipfile(path),
            )
    except Exception as error:  # a broken pickle can raise anything
        if "TorchScript" in str(error):
            raise CheckpointError(
                f"'{path}' is a TorchScript archive, which holds code; save the state dict instead"
            ) from error
        name = forbidden_call(error)
        if name is not None and not trust_pickle:
            raise CheckpointError(refusal(f"'{path}'", name)) from error
        raise CheckpointError(
            f"'{path}' is damaged or truncated: torch cannot read its {path.stat().st_size} bytes"
        ) from error
