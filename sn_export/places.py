"""Where files go: the file beside an ONNX file, and folders that have to be there. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def side_file(path: Path) -> Path:
    """Return where the external data of an ONNX file lies: ``net.onnx.data`` of ``net.onnx``."""
    return path.with_name(path.name + ".data")


def as_path(path: Any, option: str) -> Path:
    """Return what a user passes as ``option``.

    Raises:
        TypeError: if it is neither text nor an `os.PathLike`.
    """
    try:
        return Path(path)
    except TypeError as error:
        raise TypeError(f"{option} must be the path of a file, got {path!r}") from error


def require_place(target: Path) -> None:
    """Raise if no file can be at ``target``.

    Raises:
        FileNotFoundError: if its folder does not exist.
        IsADirectoryError: if it is a folder.
        FileExistsError: if it is a device or a pipe.
    """
    if not target.parent.is_dir():
        raise FileNotFoundError(f"cannot write '{target}': no folder '{target.parent}'")
    if target.is_dir():
        raise IsADirectoryError(f"cannot write '{target}': it is a folder")
    if target.exists() and not target.is_file():  # it would be replaced, not written to
        raise FileExistsError(f"cannot write '{target}': it is no regular file")
