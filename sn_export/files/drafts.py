"""Hidden folders in which files are written before they are moved to their places.

A file is written as a draft, in a hidden folder beside its place (`Drafts`), and moved from there
(`publish`), so a reader never sees a half-written file. The folder looks like this::

    .sn_export.k2x0f8vt/
      lock         locked while the process lives that made the folder
      made/        the drafts, under their own names
      replaced/    what was there before, until all is in place
      plan         the moves that are being made, as JSON

A killed process leaves its folder behind. The next process that writes beside it can lock the file
``lock``, and so knows that nobody needs the folder: it takes back the moves of an unfinished plan,
and removes the folder.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import secrets
import shutil
import time
import warnings
from collections.abc import Generator
from pathlib import Path

from ..errors import SnExportWarning
from .paths import require_place
from .publishing import KEPT, LOCK, PLAN, REPLACED, take_back

_PREFIX = ".sn_export."
_MADE = "made"
# Where flock works by process and not by open file (NFS), one's own lock could be taken again.
_own_folders: set[Path] = set()


def require_writable(target: Path) -> None:
    """Raise as `require_place` does, or if the folder of ``target`` takes no new file.

    Raises:
        PermissionError: if the folder may not be written to.
        OSError: if it cannot be: a read-only disk, say.
    """
    require_place(target)
    try:
        with Drafts() as drafts:
            drafts.open(target)
    except OSError as error:
        raise type(error)(f"cannot write '{target}': {error.strerror}") from error


class DraftFolders:
    """Folders for drafts, each beside the place of a file."""

    def __init__(self) -> None:
        self._locks: dict[Path, list[int]] = {}

    def open(self, target: Path) -> Path:
        """Return a path of the same name in a new folder beside ``target``.

        Folders that killed processes left beside ``target`` are removed first. If one was killed
        while it replaced files, the files that it had moved aside are put back.

        Raises:
            OSError: if the folder of ``target`` takes no new folder; it names ``target``.

        Warns:
            SnExportWarning: if a folder of another process is there, and files cannot be locked on
                this disk, so that nobody can tell whether the process still uses it.
        """
        _remove_leftovers(target.parent)
        folder = target.parent / f"{_PREFIX}{secrets.token_hex(8)}"
        self._locks[folder] = []  # first: what removes it goes by this
        _own_folders.add(folder)
        try:
            _make(folder, self._locks[folder])
        except OSError as error:  # of the folder, which nobody has asked for
            raise OSError(error.errno, error.strerror, str(target)) from error
        return folder / _MADE / target.name

    def remove(self) -> None:
        """Remove the folders and their locks; it can be repeated from wherever it was stopped."""
        for folder, locks in [*self._locks.items()]:
            _remove(folder)
            _own_folders.discard(folder)
            while locks:
                os.close(locks.pop())
            del self._locks[folder]


class Drafts(io.IOBase):
    """A context manager with paths to write to, whose folders are gone when it is left.

    ::

        with Drafts() as drafts:
            made = drafts.open(Path("net.onnx"))  # .sn_export.k2x0f8vt/made/net.onnx
            made.write_bytes(content)
            publish([(made, Path("net.onnx"))])

    No interrupt can prevent the removal: `io.IOBase.__exit__` calls ``close``, here that of a
    generator, as `ClosedOnExit` in ``running/undo.py`` explains. Its wing imports torch, which
    files do without. What the block binds must not refer to this object, which could then not be
    dropped: the traceback holds it.
    """

    def __init__(self) -> None:
        self._folders = DraftFolders()
        removal = _remove_at_close(self._folders)
        next(removal)
        self.__dict__["close"] = removal.close

    def __enter__(self) -> DraftFolders:  # type: ignore[override]
        return self._folders


def _remove_at_close(folders: DraftFolders) -> Generator[None]:
    try:
        try:
            yield
        finally:
            folders.remove()
    finally:  # an interrupt may have stopped the first one
        folders.remove()


def _make(folder: Path, locks: list[int]) -> None:
    """Make a folder for drafts, and lock it where files can be locked.

    Where they cannot, the file ``lock`` is removed: another process could lock it, and remove the
    folder.
    """
    while not locks:
        folder.mkdir(mode=0o700, exist_ok=True)
        try:
            locks.append(_lock(folder / LOCK, os.O_CREAT))
        except (FileNotFoundError, BlockingIOError):  # another process removes it as left behind
            time.sleep(0.01)
        except OSError:
            (folder / LOCK).unlink(missing_ok=True)
            break
    (folder / _MADE).mkdir()


def _lock(path: Path, flags: int = 0) -> int:
    """Lock a file, and return its descriptor, which holds the lock until it is closed.

    Raises:
        BlockingIOError: if another process holds the lock.
        FileNotFoundError: if the file is not there, or was removed before it could be locked.
        OSError: if files cannot be locked here.
    """
    try:
        import fcntl
    except ImportError:
        raise OSError(errno.ENOSYS, "this system has no flock") from None
    descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | flags)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.fstat(descriptor).st_nlink:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _remove_leftovers(parent: Path) -> None:
    with os.scandir(parent) as entries:
        found = [
            Path(entry.path)
            for entry in entries
            if entry.name.startswith(_PREFIX) and entry.is_dir(follow_symlinks=False)
        ]
    locks: dict[Path, int] = {}
    try:
        for folder in found:
            if folder in _own_folders or os.path.lexists(folder / KEPT):
                continue
            try:
                locks[folder] = _lock(folder / LOCK)
            except BlockingIOError:  # by a living process
                continue
            except OSError as error:
                if not _remove_empty(folder):
                    _warn_of_leftover(folder, error)
        for folder in locks:
            take_back(folder)
        for folder in locks:  # after all were taken back, since a move may go between two folders
            _remove(folder)
    finally:
        for lock in locks.values():
            os.close(lock)


def _remove_empty(folder: Path) -> bool:
    """Remove a folder that has no lock yet; the process that made it then makes another one."""
    try:
        folder.rmdir()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True


def _warn_of_leftover(folder: Path, error: OSError) -> None:
    warnings.warn(
        f"'{folder}' may be left from a process that was killed, or in use by one; nobody can tell "
        f"(locking it fails: {error.strerror}), so it stays. Remove it if nothing is being "
        "exported there",
        SnExportWarning,
        stacklevel=2,
    )


def _remove(folder: Path) -> None:
    """Remove a folder of drafts, its lock last, so that the rest can be removed after a kill."""
    if os.path.lexists(folder / KEPT):
        return
    with contextlib.suppress(OSError):
        (folder / PLAN).unlink()  # first: it holds while all drafts are there
    for name in (_MADE, REPLACED):
        shutil.rmtree(folder / name, ignore_errors=True)
    with contextlib.suppress(OSError):
        (folder / LOCK).unlink(missing_ok=True)
        folder.rmdir()
