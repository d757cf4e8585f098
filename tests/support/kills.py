"""Kill a process at each step of something in turn; as a program, at each step of publishing."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from sn_export import files

Contents = Mapping[str, bytes]
# What audit hooks hear of that changes the disk; fsync and flock have lines of their own.
_EVENTS = ("os.", "open", "shutil.", "tempfile.", "fcntl.")
_WATCHED = str(Path(files.__file__).parent)


class _Killer:
    """Kills its own process at the n-th line of `sn_export.files`, or call to the system.

    It counts from the first line of the function ``since``.
    """

    def __init__(self, step: int, since: str) -> None:
        self.left = step
        self.since = since
        self.has_begun = False

    def count(self) -> None:
        self.left -= self.has_begun
        if not self.left:
            os.kill(os.getpid(), signal.SIGKILL)

    def __call__(self, frame: FrameType, event: str, arg: object) -> Any:
        if not frame.f_code.co_filename.startswith(_WATCHED):
            return None
        self.has_begun = self.has_begun or frame.f_code.co_name == self.since
        if event == "line":
            self.count()
        return self

    def hear(self, event: str, args: object) -> None:
        if event.startswith(_EVENTS):
            self.count()


def killed_at(step: int, work: Callable[[], None], since: str = "open") -> bool:
    """Do ``work`` in a child that is killed at its n-th step; return whether it came so far."""
    return in_child(lambda: _die(work, step, since))


def in_child(work: Callable[[], None], seconds: float | None = None) -> bool:
    """Do ``work`` in a child process, and kill it after some time; return whether it was killed."""
    child = os.fork()
    if not child:
        try:
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return os.WTERMSIG(status) == signal.SIGKILL
    assert not os.WEXITSTATUS(status), "the work itself failed"
    return False


def _die(work: Callable[[], None], step: int, since: str) -> None:
    killer = _Killer(step, since)
    sys.addaudithook(killer.hear)
    sys.settrace(killer)
    work()


def contents(folder: Path) -> dict[str, bytes]:
    """Return what is in the files of a folder and below, without those of killed processes."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.relative_to(folder).parts[0].startswith(".sn_export.")
    }


def verdict(found: Contents, old: Contents, new: Contents, last: str) -> str:
    """Say what a kill left: ``"old"``, ``"new"``, ``"absent"``, or ``"TORN"``.

    Args:
        found: what is there.
        old: what was there.
        new: what was to be there.
        last: name of the file by which the others are found.
    """
    if found == old:
        return "old"
    if found == new:
        return "new"
    return "TORN" if last in found else "absent"


def publish(folder: Path, new: Contents, stale: Sequence[str]) -> None:
    """Publish files in the way of the package; the last one names the others."""
    with files.Drafts() as drafts:
        moves = []
        for name, content in new.items():
            made = drafts.open(folder / name)
            made.write_bytes(content)
            moves.append((made, folder / name))
        files.publish(moves, [folder / name for name in stale])


def fill(folder: Path, files: Contents) -> None:
    """Let a folder hold these files and nothing else."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    for name, content in files.items():
        (folder / name).write_bytes(content)


def try_every_step(folder: Path, earlier: str, wanted: str, stride: int) -> dict[str, int]:
    """Kill publishing at each step, or every few; count the verdicts.

    After each kill the folder is written to, which must put back what was moved aside; then the
    same is published once more, and must leave the new files alone.

    Args:
        folder: where to; its files are deleted.
        earlier: letters, one for each file that is there: c(ase), d(ata), m(odel).
        wanted: letters of the files to publish; the last one names the others.
        stride: how many steps lie between two kills.
    """
    old = {name: f"old {name}".encode() for name in earlier}
    new = {name: f"new {name}".encode() for name in wanted}
    # As for external data, which goes where nothing reads it; a case of one's own stays.
    stale = ["d"] if "d" in earlier and "d" not in wanted else []
    final = new | {name: old[name] for name in earlier if name not in (*wanted, *stale)}
    counts: Counter[str] = Counter()
    for step in itertools.count(1, stride):
        fill(folder, old)
        if not killed_at(step, lambda: publish(folder, new, stale)):
            return dict(counts)
        counts[verdict(contents(folder), old, final, wanted[-1])] += 1
        with files.Drafts() as drafts:
            drafts.open(folder / "x")
        counts["not put back"] += contents(folder) not in (old, final)
        publish(folder, new, [name for name in stale if (folder / name).exists()])
        counts["left behind"] += {path.name for path in folder.iterdir()} != set(final)
    raise AssertionError


def main() -> None:
    """Print what `try_every_step` counts, for each ``earlier-wanted`` among the arguments."""
    folder, stride, *pairs = sys.argv[1:]
    found = {}
    for pair in pairs:
        earlier, _, wanted = pair.partition("-")
        found[pair] = try_every_step(Path(folder), earlier, wanted, int(stride))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
