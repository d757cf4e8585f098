"""Kill a process at each step of something in turn; as a program, at each step of publishing."""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import Any

from sn_export import files

Contents = Mapping[str, bytes]
# What audit hooks hear of that changes the disk; fsync and flock have lines of their own.
_EVENTS = ("os.", "open", "shutil.", "tempfile.", "fcntl.")


class _Killer:
    """Kills its own process at the n-th line of files.py, or call to the system, from now on."""

    def __init__(self, step: int) -> None:
        self.left = step

    def count(self) -> None:
        self.left -= 1
        if not self.left:
            os.kill(os.getpid(), signal.SIGKILL)

    def __call__(self, frame: FrameType, event: str, arg: object) -> Any:
        if frame.f_code.co_filename != files.__file__:
            return None
        if event == "line":
            self.count()
        return self

    def hear(self, event: str, args: object) -> None:
        if event.startswith(_EVENTS):
            self.count()


def killed_at(step: int, work: Callable[[], None]) -> bool:
    """Do ``work`` in a child that is killed at its n-th step; return whether it came so far."""
    return in_child(lambda: _die(work, step))


def in_child(work: Callable[[], None]) -> bool:
    """Do ``work`` in a child process; return whether it was killed."""
    child = os.fork()
    if not child:
        try:
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return os.WTERMSIG(status) == signal.SIGKILL
    assert not os.WEXITSTATUS(status), "the work itself failed"
    return False


def _die(work: Callable[[], None], step: int) -> None:
    killer = _Killer(step)
    sys.addaudithook(killer.hear)
    sys.settrace(killer)
    work()


def contents(folder: Path) -> dict[str, bytes]:
    """Return what is in the files of a folder, without those of killed processes."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


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
    with ExitStack() as stack:
        moves = []
        for name, content in new.items():
            made = stack.enter_context(files.drafts(folder / name))
            made.write_bytes(content)
            moves.append((made, folder / name))
        files.publish(moves, [folder / name for name in stale])


def _write(folder: Path, old: Contents) -> None:
    for name in contents(folder):
        (folder / name).unlink()
    for name, content in old.items():
        (folder / name).write_bytes(content)


def try_every_step(folder: Path, earlier: str, wanted: str, stride: int) -> dict[str, int]:
    """Kill publishing at each step, or every few; count the verdicts.

    After each kill the same is published once more, and must leave the new files alone.

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
        _write(folder, old)
        if not killed_at(step, lambda: publish(folder, new, stale)):
            return dict(counts)
        counts[verdict(contents(folder), old, final, wanted[-1])] += 1
        publish(folder, new, [name for name in stale if (folder / name).exists()])
        counts["left behind"] += {path.name for path in folder.iterdir()} != set(final)
    raise AssertionError


def main() -> None:
    """Print what `try_every_step` counts, for each ``earlier-wanted`` among the arguments."""
    folder, stride, *pairs = sys.argv[1:]
    found = {pair: try_every_step(Path(folder), *pair.split("-"), int(stride)) for pair in pairs}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
