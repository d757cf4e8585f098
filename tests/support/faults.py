"""An exception raised at a chosen line of the package, and what it has damaged."""

from __future__ import annotations

import contextlib
import functools
import gc
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any, ParamSpec

import pytest
from fingerprint import Fingerprint, fingerprint
from torch import nn

import sn_export
from sn_export import FreezeError, frozen_spectral_norm

# Interrupts may also strike between the with statement and the package's first line.
WATCHED = (str(Path(sn_export.__file__).parent), contextlib.__file__)


P = ParamSpec("P")


class Injected(Exception):
    """What the tests raise where nothing is expected to fail."""


# The second of two interrupts may come while Python itself closes the block, which only prints it.
second_is_printed = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


class Fault:
    """Raises at the n-th line that the package executes, and again some lines later if asked to.

    Without a number it only counts.
    """

    def __init__(self, error: type[BaseException] = Injected, at: int = 0, again: int = 0) -> None:
        self.error = error
        self.at = {at, at + again}
        self.places: list[tuple[str, int]] = []
        self.tracer = sys.gettrace()  # a debugger's or that of a coverage measurement
        self.struck: list[str] = []
        self.came_out = False
        self.while_caught: Fingerprint | None = None

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: object, traceback: object) -> bool:
        """Trace no more, and note whether what was raised came out, which is the end of it."""
        self.stop()
        sys.setprofile(None)
        self.came_out = kind is not None and issubclass(kind, self.error)
        return self.came_out

    def start(self) -> None:
        """Count from here on, and raise."""
        caller = sys._getframe(1)
        if caller.f_code in USERS:
            caller.f_trace = self
        sys.settrace(self)

    def stop(self) -> None:
        """Neither count nor raise from here on."""
        sys.settrace(self.tracer)

    def __call__(self, frame: FrameType, event: str, arg: object) -> Any:
        code = frame.f_code
        if not code.co_filename.startswith(WATCHED) and code not in USERS:
            return None
        if event == "line":
            self.places.append((code.co_filename, frame.f_lineno))
            if len(self.places) in self.at:
                self.struck.append(f"{Path(code.co_filename).name}:{frame.f_lineno} {code.co_name}")
                if len(self.places) < max(self.at):
                    sys.setprofile(self._go_on)  # raising ends tracing, but not profiling
                raise self.error(self.struck[-1])
        return self

    def _go_on(self, frame: FrameType | None, event: str, arg: object) -> None:
        sys.setprofile(None)
        while frame is not None:
            if frame.f_code.co_filename.startswith(WATCHED) or frame.f_code in USERS:
                frame.f_trace = self
            frame = frame.f_back
        sys.settrace(self)

    def steps(self) -> list[int]:
        """Return the numbers of the counted lines: of each place the first time and the last."""
        first = {place: number for number, place in reversed([*enumerate(self.places, start=1)])}
        last = {place: number for number, place in enumerate(self.places, start=1)}
        return sorted({*first.values(), *last.values()})


def in_own_thread(test: Callable[P, None]) -> Callable[P, None]:
    """Run a test in a thread of its own.

    Raising out of a trace function while `contextlib` handles an exception leaves that one behind:
    for the rest of the thread ``sys.exc_info()`` has it, and what is raised has it as its context.
    """

    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(test, *args, **kwargs).result()

    return run


def fault_while_entering(model: nn.Module, fault: Fault) -> None:
    """Enter a block under a fault, and leave it without one if entering was a success."""
    with suppress(FreezeError):
        _users_block(model, fault, entering=True)


def fault_while_leaving(model: nn.Module, fault: Fault) -> bool:
    """Leave a block under a fault; return whether it came out of the with statement."""
    _users_block(model, fault, entering=False)
    return fault.came_out


def _users_block(model: nn.Module, fault: Fault, entering: bool) -> None:
    """Freeze as a user does, and look at the model where the user would save it."""
    try:
        if entering:
            _entered(model, fault)
        else:
            _left(model, fault)
    except fault.error:
        fault.stop()
        sys.setprofile(None)
        fault.came_out = True
        fault.while_caught = fingerprint(model)  # the traceback holds all frames
    finally:
        fault.stop()


def _entered(model: nn.Module, fault: Fault) -> None:
    fault.start()
    with frozen_spectral_norm(model):
        fault.stop()


def _left(model: nn.Module, fault: Fault) -> None:
    with frozen_spectral_norm(model):
        fault.start()


def damage(fault: Fault, before: Fingerprint, model: nn.Module) -> list[str]:
    """Say what a fault has damaged: the model, also as a user catches it, or other threads' use."""
    caught = [] if fault.while_caught is None else before.differences(fault.while_caught)[:2]
    found = [*(f"while caught, {d}" for d in caught), *before.differences(fingerprint(model))[:2]]
    fault.while_caught = None
    gc.enable()
    if not found and "block.py" in fault.struck[-1] and not other_thread_can_freeze(model):
        found = ["another thread cannot freeze it any more"]
    return [f"{fault.struck}: {difference[:160]}" for difference in found]


def other_thread_can_freeze(model: nn.Module) -> bool:
    """Whether a block in another thread works, so that no lock or claim was left behind."""
    done: list[bool] = []

    def run() -> None:
        with frozen_spectral_norm(model):
            done.append(True)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(5)
    return bool(done)


# Their lines count too: an interrupt may strike the with statement itself, on its way out.
USERS = (_entered.__code__, _left.__code__)
