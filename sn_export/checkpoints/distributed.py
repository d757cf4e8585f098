"""Folders of `torch.distributed.checkpoint`, read in one process by torch's own reader."""

from __future__ import annotations

import io
import pickle
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

from ..errors import CheckpointError

_GLOBAL = re.compile(r"(?:GLOBAL|class|function) ([\w.]+\.[\w.]+)")

# What torch writes into '.metadata': its own records, and the values in them.
_RECORDS = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
_VALUES = {
    ("torch", "Size"),
    ("torch", "device"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    *(("pathlib", name) for name in ("Path", "PosixPath", "WindowsPath", "PurePosixPath")),
    *(("pathlib._local", name) for name in ("Path", "PosixPath", "WindowsPath")),
}


def is_distributed(folder: Path) -> bool:
    """Whether ``folder`` holds a distributed checkpoint."""
    return (folder / ".metadata").is_file()


def read_distributed(folder: Path, trust_pickle: bool) -> Any:
    """Return the content of a distributed checkpoint, nested as it was saved.

    Raises:
        CheckpointError: if it is damaged, or wants to run code and is not trusted.
    """
    content: dict[str, Any] = {}
    try:
        if not trust_pickle:
            _require_harmless(folder)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that there is only one process
            _load_state_dict(
                content,
                storage_reader=FileSystemReader(folder),
                planner=_Planner(folder, trust_pickle),
                no_dist=True,
            )
    except CheckpointError:
        raise
    except CheckpointException as failure:  # torch's, one for each process
        error = next(error for error, _ in failure.failures.values())
        if isinstance(error, CheckpointError):
            raise error from failure
        raise _damaged(folder, error) from failure
    except Exception as error:
        raise _damaged(folder, error) from error
    return content


class _Planner(_EmptyStateDictLoadPlanner):
    """Torch's planner, but for the pickles inside, which torch reads without restriction."""

    def __init__(self, folder: Path, trust_pickle: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._folder = folder
        self._trust_pickle = trust_pickle

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        if not self._trust_pickle:
            try:
                torch.load(value, weights_only=True)
            except pickle.UnpicklingError as error:
                name = forbidden_call(error) or read_item.dest_index.fqn
                raise CheckpointError(refusal(f"folder '{self._folder}'", name)) from error
            value.seek(0)
        super().load_bytes(read_item, value)


class _Harmless(pickle.Unpickler):
    """Builds what torch writes into '.metadata', and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        known = (module in _RECORDS and "." not in name) or (module, name) in _VALUES
        if not known and not (module == "torch" and _is_constant(name)):
            raise _ForbiddenError(f"{module}.{name}")
        return super().find_class(module, name)


class _ForbiddenError(Exception):
    """A pickle asks for a callable that is not torch's."""


def _require_harmless(folder: Path) -> None:
    with (folder / ".metadata").open("rb") as file:
        try:
            _Harmless(file).load()
        except _ForbiddenError as error:
            raise CheckpointError(refusal(f"folder '{folder}'", str(error))) from error


def _is_constant(name: str) -> bool:
    return isinstance(getattr(torch, name, None), (torch.dtype, torch.layout, torch.memory_format))


def _damaged(folder: Path, error: BaseException) -> CheckpointError:
    return CheckpointError(
        f"folder '{folder}' is damaged or incomplete: torch.distributed.checkpoint cannot read "
        f"it ({_last_line(error)})"
    )


def _last_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[-1]}" if lines else type(error).__name__


def forbidden_call(error: BaseException) -> str | None:
    """Return the callable that `torch.load` refused to call, if that is what ``error`` says."""
    found = _GLOBAL.search(str(error))
    return found[1] if found is not None else None


def refusal(what: str, name: str) -> str:
    """Return the message about ``what`` that wants to call ``name``."""
    return (
        f"{what} wants to call '{name}' while it is read, and nothing was run; --trust-pickle "
        "lets the file run any code as you, so use it only for files whose origin you trust"
    )
