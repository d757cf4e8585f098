"""Read files of `torch.save` by an unpickler that runs no code of the file, and write them."""

from __future__ import annotations

import os
import pickle
import re
import struct
import tarfile
import warnings
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import torch

from ..errors import CheckpointError
from ..files import find_disk_error, open_regular
from ..text import format_count, join_lines, quote_name, quote_names
from .first_bytes import read_head, require_torch
from .pickle_globals import DamagedPickleError, ForbiddenPickleError
from .unpickling import RestrictedUnpickler

_MAGIC = torch.serialization.MAGIC_NUMBER.to_bytes(10, "little")  # of files before zip
# Bytes at the end of a zip archive: the end itself, with a comment, and with numbers of 64 bits.
_END, _LONGEST_END, _END_OF_LARGE = 22, 22 + 2**16, 76
_FORCED = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
_MISSING_ATTRIBUTE = re.compile(r"Can't get attribute '([^']+)' on <module '([^']+)'")


def read_torch_file(path: Path, trust_pickle: bool, unread: set[str]) -> Any:
    """Return what `torch.save` or `torch.jit.save` wrote; large tensors are mapped, not read.

    Args:
        path: the file.
        trust_pickle: let the file run code.
        unread: receives the names of the classes and functions that were left unread.

    Raises:
        CheckpointError: if it is of another kind, is damaged, or wants to run code.
    """
    require_torch(path, read_head(path))
    with open_regular(path) as file:
        kind = _recognise(file, quote_name(path), trust_pickle)
        size = os.fstat(file.fileno()).st_size
    what, source = quote_name(path), os.fspath(path)
    if kind == "script":
        jit: Any = torch.jit
        return _load(
            lambda: jit.load(source, "cpu"), what, f"its {format_count(size, 'byte')}", True
        )
    if kind == "pickle":
        return _load(
            lambda: pickle.loads(path.read_bytes()), what, f"its {format_count(size, 'byte')}", True
        )
    if path.suffix == ".safetensors":  # torch.load goes by that name, not by what is in the file
        with open_regular(path) as file:
            return _run_torch_load(file, what, size, trust_pickle, unread, False)
    return _run_torch_load(source, what, size, trust_pickle, unread, kind == "zip")


def read_torch_part(file: BinaryIO, what: str, trust_pickle: bool, unread: set[str]) -> Any:
    """Return what `torch.save` wrote into a part of a larger file.

    Args:
        file: the part as a file of its own.
        what: names part and file in messages.
        trust_pickle: let it run code.
        unread: receives the names of the classes and functions that were left unread.

    Raises:
        CheckpointError: if it is damaged, or wants to run code.
    """
    _recognise(file, what, False)
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    return _run_torch_load(file, what, size, trust_pickle, unread, False)


def read_pickle(file: BinaryIO, what: str, name: str, trust_pickle: bool) -> Any:
    """Return the value of ``file``, a pickle without tensors: the file ``name`` in ``what``.

    Raises:
        CheckpointError: if it is damaged, or wants to run code.
    """
    content = f"the {format_count(os.fstat(file.fileno()).st_size, 'byte')} of {quote_name(name)}"
    reader = pickle.Unpickler if trust_pickle else RestrictedUnpickler
    return _load(lambda: reader(file).load(), what, content, trust_pickle)


def write_torch_file(content: Any, path: Path) -> None:
    """Write what `torch.save` makes of ``content``.

    Raises:
        OSError: if the disk takes no such file.
    """
    try:
        with path.open("wb") as file:
            torch.save(content, file)
    except RuntimeError as error:  # torch's C++ writer hides the error of the disk by a second one
        raise find_disk_error(error) or error from None


def _run_torch_load(
    source: str | BinaryIO, what: str, size: int, trust_pickle: bool, unread: set[str], mmap: bool
) -> Any:
    if trust_pickle:
        module: Any = pickle
    elif os.environ.get(_FORCED, "0").lower() in ("1", "y", "yes", "true"):
        raise CheckpointError(
            f"{what} cannot be read while {_FORCED} is set, since torch then takes no unpickler "
            "but its own; unset it: here nothing in a file is run either"
        )
    else:
        module = _make_restricted_module(unread, size)

    def read() -> Any:
        # Checked, since a file may give a sparse tensor indices that lie outside of it.
        invariants: Any = torch.sparse.check_sparse_tensor_invariants
        with invariants():
            return torch.load(
                source, map_location="cpu", weights_only=False, pickle_module=module, mmap=mmap
            )

    return _load(read, what, f"its {format_count(size, 'byte')}", trust_pickle)


def _make_restricted_module(unread: set[str], room: int) -> Any:
    """Return a stand-in for the module pickle, as `torch.load` takes one, for one file."""

    class Unpickler(RestrictedUnpickler):
        def __init__(self, file: BinaryIO, *, encoding: str = "ASCII") -> None:
            super().__init__(file, unread=unread, room=room, encoding=encoding)

    def load(file: BinaryIO, *, encoding: str = "ASCII") -> Any:
        return Unpickler(file, encoding=encoding).load()

    return SimpleNamespace(__name__=__name__, Unpickler=Unpickler, load=load)


def _load(read: Callable[[], Any], what: str, content: str, trust_pickle: bool) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's warnings about pickle: the list is closed
            return read()
    except CheckpointError:
        raise
    except ForbiddenPickleError as error:
        raise CheckpointError(
            f"{what} wants to {error} while it is read, and nothing was run; --trust-pickle lets "
            "the file run any code as you, so use it only for files whose origin you trust"
        ) from error
    except DamagedPickleError as error:
        raise CheckpointError(f"{what} is damaged: it holds {error}") from error
    except Exception as error:  # a broken pickle can raise anything
        raise CheckpointError(_describe_failure(error, what, content, trust_pickle)) from error


def _describe_failure(error: Exception, what: str, content: str, trust_pickle: bool) -> str:
    absent = _MISSING_ATTRIBUTE.match(str(error))
    if trust_pickle and isinstance(error, ModuleNotFoundError):
        return f"{what} needs the package {quote_name(error.name)}, which cannot be imported here"
    if trust_pickle and absent:
        name, module = map(quote_name, absent.groups())
        return f"{what} needs {name} of the module {module}, which has no such name here"
    if trust_pickle and not isinstance(error, (EOFError, pickle.UnpicklingError, RuntimeError)):
        return f"{what} cannot be read: {type(error).__name__}: {join_lines(str(error))}"
    return f"{what} is damaged or truncated: torch cannot read {content}"


def _recognise(file: BinaryIO, what: str, trust_pickle: bool) -> str:
    """Return ``"zip"``, ``"script"``, ``"legacy"`` or, if trusted, ``"pickle"``.

    Raises:
        CheckpointError: if the file is damaged, or sound and of another kind.
    """
    file.seek(0)
    head = file.read(64)
    if head.startswith(b"PK"):
        return _recognise_archive(file, what, trust_pickle)
    if _MAGIC in head or len(head) < 16:
        if _is_tar(file):
            raise CheckpointError(
                f"{what} is a tar archive, as torch.save wrote before 0.1.10; torch.load and "
                "torch.save it again where it comes from"
            )
        return "legacy"
    if trust_pickle:
        return "pickle"
    raise CheckpointError(
        f"{what} is a plain pickle, not a file of torch.save: load it where it comes from, "
        "and torch.save the state dict in it; --trust-pickle reads it, and lets it run any "
        "code as you"
    )


def _recognise_archive(file: BinaryIO, what: str, trust_pickle: bool) -> str:
    try:
        _require_one_directory(file)
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        size = format_count(file.seek(0, os.SEEK_END), "byte")
        raise CheckpointError(
            f"{what} is damaged or truncated: torch cannot read its {size}"
        ) from error
    names = [entry.filename for entry in entries]
    if any(name.endswith("constants.pkl") for name in names):
        if not trust_pickle:
            raise CheckpointError(
                f"{what} is a TorchScript archive, which holds code; save the state dict instead, "
                "or let it run with --trust-pickle if you trust its origin"
            )
        return "script"
    if not any(name.endswith("/data.pkl") for name in names):
        raise CheckpointError(f"{what} is {_describe_archive(names)}")
    packed = [entry.filename for entry in entries if entry.compress_type != zipfile.ZIP_STORED]
    if packed:  # a few bytes may unpack to any size
        raise CheckpointError(
            f"{what} holds {quote_name(packed[0])} compressed, which torch.save never does; save "
            "it again with torch.save"
        )
    return "zip"


def _require_one_directory(file: BinaryIO) -> None:
    """Raise unless the directory of a zip archive stands right before its end, where that says.

    Another archive can hold two. Python's zipfile, which checks here, reads the one before the end;
    torch, which loads, the one at the place that the end states: an archive with code, say.

    Raises:
        zipfile.BadZipFile: if it stands elsewhere, or there is no end.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(max(size - _LONGEST_END, 0))
    rest = file.read()
    found = rest.rfind(b"PK\5\6")
    place, end = size - len(rest) + found, rest[found : found + _END]
    if found < 0 or len(end) < _END:
        raise zipfile.BadZipFile("it has no end")
    length, start = struct.unpack("<2L", end[12:20])
    if place >= _END_OF_LARGE:  # its numbers of 64 bits, and where these are
        file.seek(place - _END_OF_LARGE)
        large = file.read(_END_OF_LARGE)
        if large[56:60] == b"PK\6\7":
            place -= _END_OF_LARGE
            length, start = struct.unpack("<2Q", large[40:56])
            if large[:4] != b"PK\6\6" or struct.unpack("<Q", large[64:72]) != (place,):
                raise zipfile.BadZipFile("it has two ends")
    if start + length != place:
        raise zipfile.BadZipFile("its directory is not before its end")


def _is_tar(file: BinaryIO) -> bool:
    """Whether the file is a tar archive: torch's first format, which it would unpack to disk."""
    file.seek(0)
    try:
        tarfile.open(fileobj=file, mode="r:").close()
    except (tarfile.TarError, OSError, ValueError):
        return False
    return True


def _describe_archive(names: Sequence[str]) -> str:
    bare = {name.rpartition("/")[2] for name in names}
    if bare & {"archive_format", "serialized_exported_program.json"}:
        return (
            "a program of torch.export (.pt2), not a checkpoint; torch.save the state_dict of "
            "what torch.export.load returns"
        )
    if any("/.data/extern_modules" in f"/{name}" for name in names):
        return "a torch.package, which holds code; torch.save the state dict of what is in it"
    return (
        f"a zip archive of something else than a checkpoint: it holds {quote_names(names, 3)}"
        if names
        else "an empty zip archive"
    )
