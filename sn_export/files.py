"""Where files go, and how they get there: several together or not at all. No torch."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .errors import CheckpointError, ExportError


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


@contextlib.contextmanager
def workspace(target: Path) -> Iterator[Path]:
    """Yield a path in a new folder beside ``target``; the folder is gone afterwards."""
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name[:64]}.", dir=target.parent))
    try:
        yield folder / target.name
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def publish(made: Path, target: Path, beside: Sequence[tuple[Path, Path]] = ()) -> None:
    """Move ``made`` and its external data to ``target``, both or none.

    Args:
        made: the file in a workspace.
        target: its place.
        beside: further files, each in a workspace of its own, and their places; moved with it.

    Raises:
        ExportError: if a file cannot be moved; what was at ``target`` is there again.
    """
    pairs = [
        (source, target.with_name(source.name))
        for source in (side_file(made), made)
        if source.exists()
    ]
    pairs += beside
    kept: list[tuple[Path, Path | None]] = []
    orphan = _orphan(made, target)
    try:
        for number, (source, destination) in enumerate(pairs):
            backup = source.with_name(f"replaced-{number}")
            had = destination.exists()
            kept.append((destination, backup if had else None))
            if had:
                os.link(destination, backup)
            os.replace(source, destination)
        if orphan is not None:
            backup = made.with_name("orphan")
            kept.append((orphan, backup))
            os.replace(orphan, backup)
    except BaseException as error:
        for destination, earlier in kept:
            if earlier is None:
                destination.unlink(missing_ok=True)
            elif earlier.exists():
                os.replace(earlier, destination)
        if not isinstance(error, OSError):
            raise
        raise ExportError(f"cannot write '{target}': {error.strerror}") from error


def _orphan(made: Path, target: Path) -> Path | None:
    """Return the external data of the file at ``target`` if nothing will read it any more."""
    data = side_file(target)
    if made.with_name(data.name).exists() or not data.is_file() or not target.is_file():
        return None
    import onnx  # takes a second, and only files to be replaced are looked into

    try:
        tensors = onnx.load(target, load_external_data=False).graph.initializer
    except Exception:  # what was there is no ONNX file
        return None
    entries = [entry for tensor in tensors for entry in tensor.external_data]
    is_its = any(entry.key == "location" and entry.value == data.name for entry in entries)
    return data if is_its else None


@contextlib.contextmanager
def drafts(target: Path) -> Iterator[Path]:
    """Yield a new folder beside ``target`` to write into; it is gone afterwards.

    Raises:
        CheckpointError: if the folder of ``target`` is absent or cannot be written to, or
            the disk is full.
    """
    if not target.parent.is_dir():
        raise CheckpointError(f"cannot write '{target}': there is no folder '{target.parent}'")
    if target.is_dir():
        raise CheckpointError(f"cannot write '{target}': it is a folder")
    folder: Path | None = None
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        yield folder
    except OSError as error:
        reason = error.strerror or str(error)
        raise CheckpointError(f"cannot write '{target}': {reason}") from error
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def publish_all(files: Sequence[Path], folder: Path) -> list[Path]:
    """Move ``files`` into ``folder``, all or none; return where they are.

    Raises:
        OSError: if one cannot be moved; what was there before is there again.
    """
    kept: list[tuple[Path, Path | None]] = []
    try:
        for number, file in enumerate(files):
            target = folder / file.name
            backup = file.with_name(f"replaced-{number}") if target.exists() else None
            if backup is not None:
                _keep(target, backup)
            kept.append((target, backup))
            os.replace(file, target)
    except BaseException:
        for target, backup in kept:
            if backup is not None:
                os.replace(backup, target)
            else:
                target.unlink(missing_ok=True)
        raise
    return [target for target, _ in kept]


def _keep(target: Path, backup: Path) -> None:
    try:
        os.link(target, backup)
    except OSError:  # a file system without hard links
        shutil.copy2(target, backup)
