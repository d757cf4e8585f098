"""Where files go, and how they get there: several together or not at all. No torch.

A file is written as a draft, in a hidden folder beside its place (`Drafts`), and moved from there
(`publish`), so whoever looks sees whole files alone. The folder looks like this::

    .sn_export.k2x0f8vt/
      lock         locked while the process lives that made the folder
      made/        the drafts, under their own names
      replaced/    what was there before, until all is in place
      plan         the moves that are being made, as JSON

A killed process leaves its folder behind. The next one that writes beside it can lock the file
``lock``, so it knows that nobody needs the folder: it takes back moves that were not all made,
and removes the folder.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import secrets
import shutil
import stat
import time
import warnings
from collections.abc import Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from .errors import SnExportError, SnExportWarning

_PREFIX = ".sn_export."
# A full disk, a quota, a limit of the process, a broken or read-only disk.
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
_LOCK, _MADE, _REPLACED, _KEPT, _PLAN = "lock", "made", "replaced", "kept", "plan"
# Nobody expects an ONNX file under these names.
_OTHER_FORMATS = (
    *(".bin", ".ckpt", ".h5", ".pkl", ".pt", ".pt2", ".pth", ".safetensors", ".npy", ".npz"),
    *(".html", ".md", ".ort", ".py", ".tflite", ".txt", ".zip"),
)
# Under these, onnx writes and reads text in the place of protobuf, which onnxruntime does not run.
TEXT_FORMATS = (
    *(".json", ".onnxjson", ".onnxtext", ".onnxtxt"),
    *(".pbtxt", ".prototxt", ".textproto", ".txtpb"),
)
# Where flock works by process and not by open file (NFS), one's own lock could be taken again.
_own_folders: set[Path] = set()


def side_file(path: Path) -> Path:
    """Return where the external data of an ONNX file lies: ``net.onnx.data`` of ``net.onnx``."""
    return path.parent / f"{path.name}.data"


def as_path(path: Any, option: str) -> Path:
    """Return what a user passes as ``option``.

    Raises:
        TypeError: if it is neither text nor an `os.PathLike`.
    """
    try:
        return Path(path)
    except TypeError as error:
        raise TypeError(f"{option} must be the path of a file, got {path!r}") from error


def require_regular(path: Path) -> None:
    """Raise if opening ``path`` could wait for a writer, or read without end.

    Raises:
        OSError: if there is nothing, or a pipe, device or folder.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(errno.EINVAL, "it is no regular file", os.fspath(path))


def open_regular(path: Path) -> BinaryIO:
    """Open a file for reading bytes; pipes and devices are refused before they are waited for.

    Raises:
        OSError: if it cannot be opened, or is no regular file.
    """
    require_regular(path)
    # A pipe may have come into its place meanwhile.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    descriptor = os.open(path, flags)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "it is no regular file", os.fspath(path))
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def require_place(target: Path) -> None:
    """Raise if no file can be at ``target``. A symbolic link there is replaced, not followed.

    Raises:
        FileNotFoundError: if its folder does not exist.
        IsADirectoryError: if it is a folder, or a link to one.
        FileExistsError: if it is a device or a pipe, or a link to one.
        OSError: if the system refuses the path: a name that is too long, links in a circle.
        ValueError: for a path with a zero byte.
    """
    try:
        if not stat.S_ISDIR(os.stat(target.parent).st_mode):
            raise NotADirectoryError
        mode = os.stat(target).st_mode
    except (FileNotFoundError, NotADirectoryError):
        if not target.parent.is_dir():
            raise FileNotFoundError(
                f"cannot write '{target}': no folder '{target.parent}'"
            ) from None
    except OSError as error:
        raise type(error)(f"cannot write '{target}': {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"cannot write {str(target)!r}: {error}") from error
    else:
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(f"cannot write '{target}': it is a folder")
        if not stat.S_ISREG(mode):  # it would be replaced, not written to
            raise FileExistsError(f"cannot write '{target}': it is no regular file")


def require_folder_place(target: Path) -> None:
    """Raise if no new folder can be at ``target``. An empty one there is replaced.

    Raises:
        FileExistsError: if there is anything else.
        OSError: as `require_place`.
    """
    if target.is_dir() and not target.is_symlink() and not any(target.iterdir()):
        return
    if os.path.lexists(target):
        raise FileExistsError(f"cannot write '{target}': it is there, and no empty folder")
    require_place(target)


def are_one_place(one: Path, other: Path) -> bool:
    """Whether two paths name one file, whether or not it is there."""
    return os.path.realpath(one) == os.path.realpath(other)


def find_disk_error(error: BaseException | None) -> OSError | None:
    """Return what a disk refused a write with, if that is what an error came from."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
            return error
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return None


def require_onnx_place(target: Path, *, has_data: bool, overwrite: bool, advice: str) -> None:
    """Raise if no ONNX file can be at ``target``, or it would take the place of something else.

    Args:
        target: where the file is to be.
        has_data: whether its weights go, or may go, to external data beside it.
        overwrite: whether it may have the suffix of another format, or replace any file.
        advice: how to write it all the same, for the message.

    Raises:
        ValueError: if the suffix is that of another format.
        FileExistsError: if there is a file that is neither ONNX nor empty.
        OSError: as `require_place`, for the file, its external data, and a name that is too long.
    """
    require_place(target)
    require_place(side_file(target))
    if has_data:
        _require_room_in_name(target)
    if target.suffix in TEXT_FORMATS:
        raise ValueError(
            f"cannot write '{target}': onnx writes text to a file that ends in {target.suffix}, "
            "which onnxruntime cannot run, so nothing could be proved; let it end in .onnx"
        )
    if overwrite:
        return
    if target.suffix.lower() in _OTHER_FORMATS:
        raise ValueError(
            f"cannot write '{target}': an ONNX file should end in .onnx, and {target.suffix} is "
            f"the suffix of another format; {advice}"
        )
    if target.is_file() and target.stat().st_size and not _is_onnx(target):
        raise FileExistsError(
            f"cannot write '{target}': the file that is there is no ONNX file; {advice}"
        )


def _require_room_in_name(target: Path) -> None:
    """Raise if the disk takes no name that is as long as one that is made from ``target``'s.

    onnx-ir writes external data in a folder that is called ``.net.onnx.data.k2x0f8vt``.
    """
    longer = f".{side_file(target).name}.{'x' * 8}"
    try:
        os.lstat(target.with_name(longer))
    except FileNotFoundError:
        return
    except OSError as error:
        spare = len(os.fsencode(longer)) - len(os.fsencode(target.name))
        raise type(error)(
            f"cannot write '{target}': {error.strerror}: names that are {spare} bytes longer are "
            "needed while its external data is written"
        ) from error


def starts_as_onnx(path: Path) -> bool:
    """Return whether the first bytes of a file are those of an ONNX model.

    As all writers of protobuf do, those of ONNX begin with the first field, ``ir_version``, a small
    number: the bytes 8 and 1 to 31.
    """
    with open_regular(path) as file:
        head = file.read(9)
    if len(head) < 2 or head[8:] == b"{":  # the latter is how safetensors go on
        return False
    return head[0] == 8 and 0 < head[1] < 32


def _is_onnx(path: Path) -> bool:
    """Return whether a file is an ONNX model; it is read where its first bytes do not say so."""
    if starts_as_onnx(path):
        return True
    import onnx  # takes a second

    try:
        return bool(onnx.load(path, load_external_data=False).HasField("graph"))
    except Exception:  # protobuf has several types for it
        return False


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


@contextlib.contextmanager
def disk_errors_as(kind: type[SnExportError], target: Path) -> Iterator[None]:
    """Raise a ``kind`` for every OSError, with a message that names ``target``.

    An error of `require_place` has a message that does so already.
    """
    try:
        yield
    except OSError as error:
        text = f"cannot write '{target}': {error.strerror}" if error.strerror else str(error)
        raise kind(text) from error


class Drafts(io.IOBase):
    """A context manager with paths to write to, whose folders are gone when it is left.

    ::

        with Drafts() as drafts:
            made = drafts.open(Path("net.onnx"))  # .sn_export.k2x0f8vt/made/net.onnx
            made.write_bytes(content)
            publish([(made, Path("net.onnx"))])

    No interrupt can keep a folder: ``__exit__`` is that of `io.IOBase`, which calls the ``close``
    of a generator, and both are written in C, so there is no line of Python to be stopped at before
    the generator goes on, within its ``try``.
    """

    def __init__(self) -> None:
        self._folders: dict[Path, list[int]] = {}
        removal = _remove_at_close(self._folders)
        next(removal)
        self.__dict__["close"] = removal.close

    def open(self, target: Path) -> Path:
        """Return a path of the same name in a new folder beside ``target``.

        What killed processes left beside ``target`` is removed first. If one was killed while it
        replaced files, what it had moved aside is back in its place.

        Raises:
            OSError: if the folder of ``target`` takes no new folder.

        Warns:
            SnExportWarning: if there is something that looks left behind, and nobody can tell
                whether a process still uses it, since files cannot be locked on this disk.
        """
        _remove_leftovers(target.parent)
        folder = target.parent / f"{_PREFIX}{secrets.token_hex(8)}"
        _own_folders.add(folder)
        self._folders[folder] = []
        _make(folder, self._folders[folder])
        return folder / _MADE / target.name


def _remove_at_close(folders: dict[Path, list[int]]) -> Generator[None]:
    try:
        try:
            yield
        finally:
            _close(folders)
    finally:  # an interrupt may have stopped the first one
        _close(folders)


def publish(moves: Sequence[tuple[Path, Path]], stale: Iterable[Path] = ()) -> None:
    """Move drafts to their places: all of them, or none, whenever the process is killed.

    The last file is the one that names the others: a model its data, an index its shards. It is
    moved aside first and into place last, so a kill in between leaves no such file, and never an
    old one with new others::

        net.onnx -> replaced/net.onnx              absent from here on
        net.onnx.data -> replaced/net.onnx.data
        made/net.onnx.data -> net.onnx.data
        made/net.onnx -> net.onnx                  the new pair from here on

    What was moved aside comes back when somebody writes there again (`Drafts`). A file alone takes
    the place of an old one in one step. Each step is on the disk before the
    next one where the system can say so (fsync), so what holds for a kill holds for a power loss.

    Args:
        moves: drafts, from `Drafts`, and their places; the one that names the others last. A
            folder alone, with files in it, is moved in one step too.
        stale: files that nobody reads afterwards, each beside one of the places.

    Raises:
        OSError: if a file cannot be moved; what was at the places is there again.
    """
    for made, _ in moves:
        for path in made.iterdir() if made.is_dir() else ():
            _flush(path)
        _flush(made)
    with _alone_in(moves[-1][1].parent):
        _move_all(moves, stale)


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Wait until nobody else publishes in ``folder``, as ranks do that export the same model.

    Without it, one would move aside what another one has just put there. Where folders cannot be
    locked (Windows, some NFS), they take that chance.
    """
    descriptors = list[int]()
    with contextlib.suppress(ImportError, OSError):
        import fcntl

        descriptors.append(os.open(folder, os.O_RDONLY))
        fcntl.flock(descriptors[0], fcntl.LOCK_EX)
    try:
        yield
    finally:
        while descriptors:
            os.close(descriptors.pop())


def _move_all(moves: Sequence[tuple[Path, Path]], stale: Iterable[Path]) -> None:
    last, done = moves[-1][0], list[tuple[Path, Path]]()
    phases = _plan(moves, stale)
    if len(phases) > 1:
        _write_plan(last.parents[1], [pair for phase in phases for pair in phase])
    try:
        for phase in phases:
            for source, place in phase:
                done.append((source, place))
                os.replace(source, place)
            _flush_folders(path.parent for pair in phase for path in pair)
    except BaseException:
        if os.path.lexists(last):  # else the last step was done, and all is in place
            _undo(done)
        raise


def _plan(
    moves: Sequence[tuple[Path, Path]], stale: Iterable[Path]
) -> list[list[tuple[Path, Path]]]:
    """Return the steps of `publish`, in three groups that are flushed one after the other."""
    *others, (made, target) = moves
    aside = made.parent.with_name(_REPLACED)
    removed = [(path, aside / path.name) for path in stale if os.path.lexists(path)]
    if not others and not removed:
        return [[(made, target)]]
    changed = removed
    for source, place in others:
        folder = source.parent.with_name(_REPLACED)
        changed += [(place, folder / place.name)] if os.path.lexists(place) else []
        changed.append((source, place))
    first = [(target, aside / target.name)] if os.path.lexists(target) else []
    for _, place in (*first, *changed):
        if place.parent.name == _REPLACED:
            place.parent.mkdir(exist_ok=True)
    return [first, changed, [(made, target)]]


def _write_plan(folder: Path, steps: Sequence[tuple[Path, Path]]) -> None:
    """Write down what is going to be moved, for whoever finds the folder after a kill."""
    paths = [[os.path.abspath(path) for path in pair] for pair in steps]
    plan = folder / _PLAN
    plan.write_text(json.dumps({"folder": _identity(folder), "steps": paths}), "utf-8")
    _flush(plan)
    _flush_folders([folder])


def _take_back(folder: Path) -> None:
    """Take back the moves of a killed process, unless it had made the last one.

    A folder that came from elsewhere, in an archive, may hold any plan. It is not followed: nobody
    else can know the number that the disk gives a folder.
    """
    try:
        plan = json.loads((folder / _PLAN).read_text("utf-8"))
        steps = [(Path(source), Path(place)) for source, place in plan["steps"]]
        made, target = steps[-1]
        is_ours = plan["folder"] == _identity(folder)
        if is_ours and os.path.lexists(made) and not os.path.lexists(target):
            _move_back(steps[:-1])
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return  # half written, before the first move; or another folder is gone


def _identity(folder: Path) -> list[int]:
    found = folder.stat()
    return [found.st_dev, found.st_ino]


def _undo(done: Sequence[tuple[Path, Path]]) -> None:
    """Move back what was moved; no step takes the place of a file, so each can be repeated.

    Raises:
        OSError: if the disk refuses; says where the replaced files are, which are then kept.
    """
    try:
        try:
            _move_back(done)
        except BaseException:  # an interrupt, which comes once
            _move_back(done)
            raise
    except OSError as error:
        kept = {path.parent for _, path in done if path.parent.name == _REPLACED and path.exists()}
        for folder in kept:
            folder.rename(folder.with_name(_KEPT))
        where = ", ".join(f"'{folder.with_name(_KEPT)}'" for folder in sorted(kept))
        there = f"; what was there is now in {where}" if kept else ""
        raise OSError(error.errno, f"{error.strerror}{there}") from error


def _move_back(done: Sequence[tuple[Path, Path]]) -> None:
    for source, place in reversed(done):
        if os.path.lexists(place) and not os.path.lexists(source):
            os.replace(place, source)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _flush_folders(folders: Iterable[Path]) -> None:
    for folder in dict.fromkeys(folders):
        with contextlib.suppress(OSError):  # not every system can
            _flush(folder)


def _make(folder: Path, locks: list[int]) -> None:
    """Make a folder for drafts, and lock it where files can be locked.

    Without a lock there is no file ``lock``, so that no other process takes it for unlocked.
    """
    while not locks:
        folder.mkdir(mode=0o700, exist_ok=True)
        try:
            locks.append(_lock(folder / _LOCK, os.O_CREAT))
        except (FileNotFoundError, BlockingIOError):  # taken for left behind before it was locked
            time.sleep(0.01)
        except OSError:
            (folder / _LOCK).unlink(missing_ok=True)
            break
    (folder / _MADE).mkdir()


def _close(folders: dict[Path, list[int]]) -> None:
    """Remove folders and their locks; it can be repeated from wherever it was stopped."""
    for folder, locks in [*folders.items()]:
        _remove(folder)
        _own_folders.discard(folder)
        while locks:
            os.close(locks.pop())
        del folders[folder]


def _lock(path: Path, flags: int = 0) -> int:
    """Return the descriptor of a file that nobody else has locked from now on.

    Raises:
        BlockingIOError: if another one has.
        FileNotFoundError: if it is not there, or gone by the time it was locked.
        OSError: if files cannot be locked here.
    """
    try:
        import fcntl
    except ImportError:
        raise OSError(errno.ENOSYS, "this system has no flock") from None
    descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | flags)
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
            if folder in _own_folders or (folder / _KEPT).exists():
                continue
            try:
                locks[folder] = _lock(folder / _LOCK)
            except BlockingIOError:  # by a living process
                continue
            except OSError as error:
                if not _remove_empty(folder):
                    _warn_of_leftover(folder, error)
        for folder in locks:
            _take_back(folder)
        for folder in locks:  # after that, since moves go to and from several
            _remove(folder)
    finally:
        for lock in locks.values():
            os.close(lock)


def _remove_empty(folder: Path) -> bool:
    """Remove a folder that was made and not yet locked; whoever made it makes another one."""
    try:
        folder.rmdir()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True


def _warn_of_leftover(folder: Path, error: OSError) -> None:
    is_unlocked = isinstance(error, FileNotFoundError)
    reason = "it has no lock" if is_unlocked else f"locking it fails: {error.strerror}"
    warnings.warn(
        f"'{folder}' may be left from a process that was killed, or in use by one; nobody can tell "
        f"({reason}), so it stays. Remove it if nothing is being exported there",
        SnExportWarning,
        stacklevel=2,
    )


def _remove(folder: Path) -> None:
    """Remove a folder of drafts, its lock last; what a kill leaves of it can be locked again."""
    if (folder / _KEPT).exists():
        return
    with contextlib.suppress(OSError):
        (folder / _PLAN).unlink(missing_ok=True)  # first: it holds while all drafts are there
    for name in (_MADE, _REPLACED):
        shutil.rmtree(folder / name, ignore_errors=True)
    with contextlib.suppress(OSError):
        (folder / _LOCK).unlink(missing_ok=True)
        folder.rmdir()
