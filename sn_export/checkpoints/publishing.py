"""New files beside old ones, moved into place together or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from .errors import CheckpointError


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


def publish(files: Sequence[Path], folder: Path) -> list[Path]:
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
