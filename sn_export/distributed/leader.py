"""One rank leads: an action that it calls runs on every rank, until it sends a verdict.

The other ranks follow, and return or raise what the verdict says. After each action all ranks
agree on whether one of them failed, so that no rank waits in a collective call that another rank
never reaches.
"""

from __future__ import annotations

import contextlib
import pickle
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from ..errors import ExportError, SnExportError
from ..text import describe_error

T = TypeVar("T")

_TO_COME = timedelta(minutes=5)  # until all ranks have called
_TO_LEAD = timedelta(days=7)  # while the first rank exports and proves, and the others wait
_TO_PART = timedelta(minutes=1)  # from the verdict until all ranks leave

Call = Callable[..., Any]  # the name of an action and its arguments


class Team:
    """Ranks that act together, over a process group of their own.

    Args:
        ranks: all of them, in ascending order; the first one leads.

    Attributes:
        actions: functions that the first rank can call on all, by name; the same on every rank.
        checking: names of the actions that call `check` while they run: an interrupt reaches them
            at once, and other actions at their end.

    Raises:
        ExportError: if not all ranks make their team within five minutes.
    """

    def __init__(self, ranks: Sequence[int]) -> None:
        self.actions: dict[str, Callable[..., Any]] = {}
        self.checking: tuple[str, ...] = ()
        self.leads = dist.get_rank() == ranks[0]
        self._ranks = ranks
        self._is_world = len(ranks) == dist.get_world_size()
        self._failure: BaseException | None = None
        self._exit: BaseException | None = None  # an interrupt of this rank, to be raised later
        try:
            with self._interrupts_held():  # otherwise a rank that has come would wait in vain
                self._group = dist.new_group(
                    ranks, _TO_COME, "gloo", use_local_synchronization=not self._is_world
                )
        except dist.DistStoreError as error:
            raise ExportError(
                "a sharded model is exported by a call on every rank, and after "
                f"{_TO_COME} not all of the ranks {list(ranks)} have called"
            ) from error
        self._group.set_timeout(_TO_LEAD)

    def run(self, lead: Callable[[Call], T], share: Callable[[T], T]) -> T:
        """Return on every rank what ``lead`` returns on the first, or raise what it raises.

        Args:
            lead: called on the first rank, with a function that runs an action on all ranks.
            share: makes of the result what the other ranks return, which must be picklable.

        Raises:
            ExportError: if another rank was interrupted, or is gone.
        """
        try:
            result: T = self._lead(lead, share) if self.leads else self._follow()
        finally:
            self._leave_group()
        if self._exit is not None:
            raise self._exit
        return result

    def check(self) -> None:
        """Raise if a rank has failed; a collective call, for actions that take long."""
        if self._failure is None:
            self._agree(self._exit)
        if self._failure is not None:
            raise self._failure

    def _lead(self, lead: Callable[[Call], T], share: Callable[[T], T]) -> T:
        try:
            result = lead(self._call)
            verdict = pickle.dumps(share(result))
        except _RankLeftError as left:
            self._end(ExportError(str(left)))
            raise ExportError(str(left)) from None
        except BaseException as error:
            self._end(_make_portable(error, self._ranks[0]))
            raise
        self._say(("returned", verdict))
        return result

    def _end(self, error: Exception) -> None:
        with contextlib.suppress(RuntimeError):  # a rank is gone, as `error` says
            self._say(("raised", error))

    def _call(self, name: str, *args: Any) -> Any:
        self._say((name, args))
        result = self._act(name, args)
        if self._failure is not None:
            raise self._failure
        return result

    def _follow(self) -> Any:
        while True:
            name, content = self._hear()
            if name in ("returned", "raised"):
                break
            self._act(name, content)
        if name == "raised":
            raise self._exit or content
        return pickle.loads(content)

    def _act(self, name: str, args: Sequence[Any]) -> Any:
        """Run an action on this rank if no rank has failed, and agree on whether it succeeded."""
        result, error = None, None
        self._failure = None
        self._agree(self._exit)
        if self._failure is not None:
            return None
        try:
            with contextlib.nullcontext() if name in self.checking else self._interrupts_held():
                result = self.actions[name](*args)
        except BaseException as caught:  # every rank gets to know it below
            error = caught
            if not isinstance(caught, Exception) and self._failure is None:
                self._exit = caught
        if self._failure is None:
            self._agree(error or self._exit)
        return result

    def _agree(self, error: BaseException | None) -> None:
        """Exchange errors with all ranks, and keep in ``_failure`` that of the lowest rank."""
        with self._interrupts_held():
            failed = torch.tensor([error is not None], dtype=torch.uint8)
            dist.all_reduce(failed, dist.ReduceOp.MAX, self._group)
            if not failed.item():
                return
            told = None if error is None else _make_portable(error, dist.get_rank())
            everyone: list[Any] = [None] * len(self._ranks)
            leaves = error is not None and not isinstance(error, Exception)
            dist.all_gather_object(everyone, (told, leaves), self._group)
        if error is not None:
            self._failure = error
            return
        rank, found, has_left = next(
            (rank, one, leaves)
            for rank, (one, leaves) in zip(self._ranks, everyone, strict=True)
            if one is not None
        )
        text = str(found) if has_left or isinstance(found, SnExportError) else describe_error(found)
        kind = _RankLeftError if has_left else SnExportError
        self._failure = kind(text if has_left else f"rank {rank}: {text}")

    def _say(self, message: tuple[str, Any]) -> None:
        with self._interrupts_held():
            dist.broadcast_object_list([message], self._ranks[0], self._group)

    def _hear(self) -> tuple[str, Any]:
        heard: list[Any] = [None]
        try:
            with self._interrupts_held():
                dist.broadcast_object_list(heard, self._ranks[0], self._group)
        except RuntimeError as error:
            raise ExportError(
                f"rank {self._ranks[0]}, which exports for all, cannot be reached any more: {error}"
            ) from error
        message: tuple[str, Any] = heard[0]
        return message

    @contextlib.contextmanager
    def _interrupts_held(self) -> Iterator[None]:
        """Keep what a Ctrl-C raises until all ranks agree the next time, or until the end."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        struck: list[tuple[Any, ...]] = []
        handler = signal.signal(signal.SIGINT, lambda *given: struck.append(given))
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, handler)
            try:
                if struck and callable(handler):
                    handler(*struck[0])
            except BaseException as raised:
                self._exit = raised

    def _leave_group(self) -> None:
        """Leave the group once every rank has ended its last call in it."""
        with contextlib.suppress(RuntimeError), self._interrupts_held():
            self._group.set_timeout(_TO_PART)
            dist.barrier(self._group)
            # A group of a part of the ranks stays until the process ends: torch 2.13 would give its
            # name to the next such group, which would then find the old addresses.
            if self._is_world:
                dist.destroy_process_group(self._group)


class _RankLeftError(BaseException):
    """Another rank was interrupted. It is no Exception, so that no model or proof can catch it."""


def _make_portable(error: BaseException, rank: int) -> Exception:
    """Return ``error``, or an ExportError with its text where it cannot be sent to other ranks."""
    if not isinstance(error, Exception):
        return ExportError(f"rank {rank} has left with {type(error).__name__}")
    try:
        copied = pickle.loads(pickle.dumps(error))
    except Exception:
        copied = None
    if type(copied) is not type(error) or str(copied) != str(error):
        return ExportError(describe_error(error))
    return error
