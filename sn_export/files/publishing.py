"""Move files that belong together to their places: all of them, or none.

They come from a folder of drafts (`Drafts`), into which the files that they replace are moved.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from .paths import open_regular, require_place

LOCK, REPLACED, KEPT, PLAN = "lock", "replaced", "kept", "plan"
_LONGEST_PLAN = 2**27  # bytes: more of a plan is not read


def publish(moves: Sequence[tuple[Path, Path]], stale: Iterable[Path] = ()) -> None:
    """Move drafts to their places: all of them, or none, whenever the process is killed.

    The last file is the one that names the others: a model its data, an index its shards. It is
    moved aside first and into place last, so a kill in between leaves no such file, and never an
    old one with new others::

        net.onnx -> replaced/net.onnx              absent from here on
        net.onnx.data -> replaced/net.onnx.data
        made/net.onnx.data -> net.onnx.data
        made/net.onnx -> net.onnx                  the new pair from here on

    After a kill, the files that were moved aside are put back by the next process that writes
    there (`Drafts`). A single file replaces an old one in one step. Each step is flushed to the
    disk before the next one where the system can do that (fsync), so a power loss is like a kill.

    Args:
        moves: drafts, from `Drafts`, and their places; the one that names the others last. A
            folder alone, with files in it, is moved in one step too.
        stale: files that nobody reads afterwards, each beside one of the places.

    Raises:
        OSError: if a file cannot be moved, or there is something else than a file at its place;
            what was at the places is there again.
    """
    for made, place in moves:
        if not made.is_dir():
            require_place(place)
        for path in made.iterdir() if made.is_dir() else ():
            _flush(path)
        _flush(made)
    held = list[int]()
    try:
        try:
            _wait_until_alone(moves[-1][1].parent, held)
            _move_all(moves, stale)
        finally:
            _let_others_in(held)
    finally:  # an interrupt may stop the first, and other processes would wait for good
        _let_others_in(held)


def _wait_until_alone(folder: Path, held: list[int]) -> None:
    """Wait until no other process publishes in ``folder``, as ranks do that export one model.

    Two at once could move aside what the other has just put there. Where folders cannot be locked
    (Windows, some NFS), nothing prevents that.

    Args:
        folder: where files are going to be.
        held: receives the descriptor before it is locked, so that the caller can close it whenever
            an interrupt strikes.
    """
    with contextlib.suppress(ImportError, OSError):
        import fcntl

        held.append(os.open(folder, os.O_RDONLY))
        fcntl.flock(held[0], fcntl.LOCK_EX)


def _let_others_in(held: list[int]) -> None:
    """Release the lock; after an interrupt the call can be repeated."""
    while held:
        with contextlib.suppress(OSError):  # it was not locked
            import fcntl

            fcntl.flock(held[-1], fcntl.LOCK_UN)
        os.close(held.pop())


def _move_all(moves: Sequence[tuple[Path, Path]], stale: Iterable[Path]) -> None:
    last, done = moves[-1][0], list[tuple[Path, Path]]()
    phases = _plan_moves(moves, stale)
    if len(phases) > 1:
        _write_plan(last.parents[1], [pair for phase in phases for pair in phase])
    try:
        for phase in phases:
            for source, place in phase:
                done.append((source, place))
                os.replace(source, place)
            _flush_folders(path.parent for pair in phase for path in pair)
    except BaseException:
        if os.path.lexists(last):  # otherwise the last step was made, and all is in place
            _undo(done)
        raise


def _plan_moves(
    moves: Sequence[tuple[Path, Path]], stale: Iterable[Path]
) -> list[list[tuple[Path, Path]]]:
    """Return the moves in up to three groups, each of which is flushed before the next one.

    Example: ``net.onnx`` and its data are there, and new ones are in ``made/``::

        [[net.onnx -> replaced/net.onnx],
         [net.onnx.data -> replaced/net.onnx.data, made/net.onnx.data -> net.onnx.data],
         [made/net.onnx -> net.onnx]]
    """
    *others, (made, target) = moves
    aside = made.parent.with_name(REPLACED)
    removed = [(path, aside / path.name) for path in stale if os.path.lexists(path)]
    if not others and not removed:
        return [[(made, target)]]
    changed = removed
    for source, place in others:
        folder = source.parent.with_name(REPLACED)
        changed += [(place, folder / place.name)] if os.path.lexists(place) else []
        changed.append((source, place))
    first = [(target, aside / target.name)] if os.path.lexists(target) else []
    for _, place in (*first, *changed):
        if place.parent.name == REPLACED:
            place.parent.mkdir(exist_ok=True)
    return [first, changed, [(made, target)]]


def _write_plan(folder: Path, steps: Sequence[tuple[Path, Path]]) -> None:
    """Write the moves to a file, for the process that finds the folder after a kill."""
    paths = [[os.path.abspath(path) for path in pair] for pair in steps]
    plan = folder / PLAN
    plan.write_bytes(json.dumps({"lock": _identify(folder), "steps": paths}).encode())
    _flush(plan)
    _flush_folders([folder])


def take_back(folder: Path) -> None:
    """Take back the moves of a killed process, unless it had made the last one.

    A folder that was unpacked from an archive may hold any plan, which is not followed: a plan must
    name the number and the time that the disk has given the lock beside it. Numbers can be guessed,
    by an archive with many folders; the time, in nanoseconds, nobody can know or set.
    """
    try:
        with open_regular(folder / PLAN) as file:
            plan = json.loads(file.read(_LONGEST_PLAN))
        steps = [(Path(source), Path(place)) for source, place in plan["steps"]]
        made, target = steps[-1]
        is_ours = plan["lock"] == _identify(folder)
        if is_ours and os.path.lexists(made) and not os.path.lexists(target):
            _move_back(steps[:-1])
    except (OSError, ValueError, KeyError, TypeError, IndexError, RecursionError):
        return  # the plan is half written, so nothing was moved; or its folders are gone


def _identify(folder: Path) -> list[int]:
    """Return what only the disk knows of the lock; nothing where files cannot be locked."""
    with contextlib.suppress(FileNotFoundError):
        found = os.lstat(folder / LOCK)
        return [found.st_dev, found.st_ino, found.st_ctime_ns]
    return []


def _undo(done: Sequence[tuple[Path, Path]]) -> None:
    """Move back what was moved; no step replaces a file, so each can be repeated.

    Raises:
        OSError: if the disk refuses; the replaced files are then kept, and the message says where.
    """
    try:
        try:
            _move_back(done)
        except BaseException:  # an interrupt; a second one is not expected
            _move_back(done)
            raise
    except OSError as error:
        kept = {path.parent for _, path in done if path.parent.name == REPLACED and path.exists()}
        for folder in kept:
            folder.rename(folder.with_name(KEPT))
        where = ", ".join(f"'{folder.with_name(KEPT)}'" for folder in sorted(kept))
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
