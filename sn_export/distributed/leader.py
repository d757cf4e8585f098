"""The first rank leads: what it calls runs on every rank, and one verdict of its own ends it.

The others follow until that verdict. An error on any rank is known to all before the next step, so
that no rank waits in a collective call that another one never reaches.
"""

from __future__ import annotations

import contextlib
import pickle
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist

from ..errors import ExportError, SnExportError

T = TypeVar("T")

_TO_COME = timedelta(minutes=5)  # for all ranks to have called
_TO_LEAD = timedelta(days=7)  # for the first one to export and prove, while the others wait
_TO_PART = timedelta(minutes=1)  # after the verdict

Call = Callable[..., Any]  # the name of an action and its arguments


class Team:
    """Ranks that act together, over a process group of their own.

    Args:
        ranks: all of them, in ascending order; the first one leads.

    Attributes:
        actions: what the first rank can call, by name; the same on every rank.
        checking: names of those that call `check` on the way, so that they can be interrupted.

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
        self._exit: BaseException | None = None  # of this rank, an interrupt say: not raised yet
        try:
            with self._interrupts_held():  # who has come is waited for
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
            lead: called on the first rank, with a function that runs an action on all.
            share: what the other ranks get of the result; it can be pickled.

        Raises:
            ExportError: if another rank was interrupted, or is gone.
        """
        try:
            result: T = self._lead(lead, share) if self.leads else self._follow()
        finally:
            self._part()
        if self._exit is not None:
            raise self._exit
        return result

    def check(self) -> None:
        """Raise if another rank failed; a collective call, for the midst of an action."""
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
            self._end(_portable(error, self._ranks[0]))
            raise
        self._say(("returned", verdict))
        return result

    def _end(self, error: Exception) -> None:
        with contextlib.suppress(RuntimeError):  # another rank is gone, and `error` says so
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
        """Run an action here, if all ranks begin it, and agree on whether it went well."""
        result, error = None, None
        self._failure = None
        self._agree(self._exit)
        if self._failure is not None:
            return None
        try:
            with contextlib.nullcontext() if name in self.checking else self._interrupts_held():
                result = self.actions[name](*args)
        except BaseException as caught:  # told on every rank
            error = caught
            if not isinstance(caught, Exception) and self._failure is None:
                self._exit = caught
        if self._failure is None:
            self._agree(error or self._exit)
        return result

    def _agree(self, error: BaseException | None) -> None:
        """Let every rank know of an error of this one, and remember that of the lowest rank."""
        with self._interrupts_held():
            failed = torch.tensor([error is not None], dtype=torch.uint8)
            dist.all_reduce(failed, dist.ReduceOp.MAX, self._group)
            if not failed.item():
                return
            told = None if error is None else _portable(error, dist.get_rank())
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
        text = str(found) if has_left or isinstance(found, SnExportError) else _in_words(found)
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
            self._raise_gone(error)
        message: tuple[str, Any] = heard[0]
        return message

    def _raise_gone(self, error: RuntimeError) -> NoReturn:
        raise ExportError(
            f"rank {self._ranks[0]}, which exports for all, cannot be reached any more: {error}"
        ) from error

    @contextlib.contextmanager
    def _interrupts_held(self) -> Iterator[None]:
        """Let what a Ctrl-C raises wait for the next time that all ranks agree, or for the end."""
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

    def _part(self) -> None:
        """Leave the group; nobody does while another one still talks to it."""
        with contextlib.suppress(RuntimeError), self._interrupts_held():
            self._group.set_timeout(_TO_PART)
            dist.barrier(self._group)
            # torch 2.13 gives a new group of a part of the ranks the name of one that is gone, and
            # finds its old addresses: those groups stay until the process ends.
            if self._is_world:
                dist.destroy_process_group(self._group)


class _RankLeftError(BaseException):
    """Another rank was interrupted. No exception that a model or a proof takes for an answer."""


def _portable(error: BaseException, rank: int) -> Exception:
    """Return ``error``, or one in words where it is no exception or cannot be pickled."""
    if not isinstance(error, Exception):
        return ExportError(f"rank {rank} has left with {type(error).__name__}")
    try:
        copied = pickle.loads(pickle.dumps(error))
    except Exception:
        copied = None
    if type(copied) is not type(error) or str(copied) != str(error):
        return ExportError(_in_words(error))
    return error


def _in_words(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
