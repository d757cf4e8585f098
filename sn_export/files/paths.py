"""Check where a file may be written, and open files without waiting for a pipe or a device."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from ..errors import SnExportError

if TYPE_CHECKING:
    from onnx import ModelProto

# What a disk refuses a write with: it is full, broken or read-only, or a quota or limit is reached.
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
# Suffixes of other formats: nobody expects an ONNX file under such a name.
_OTHER_FORMATS = (
    *(".bin", ".ckpt", ".h5", ".pkl", ".pt", ".pt2", ".pth", ".safetensors", ".npy", ".npz"),
    *(".html", ".md", ".ort", ".py", ".tflite", ".txt", ".zip"),
)
# Suffixes for which onnx writes text and not protobuf; onnxruntime cannot run such a file.
TEXT_FORMATS = (
    *(".json", ".onnxjson", ".onnxtext", ".onnxtxt"),
    *(".pbtxt", ".prototxt", ".textproto", ".txtpb"),
)


def name_side_file(path: Path) -> Path:
    """Return where the external data of an ONNX file lies: ``net.onnx.data`` of ``net.onnx``."""
    return path.parent / f"{path.name}.data"


def as_path(path: Any, option: str) -> Path:
    """Return the path that a user passes as ``option``.

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
    # A pipe may have taken its place since the check: opening it must not block.
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
    """Return the error of the disk that ``error`` came from, or None if it has another cause."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
            return error
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return None


@contextlib.contextmanager
def disk_errors_as(kind: type[SnExportError], target: Path) -> Iterator[None]:
    """Raise a ``kind`` for every OSError, with a message that names ``target``.

    The message of an error from `require_place` names it already, and is kept.
    """
    try:
        yield
    except OSError as error:
        text = f"cannot write '{target}': {error.strerror}" if error.strerror else str(error)
        raise kind(text) from error


def require_onnx_place(target: Path, *, has_data: bool, overwrite: bool, advice: str) -> None:
    """Raise if no ONNX file can be at ``target``, or it would take the place of something else.

    Args:
        target: where the file is to be.
        has_data: whether its weights may go to a file of external data beside it.
        overwrite: whether it may have the suffix of another format, or replace any file.
        advice: how the user can write it all the same, for the message.

    Raises:
        ValueError: if the suffix is that of another format.
        FileExistsError: if there is a file that is neither ONNX nor empty.
        OSError: as `require_place` for the file and for its external data, or if a name is too
            long.
    """
    require_place(target)
    require_place(name_side_file(target))
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
    """Raise if the disk takes no name as long as that of the folder that onnx-ir will make.

    It writes the external data of ``net.onnx`` in a folder called ``.net.onnx.data.k2x0f8vt``.
    """
    longer = f".{name_side_file(target).name}.{'x' * 8}"
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


def read_onnx(path: Path) -> ModelProto:
    """Return the model in an ONNX file, without its external data.

    The file is protobuf whatever its suffix is, as for onnxruntime; onnx.load alone would take a
    ``net.json`` for text.

    Raises:
        OSError: if it cannot be opened, or is no regular file.
        google.protobuf.message.DecodeError: if it is no protobuf.
    """
    import onnx  # takes a second

    with open_regular(path) as file:
        return onnx.load(file, format="protobuf", load_external_data=False)


def starts_as_onnx(path: Path) -> bool:
    """Return whether the first bytes of a file are those of an ONNX model.

    Every known writer of protobuf begins with the first field, here ``ir_version``: the byte 8,
    and a small number from 1 to 31.
    """
    with open_regular(path) as file:
        head = file.read(9)
    if len(head) < 2 or head[8:] == b"{":  # safetensors: eight bytes of length, then JSON
        return False
    return head[0] == 8 and 0 < head[1] < 32


def _is_onnx(path: Path) -> bool:
    """Whether a file is an ONNX model; the whole is read only if its first bytes do not tell."""
    if starts_as_onnx(path):
        return True
    try:
        return bool(read_onnx(path).HasField("graph"))
    except Exception:  # protobuf has several types for it
        return False
