"""Publishing: several files together or not at all, on whatever disk."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import kills
import pytest

from sn_export.files import drafts, publish

OLD = {"a": b"old a", "b": b"old b", "c": b"old c"}
NEW = {"a": b"new a", "b": b"new b", "c": b"new c"}


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _publish(folder: Path, names: str, stale: str = "") -> None:
    with ExitStack() as stack:
        moves = []
        for name in names:
            made = stack.enter_context(drafts(folder / name))
            made.write_bytes(NEW[name])
            moves.append((made, folder / name))
        publish(moves, [folder / name for name in stale])


def _write(folder: Path, names: str) -> None:
    for name in names:
        (folder / name).write_bytes(OLD[name])


def _fail_at(count: int, real: Callable[..., None], folder: Path, error: BaseException) -> object:
    calls = []

    def call(source: Path, place: Path) -> None:
        calls.append(place)
        if len(calls) == count:
            raise error
        real(source, place)

    return call


@pytest.mark.parametrize("earlier", ["", "a", "c", "ab", "abc"])
def test_files_take_the_place_of_others(tmp_path: Path, earlier: str) -> None:
    """The new files are there, the stale ones are gone, and nothing else is left."""
    _write(tmp_path, earlier)
    stale = "b" if "b" in earlier else ""
    _publish(tmp_path, "ac", stale)
    assert _contents(tmp_path) == {"a": b"new a", "c": b"new c"}


@pytest.mark.parametrize("refused", ["link", "symlink"])
def test_disk_without_links(tmp_path: Path, refused: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are replaced on a disk that has no hard links, as FAT and some network disks."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, refused, refuse)
    _write(tmp_path, "abc")
    _publish(tmp_path, "abc")
    assert _contents(tmp_path) == NEW


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), KeyboardInterrupt()])
@pytest.mark.parametrize("earlier", ["", "a", "c", "ac", "abc"])
@pytest.mark.parametrize("step", range(1, 7))
def test_failing_step_leaves_all_as_it_was(
    tmp_path: Path,
    earlier: str,
    step: int,
    error: BaseException,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whichever move fails, the error is raised and the folder is as before; else all is new."""
    _write(tmp_path, earlier)
    stale = "b" if "b" in earlier else ""
    steps = 2 + len(earlier)
    monkeypatch.setattr(os, "replace", _fail_at(step, os.replace, tmp_path, error))
    if step > steps:
        _publish(tmp_path, "ac", stale)
        assert _contents(tmp_path) == {"a": b"new a", "c": b"new c"}
        return
    with pytest.raises(type(error)):
        _publish(tmp_path, "ac", stale)
    assert _contents(tmp_path) == {name: OLD[name] for name in earlier}


@pytest.mark.parametrize("stride", [5])
def test_kill_at_any_step_leaves_the_old_files_or_the_new_ones(tmp_path: Path, stride: int) -> None:
    """A model is absent, old with its old files, or new with its new ones; the next run tidies up.

    External data or none before and after, a case beside it; a real process is really killed.
    """
    pairs = ["m-dm", "dm-m", "dm-dm", "m-m", "cdm-cdm"]
    program = Path(kills.__file__)
    ran = subprocess.run(
        [sys.executable, program, tmp_path, str(stride), *pairs],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert list(found) == pairs
    for pair, counts in found.items():
        assert counts.pop("left behind") == 0, pair
        assert set(counts) == {"old", "new"} | ({"absent"} if pair != "m-m" else set()), pair
        assert sum(counts.values()) > 20
