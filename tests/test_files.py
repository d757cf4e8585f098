"""Publishing: several files appear together or not at all, on any disk."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import kills
import pytest

from sn_export.errors import SnExportWarning
from sn_export.files import (
    Drafts,
    find_disk_error,
    open_regular,
    publish,
    require_writable,
    starts_as_onnx,
)

OLD = {"a": b"old a", "b": b"old b", "c": b"old c"}
NEW = {"a": b"new a", "b": b"new b", "c": b"new c"}


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _contents_of_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def _publish(folder: Path, names: str, stale: str = "") -> None:
    with Drafts() as drafts:
        moves = []
        for name in names:
            made = drafts.open(folder / name)
            made.write_bytes(NEW[name])
            moves.append((made, folder / name))
        publish(moves, [folder / name for name in stale])


def _publish_one(target: Path, content: bytes) -> None:
    with Drafts() as drafts:
        made = drafts.open(target)
        made.write_bytes(content)
        publish([(made, target)])


def _write(folder: Path, names: str) -> None:
    for name in names:
        (folder / name).write_bytes(OLD[name])


def _fail_at(
    count: int, real: Callable[..., None], folder: Path, error: BaseException
) -> Callable[..., None]:
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
    """Files are replaced on a disk without hard links, as FAT and some network disks."""

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
    """If a move fails, the error is raised and the folder is as before; otherwise all is new."""
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


@pytest.mark.parametrize("stride", [17])
def test_kill_at_any_step_leaves_the_old_files_or_the_new_ones(tmp_path: Path, stride: int) -> None:
    """After a kill the model is absent, old with its old files, or new with its new ones.

    The next run puts back an absent one, and leaves nothing behind. External data or none before
    and after, a case beside it; a real process is really killed.
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
        assert counts.pop("not put back") == counts.pop("left behind") == 0, pair
        assert set(counts) == {"old", "new"} | ({"absent"} if pair != "m-m" else set()), pair
        assert sum(counts.values()) > 5


_KILLED = """
import os, sys
from pathlib import Path
from sn_export.files import Drafts, publish

moves, left, real = [], int(sys.argv[2]), os.replace

def replace(source, place):
    global left
    left -= 1
    if left < 0:
        os._exit(9)
    real(source, place)

os.replace = replace
with Drafts() as drafts:
    for name in "ab":
        moves.append((drafts.open(Path(sys.argv[1], name)), Path(sys.argv[1], name)))
        moves[-1][0].write_text(f"new {name}")
    publish(moves)
"""


@pytest.mark.parametrize("moved", range(5))
def test_what_a_killed_process_moved_is_taken_back(tmp_path: Path, moved: int) -> None:
    """By the next that writes beside it, which then publishes its own; done is done."""
    _write(tmp_path, "ab")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    program = [sys.executable, "-c", _KILLED, tmp_path, str(moved)]
    ran = subprocess.run(program, env=environment, check=False)
    assert ran.returncode == (9 if moved < 4 else 0)
    _publish(tmp_path, "c")
    state = OLD if moved < 4 else NEW
    assert _contents(tmp_path) == {"a": state["a"], "b": state["b"], "c": NEW["c"]}
    _publish(tmp_path, "ab")
    assert _contents(tmp_path) == NEW


def _link(path: Path, to: Path | str) -> Path:
    path.symlink_to(to)
    return path


def _pipe(path: Path) -> Path:
    os.mkfifo(path)
    return path


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (_pipe, FileExistsError, "it is no regular file"),
        (lambda path: _link(path, "/dev/null"), FileExistsError, "it is no regular file"),
        (lambda path: _link(path, path), OSError, "Too many levels of symbolic links"),
        (lambda path: _link(path, path.parent), IsADirectoryError, "it is a folder"),
        (lambda path: path.parent, IsADirectoryError, "it is a folder"),
        (lambda path: path / "b", FileNotFoundError, "no folder '{parent}'"),
        (lambda path: _pipe(path) / "b", FileNotFoundError, "no folder '{parent}'"),
        (lambda path: path.with_name("x" * 256), OSError, "File name too long"),
    ],
    ids=["pipe", "device", "loop", "link-to-folder", "folder", "absent", "pipe-above", "long"],
)
def test_place_where_no_file_can_be(
    tmp_path: Path, make: Callable[[Path], Path], kind: type[OSError], message: str
) -> None:
    """A place that cannot hold a file is refused with its name and the reason."""
    target = make(tmp_path / "a")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(kind) as caught:
        require_writable(target)
    reason = message.format(parent=target.parent)
    assert str(caught.value) == f"cannot write '{target}': {reason}"
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.skipif(
    not Path("/proc/self").is_dir(), reason="no folder here takes no file from root"
)
def test_a_folder_that_takes_no_draft() -> None:
    """The error names the file that was wanted, and not the hidden folder of its draft."""
    target = Path("/proc/self/report.json")
    with pytest.raises(OSError) as caught, Drafts() as drafts:
        drafts.open(target)
    assert caught.value.filename == str(target)
    assert ".sn_export" not in str(caught.value)


def test_an_interrupt_while_moves_are_taken_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failed publishing that is interrupted as it puts the old files back goes on with that."""
    _write(tmp_path, "ab")
    before = _contents(tmp_path)
    # The fourth move is that of the new model, when all else is in its place.
    fail = _fail_at(4, os.replace, tmp_path, OSError(errno.EIO, "Input/output error"))
    interrupt = _fail_at(5, fail, tmp_path, KeyboardInterrupt())
    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        _publish(tmp_path, "ba")
    assert _contents(tmp_path) == before


def test_drafts_are_removed_where_an_interrupt_stops_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The removal goes on after one interrupt, and nothing of the folders is kept in the process.

    It reaches inside: a list that grows by a path for each file shows nowhere else.
    """
    from sn_export.files import drafts as module

    remove = module._remove

    def interrupt_once(folder: Path) -> None:
        monkeypatch.setattr(module, "_remove", remove)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_remove", interrupt_once)
    with pytest.raises(KeyboardInterrupt), Drafts() as drafts:
        drafts.open(tmp_path / "a").write_bytes(b"draft")
    assert list(tmp_path.iterdir()) == []
    assert module._own_folders == set()


def test_pipe_that_comes_in_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipe that replaces a file after the check is not read."""
    real, file = os.stat, tmp_path / "a"

    def look(path: Path, **options: bool) -> os.stat_result:
        found = real(path, **options)
        if path == file:
            file.unlink()
            os.mkfifo(file)
        return found

    file.touch()
    with monkeypatch.context() as patches, pytest.raises(OSError) as caught:
        patches.setattr(os, "stat", look)
        open_regular(file)
    found = (caught.value.errno, caught.value.strerror, caught.value.filename)
    assert found == (errno.EINVAL, "it is no regular file", str(file))


@pytest.mark.parametrize("make", [_pipe, lambda path: _link(path, "/dev/zero")])
def test_what_is_no_regular_file_is_not_opened(
    tmp_path: Path, make: Callable[[Path], Path]
) -> None:
    """A pipe would be waited for and a device read without end: the error names it."""
    path = make(tmp_path / "a")
    with pytest.raises(OSError) as caught:
        open_regular(path)
    assert (caught.value.strerror, caught.value.filename) == ("it is no regular file", str(path))


@pytest.mark.parametrize(
    ("head", "is_onnx"),
    [
        (b"\x08\x01\x12", True),
        (b"\x08\x1f", True),
        (b"\x08\x20\x12", False),
        (b"\x08\x00\x12", False),
        (b"\x0a\x01\x12", False),
        (b"\x08", False),
        (b"\x08" + bytes(7) + b"{", False),
        (b"\x08\x09" + bytes(6) + b"{", False),
        (b"\x08\x09" + bytes(6) + b'{"a":{', False),
    ],
)
def test_first_bytes_of_onnx(tmp_path: Path, head: bytes, is_onnx: bool) -> None:
    """An ONNX file begins with a small version; safetensors whose length looks so is none."""
    (tmp_path / "a").write_bytes(head)
    assert starts_as_onnx(tmp_path / "a") is is_onnx


def test_folders_that_cannot_be_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are published also where the system cannot flush a folder."""
    real = os.fsync

    def flush(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        real(descriptor)

    _write(tmp_path, "ab")
    monkeypatch.setattr(os, "fsync", flush)
    _publish(tmp_path, "ab")
    assert _contents(tmp_path) == {"a": b"new a", "b": b"new b"}


def test_path_with_a_zero_byte() -> None:
    """A path with a zero byte is refused, and the message escapes it."""
    with pytest.raises(ValueError, match=r"^cannot write 'a\\x00b': .*embedded null"):
        require_writable(Path("a\0b"))


@pytest.mark.parametrize("name", ["x" * 255, "\u00e9" * 127])
def test_longest_name(tmp_path: Path, name: str) -> None:
    """The longest name of the disk can be published: drafts have names of the same length."""
    _publish_one(tmp_path / name, b"new")
    assert (tmp_path / name).read_bytes() == b"new"


@pytest.mark.parametrize("is_there", [True, False])
def test_symbolic_link_is_replaced(tmp_path: Path, is_there: bool) -> None:
    """A link at the place is replaced; the file that it points to stays."""
    if is_there:
        (tmp_path / "other").write_bytes(b"other")
    target = _link(tmp_path / "a", "other")
    _publish_one(target, b"new")
    assert not target.is_symlink()
    assert target.read_bytes() == b"new"
    assert (tmp_path / "other").exists() is is_there


def test_those_that_publish_at_once_wait_for_each_other(tmp_path: Path) -> None:
    """Ranks that write one pair of files at once leave a matching pair, and none fails."""
    model, data = tmp_path / "net.onnx", tmp_path / "net.onnx.data"

    def write(text: str) -> None:
        with Drafts() as drafts:
            draft = drafts.open(model)
            made = draft.with_name(data.name)
            draft.write_text(text)
            made.write_text(text)
            publish([(made, data), (draft, model)])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, map(str, range(40))))
    assert sorted(tmp_path.iterdir()) == [model, data]
    assert model.read_text() == data.read_text()


@pytest.mark.parametrize("at", [(fcntl, "flock"), (os, "close"), (shutil, "rmtree")])
def test_interrupt_while_all_is_tidied(
    tmp_path: Path, at: tuple[Any, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files are in place, nothing is left beside them, and nobody waits for this process."""
    real, interrupts = getattr(*at), [KeyboardInterrupt]

    def call(*args: Any, **options: Any) -> Any:
        is_of_the_end = at[1] != "flock" or args[1] == fcntl.LOCK_UN
        if interrupts and is_of_the_end and (tmp_path / "b").read_bytes() == NEW["b"]:
            raise interrupts.pop()
        return real(*args, **options)

    _write(tmp_path, "ab")
    monkeypatch.setattr(*at, call)
    with pytest.raises(KeyboardInterrupt):
        _publish(tmp_path, "ab")
    assert not interrupts
    assert _contents(tmp_path) == {"a": b"new a", "b": b"new b"}
    folder = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(folder)


def test_folder_that_is_a_link(tmp_path: Path) -> None:
    """A link among the folders of the path is followed."""
    (tmp_path / "real").mkdir()
    _publish_one(_link(tmp_path / "link", "real") / "a", b"new")
    assert _contents(tmp_path / "real") == {"a": b"new"}


@pytest.mark.parametrize("is_cause", [True, False])
def test_disk_error_within_another(is_cause: bool) -> None:
    """A full disk is found as the cause of another error; other errors of a file are not."""
    full, outer = OSError(errno.ENOSPC, "No space left on device"), RuntimeError("torch's")
    if is_cause:
        outer.__cause__ = full
    else:
        outer.__context__ = full
    assert find_disk_error(outer) is full
    full.__context__ = outer  # a circle
    assert find_disk_error(full) is full
    assert find_disk_error(FileNotFoundError(errno.ENOENT, "No such file")) is None


def _leave_behind(folder: Path, number: int = 0) -> Path:
    """Make a folder of drafts as a killed process leaves it: its lock is there and not held."""
    left = folder / f".sn_export.killed{number}"
    (left / "made").mkdir(parents=True)
    (left / "made" / "a").write_bytes(b"half")
    (left / "lock").touch()
    return left


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    """Folders of killed processes are removed, also empty ones without a lock."""
    left = _leave_behind(tmp_path)
    (tmp_path / ".sn_export.empty").mkdir()
    _publish_one(tmp_path / "b", b"new")
    assert not left.exists()
    assert _contents(tmp_path) == {"b": b"new"}


def test_what_a_living_process_uses_stays(tmp_path: Path) -> None:
    """Drafts of living processes and of this one stay, and so do other folders.

    What killed ones have left among these goes, in whatever order they are met.
    """
    program = (
        "import sys, pathlib, sn_export.files as files\n"
        "with files.Drafts() as drafts:\n"
        "    print(drafts.open(pathlib.Path(sys.argv[1])), flush=True); input()"
    )
    (tmp_path / ".sn_export.txt").write_text("somebody's own")
    (tmp_path / ".sn_export.link").symlink_to(tmp_path)
    with (
        subprocess.Popen(
            [sys.executable, "-c", program, tmp_path / "a"],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as process,
        Drafts() as drafts,
    ):
        own = drafts.open(tmp_path / "a")
        assert process.stdin is not None and process.stdout is not None
        others = Path(process.stdout.readline().strip())
        for number in range(20):
            _leave_behind(tmp_path, number)
        opened = len(os.listdir("/proc/self/fd"))
        _publish_one(tmp_path / "b", b"new")
        assert len(os.listdir("/proc/self/fd")) == opened
        assert others.parent.is_dir()
        assert own.parent.is_dir()
        assert not [*tmp_path.glob(".sn_export.killed*")]
        process.stdin.write("\n")
    assert {path.name for path in tmp_path.iterdir()} == {".sn_export.txt", ".sn_export.link", "b"}


@pytest.mark.parametrize(
    ("lock", "reason"),
    [
        ("file", "No locks available"),
        ("none", "No such file or directory"),
        ("link", "Too many levels of symbolic links"),
        ("system", "this system has no flock"),
    ],
)
def test_where_locks_fail_nothing_is_removed(
    tmp_path: Path, lock: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where locks fail files are published, and folders of other processes stay, with a warning.

    So it does where it has no lock of its own, but one that came out of an archive.
    """

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    left = _leave_behind(tmp_path)
    if lock == "file":
        monkeypatch.setattr(fcntl, "flock", refuse)
    elif lock == "system":
        monkeypatch.setitem(sys.modules, "fcntl", None)
    else:
        (left / "lock").unlink()
    if lock == "link":
        (left / "lock").symlink_to("made/a")
    with pytest.warns(SnExportWarning) as caught:
        _publish_one(tmp_path / "b", b"new")
    (warning,) = caught
    assert str(warning.message) == (
        f"'{left}' may be left from a process that was killed, or in use by one; nobody can tell "
        f"(locking it fails: {reason}), so it stays. Remove it if nothing is being exported there"
    )
    assert (left / "made" / "a").read_bytes() == b"half"
    assert {path.name for path in tmp_path.iterdir()} == {left.name, "b"}


def test_failure_to_undo_keeps_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the disk refuses all moves, the old files are kept, and the error says where."""
    _write(tmp_path, "abc")
    real, calls = os.replace, []

    def replace(source: Path, place: Path) -> None:
        calls.append(place)
        if len(calls) > 2:
            raise OSError(errno.EIO, "Input/output error")
        real(source, place)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OSError, match="Input/output error; what was there is now in") as caught:
        _publish(tmp_path, "abc")
    monkeypatch.undo()
    assert caught.value.errno == errno.EIO
    kept = [path for path in tmp_path.iterdir() if path.is_dir()]
    assert all(f"'{path / 'kept'}'" in str(caught.value) for path in kept)
    found = {file.name: file.read_bytes() for path in kept for file in (path / "kept").iterdir()}
    assert found | {n: c for n, c in _contents_of_files(tmp_path).items()} == OLD
    _publish_one(tmp_path / "d", b"new")
    assert all((path / "kept").is_dir() for path in kept)


@pytest.mark.parametrize("wrong", [None, "disk", "number", "time"])
def test_plan_that_came_from_elsewhere_is_not_followed(tmp_path: Path, wrong: str | None) -> None:
    """A folder of drafts from an archive is removed, and its plan moves no file.

    One's own plan is followed back: the old model, which had been moved aside, is there again.
    What the disk knows of the lock tells them apart, and all of it counts: an archive with many
    folders can guess numbers.
    """
    left = _leave_behind(tmp_path)
    (left / "replaced").mkdir()
    (left / "replaced" / "a").write_bytes(b"old")
    (tmp_path / "data").write_bytes(b"new")
    steps = [
        [tmp_path / "a", left / "replaced" / "a"],
        [left / "made" / "data", tmp_path / "data"],
        [left / "made" / "a", tmp_path / "a"],
    ]
    lock = (left / "lock").stat()
    known = {"disk": lock.st_dev, "number": lock.st_ino, "time": lock.st_ctime_ns}
    plan = {"lock": [known[key] + (key == wrong) for key in known], "steps": steps}
    (left / "plan").write_text(json.dumps(plan, default=str))
    _publish_one(tmp_path / "b", b"new")
    expected = {"data": b"new"} if wrong else {"a": b"old"}
    assert _contents(tmp_path) == {**expected, "b": b"new"}


def test_each_step_is_on_the_disk_before_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each step is flushed before the next one, so a power loss is like a kill."""
    done, sync, replace = list[str](), os.fsync, os.replace

    def flush(descriptor: int) -> None:
        name = Path(f"/proc/self/fd/{descriptor}").readlink().name
        done.append(f"flush {'drafts' if name.startswith('.sn_export.') else name}")
        sync(descriptor)

    def move(source: Path, place: Path) -> None:
        done.append(f"{source.parent.name} to {place.parent.name}/{place.name}")
        replace(source, place)

    _write(tmp_path, "ab")
    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(os, "replace", move)
    _publish(tmp_path, "ab")
    here = tmp_path.name
    assert done == [
        *("flush a", "flush b", "flush plan", "flush drafts"),
        *(f"{here} to replaced/b", f"flush {here}", "flush replaced"),
        *(f"{here} to replaced/a", f"made to {here}/a"),
        *(f"flush {here}", "flush replaced", "flush made"),
        *(f"made to {here}/b", "flush made", f"flush {here}"),
    ]


def test_files_of_a_folder_are_on_the_disk_before_it_moves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder of several files is published in one step, and no file in it is flushed too late."""
    flushed, sync, replace = set[str](), os.fsync, os.replace

    def flush(descriptor: int) -> None:
        flushed.add(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        sync(descriptor)

    def move(source: Path, place: Path) -> None:
        assert flushed >= {"a", "b", "folder"}
        replace(source, place)

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(os, "replace", move)
    with Drafts() as drafts:
        made = drafts.open(tmp_path / "folder")
        made.mkdir()
        _write(made, "ab")
        publish([(made, tmp_path / "folder")])
    assert _contents(tmp_path / "folder") == {"a": OLD["a"], "b": OLD["b"]}


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"lock": 1, "steps": [["a"]]}', "\u0000", "[" * 10**5]
)
def test_plan_that_was_half_written(tmp_path: Path, text: str) -> None:
    """A plan that is half written is ignored: the kill came before the first move."""
    left = _leave_behind(tmp_path)
    (left / "plan").write_text(text)
    _publish_one(tmp_path / "b", b"new")
    assert _contents(tmp_path) == {"b": b"new"}


@pytest.mark.parametrize("kind", ["pipe", "endless device", "folder"])
def test_plan_that_is_no_file(tmp_path: Path, kind: str) -> None:
    """An archive may hold a pipe or a link in the place of a plan: nothing waits, or reads on."""
    plan = _leave_behind(tmp_path) / "plan"
    {"pipe": os.mkfifo, "endless device": _link_to_zeros, "folder": Path.mkdir}[kind](plan)
    _publish_one(tmp_path / "b", b"new")
    assert (tmp_path / "b").read_bytes() == b"new"


def _link_to_zeros(path: Path) -> None:
    path.symlink_to("/dev/zero")


def test_folder_of_another_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where several users write to one folder, drafts of another one stay, and stop nobody."""
    left = _leave_behind(tmp_path)

    def refuse_inside(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, *args: Any, **options: Any) -> Any:
            if str(path).startswith(f"{left}/"):
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return real(path, *args, **options)

        return call

    for name in ("stat", "lstat", "open"):
        monkeypatch.setattr(os, name, refuse_inside(getattr(os, name)))
    with pytest.warns(
        SnExportWarning, match=r"\(locking it fails: Permission denied\), so it stays"
    ):
        _publish_one(tmp_path / "b", b"new")
    assert (tmp_path / "b").read_bytes() == b"new"


def _fill(path: Path) -> None:
    path.mkdir()
    (path / "own").write_bytes(b"mine")


@pytest.mark.parametrize("name", "ab")
@pytest.mark.parametrize(
    "make",
    [os.mkfifo, _fill, lambda path: path.symlink_to(path.name)],
    ids=["pipe", "folder", "loop"],
)
def test_files_alone_are_replaced(
    make: Callable[[Path], object], name: str, tmp_path: Path
) -> None:
    """What is no file stays, whichever of the places it is at: of data, of a shard, of an index."""
    make(tmp_path / name)
    before = {path: path.lstat().st_ino for path in tmp_path.rglob("*")}
    with pytest.raises(OSError, match=f"cannot write '.*{name}': "):
        _publish(tmp_path, "ab")
    assert {path: path.lstat().st_ino for path in tmp_path.rglob("*")} == before
