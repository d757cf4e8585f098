"""Files of unknown origin: nothing in them runs, waits, or takes more memory than the file has."""

from __future__ import annotations

import builtins
import collections
import copyreg
import io
import os
import pickle
import struct
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hostile_pickles import CODE, FORMATS, hostile_pickles, with_protocol

from sn_export.checkpoints import Checkpoint, pickle_globals, read_checkpoint, unpickling
from sn_export.errors import CheckpointError

ATTEMPTS = hostile_pickles(Path("trace"))
WATCHED: tuple[Any, ...] = (
    *(os, sys, builtins, pickle, copyreg, collections, torch, torch.Tensor, torch.Size),
    *(torch.serialization, torch._utils, torch.UntypedStorage, torch.storage.TypedStorage),
    *(dcp.metadata, dcp.filesystem, dcp.metadata.Metadata, dcp.metadata.MetadataIndex),
    *(pickle_globals, pickle_globals.Global, pickle_globals.Unread, unpickling),
    unpickling.RestrictedUnpickler,
)


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Work in a new folder, with an extension in the registry that makes folders."""
    monkeypatch.chdir(tmp_path)
    copyreg.add_extension("posix", "mkdir", CODE)
    yield
    copyreg.remove_extension("posix", "mkdir", CODE)


@pytest.mark.parametrize("attempt", ATTEMPTS)
@pytest.mark.parametrize("form", FORMATS)
def test_nothing_runs(form: str, attempt: str, tmp_path: Path) -> None:
    """Whatever a pickle wants, in whatever format, ends in one error, and nothing has happened."""
    path = FORMATS[form](tmp_path / "hostile", with_protocol(ATTEMPTS[attempt]))
    before, files = _state(), sorted(tmp_path.rglob("*"))
    with pytest.raises(CheckpointError) as caught:
        _read_everything(read_checkpoint(path))
    assert "unexpected" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == files
    assert _state() == before


def test_the_metadata_of_a_rank_is_not_read(tmp_path: Path) -> None:
    """If '.metadata' is of no use, the metadata of a single rank is not read instead."""
    path = FORMATS["metadata"](tmp_path / "hostile", pickle.dumps(None))
    (path / "__0.metadata").write_bytes(with_protocol(ATTEMPTS["call posix.mkdir"]))
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(path)
    assert str(caught.value) == (
        f"folder '{path}' is damaged or incomplete: '.metadata' holds a value of type "
        "'NoneType', not its records"
    )
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("attempt", ["call posix.mkdir", "INST", "OBJ", "EXT1"])
def test_the_attempts_are_real(attempt: str, tmp_path: Path) -> None:
    """Python's own unpickler runs each attempt, so the test above would notice."""
    pickle.loads(with_protocol(ATTEMPTS[attempt]))
    assert (tmp_path / "trace").is_dir()


@pytest.mark.parametrize("ends", ["32 bits", "64 bits"])
def test_an_archive_has_one_directory(ends: str, tmp_path: Path) -> None:
    """An archive that shows one list of entries to zipfile, and one with code to torch, is refused.

    torch.jit.load would run the TorchScript in it.
    """
    hidden, shown, path = tmp_path / "hidden.pt", tmp_path / "shown.pt", tmp_path / "both.pt"
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(2)), hidden)  # type: ignore[no-untyped-call]
    torch.save(torch.nn.Linear(2, 2).state_dict(), shown)
    path.write_bytes(_join_archives(hidden, shown, ends))
    with zipfile.ZipFile(path) as archive:
        assert "shown/data.pkl" in archive.namelist()
    assert torch._C.PyTorchFileReader(str(path)).has_record("constants.pkl")
    with pytest.raises(CheckpointError, match="is damaged or truncated: torch cannot read its"):
        read_checkpoint(path)


def _join_archives(hidden: Path, shown: Path, ends: str) -> bytes:
    """Return ``hidden`` with its directory, that of ``shown``, and ends that lead to either."""
    whole, (start, first, count) = hidden.read_bytes(), _directory(hidden)
    _, last, _ = _directory(shown)
    if ends == "32 bits":  # both have one length: a comment fills up the shorter
        spare = len(first) - len(last)
        comment = last.rindex(b"PK\1\2") + 32
        last = last[:comment] + struct.pack("<H", spare) + last[comment + 2 :] + b" " * spare
        end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, count, count, len(first), start, 0)
        return whole[:start] + first + last + end

    def large(length: int, at: int) -> bytes:
        return struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, length, at)

    place = start + len(first)
    locator = struct.pack("<4sLQL", b"PK\6\7", 0, place, 1)
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 2**16 - 1, 2**16 - 1, 2**32 - 1, 2**32 - 1, 0)
    joined = whole[:start] + first + large(len(first), start) + last
    return joined + large(len(last), place + 56) + locator + end


def _directory(path: Path) -> tuple[int, bytes, int]:
    with zipfile.ZipFile(path) as archive:
        start, count = archive.start_dir, len(archive.infolist())
    content = path.read_bytes()
    length = struct.unpack("<L", content[-10:-6])[0]
    return start, content[start : start + length], count


def test_archives_of_every_length_are_read(tmp_path: Path) -> None:
    """Archives with a comment, with bytes behind the end, or of zipfile itself are read as ever."""
    path, again = tmp_path / "a.pt", tmp_path / "b.pt"
    torch.save({"w": torch.ones(2)}, path)
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(again, "w") as copied:
        copied.comment = b"a comment"
        for name in archive.namelist():
            copied.writestr(name, archive.read(name))
    path.write_bytes(path.read_bytes() + bytes(100))
    for one in (path, again):
        assert torch.equal(read_checkpoint(one).content["w"], torch.ones(2))


def _read_everything(checkpoint: Checkpoint) -> None:
    for state in checkpoint.state_dicts():
        for name in state.tensors:
            state.tensors[name]
    if not checkpoint.state_dicts():
        raise CheckpointError("there is nothing in it")


def _state() -> list[Any]:
    names = [{name: id(value) for name, value in vars(one).items()} for one in WATCHED]
    # Caches of the interpreter and of torch, which reading anything fills.
    passing = ("__warningregistry__", "last_value", "last_type", "last_traceback")
    for one in names:
        for name in passing:
            one.pop(name, None)
    return [*names, dict(os.environ), list(sys.path)]


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("torch.distributed.checkpoint.metadata\n_MEM_FORMAT_ENCODING", "TORCH_PRESERVE_FORMAT"),
        ("torch.distributed.checkpoint.metadata\n_MEM_FORMAT_ENCODING", "__class__"),
        ("torch.distributed.checkpoint.metadata\n_MEM_FORMAT_ENCODING", "_member_map_"),
        ("torch.distributed.checkpoint.metadata\nMetadata", "__init__"),
        ("builtins\ndict", "fromkeys"),
    ],
)
def test_members_by_name_and_nothing_else(kind: str, name: str) -> None:
    """A member of an enumeration may be pickled by ``getattr``, as Python 3.11.0 to 3.11.3 does."""
    pickled = f"cbuiltins\ngetattr\n(c{kind}\nV{name}\ntR.".encode()
    unpickler = unpickling.RestrictedUnpickler(io.BytesIO(pickled))
    if name.startswith("TORCH"):
        assert unpickler.load() is dcp.metadata._MEM_FORMAT_ENCODING[name]
    else:
        with pytest.raises(pickle_globals.ForbiddenPickleError, match=r"call 'builtins\.getattr'"):
            unpickler.load()
