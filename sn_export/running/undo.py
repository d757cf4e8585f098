"""Context managers whose undoing no interrupt can skip."""

from __future__ import annotations

import contextlib
import io
import sys
import traceback
from collections.abc import Callable, Generator, Iterator
from functools import wraps
from typing import Any, Generic, ParamSpec, TypeVar

T = TypeVar("T")
P = ParamSpec("P")


class ClosedOnExit(io.IOBase):
    """A context manager that calls its attribute ``close`` when the with-block is left.

    Ctrl-C raises a KeyboardInterrupt between any two instructions of Python code, so also as the
    first one of an ``__exit__``: then nothing is undone, and with `contextlib.contextmanager` the
    suspended generator is held by the traceback of that very interrupt. The caller's own
    ``except KeyboardInterrupt: save(model)`` sees a model that is half undone.

    No instruction of Python can be first here, since there is none. `io.IOBase.__exit__` is
    written in C and calls ``self.close()``; that is the ``close`` of a generator, written in C
    too, which goes on at the ``yield`` by raising GeneratorExit there: within the ``try`` around
    it. An interrupt strikes the caller before all that, and its block is still open; or
    within the ``finally`` of the generator, which guards itself as `undo_on_exit` does.

    Should the caller's with statement be struck where Python has left the block and has not
    yet called ``__exit__``, its reference to this object is dropped as the statement is left, and
    io's finaliser calls ``close``.
    """

    def closing(self, generator: Generator[T]) -> T:
        """Run ``generator`` up to its ``yield``, and finish it when this is closed.

        Args:
            generator: must not refer to this object, or the finaliser would come too late.
        """
        attributes = self.__dict__
        outer: Callable[[], None] | None = attributes.get("close")  # of the same, entered twice
        inner = _closing_in_turn(attributes, generator, outer)
        attributes["close"] = inner.close
        try:
            return next(inner)
        except BaseException:  # an interrupt that came after the generator had begun
            inner.close()
            _put_back(attributes, outer)
            raise


def _closing_in_turn(
    attributes: dict[str, Any], generator: Generator[T], outer: Callable[[], None] | None
) -> Generator[T]:
    try:
        try:
            yield next(generator)
        finally:
            generator.close()
            _put_back(attributes, outer)
    finally:
        generator.close()
        _put_back(attributes, outer)


def _put_back(attributes: dict[str, Any], close: Callable[[], None] | None) -> None:
    if close is None:
        attributes.pop("close", None)
    else:
        attributes["close"] = close


class _Undoing(ClosedOnExit, Generic[T]):
    def __init__(self, generator: Generator[T]) -> None:
        self._generator = generator

    def __enter__(self) -> T:  # type: ignore[override]
        return self.closing(self._generator)


def undoing(function: Callable[P, Iterator[T]]) -> Callable[P, _Undoing[T]]:
    """Make a context manager of a generator function, as `contextlib.contextmanager` does.

    ::

        @undoing
        def training(module, mode):
            before = module.training
            with undo_on_exit(lambda: module.train(before)):
                module.train(mode)
                yield module

    Whatever leaves the with-block, the generator sees a GeneratorExit at its ``yield``, and no
    interrupt can keep that from it (`ClosedOnExit`).
    """

    @wraps(function)
    def make(*args: P.args, **kwargs: P.kwargs) -> _Undoing[T]:
        return _Undoing(function(*args, **kwargs))  # type: ignore[arg-type]

    return make


@undoing
def undo_on_exit(undo: Callable[[], None]) -> Iterator[None]:
    """Call ``undo`` when the with-block is left, whatever leaves it, even an interrupt.

    What an interrupt has left suspended within ends before that (`_end_abandoned`).

    An interrupt may also come halfway through ``undo``. Then ``undo`` is called a second time
    before the interrupt goes on its way: the block is undone as a whole, and the interrupt is
    not lost. Without an interrupt the second call finds nothing to do. A ``finally`` within the
    ``finally`` of the first call would leave one instruction between the two unguarded; nested
    ``try`` statements leave none.

    Args:
        undo: may be repeated, from any point where it was stopped and after it has succeeded.
            What it needs is remembered before the block is entered.
    """
    try:
        try:
            yield
        finally:
            _end_abandoned()
            undo()
    finally:
        _end_abandoned()
        undo()


def _end_abandoned() -> None:
    """End the with-blocks of `contextlib` that the exception on its way has left suspended.

    An interrupt that strikes within ``contextlib``'s own ``__exit__`` keeps the generator from
    going on. Its traceback holds that frame, so the generator would end when the traceback is
    dropped, after the state around was put back: one of torch's exporters would then set the
    model's mode once more. Cleared frames hold nothing; those of others keep their variables for a
    debugger.

    The exception is found as the context of the GeneratorExit that `ClosedOnExit` brings about.
    """
    error = sys.exc_info()[1]
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        for frame, _ in traceback.walk_tb(error.__traceback__):
            if frame.f_code.co_filename == contextlib.__file__:
                with contextlib.suppress(RuntimeError):  # of a decorated function: it runs
                    frame.clear()
                    _ = frame.f_locals  # Python 3.10 has copied them for a tracer: copied anew
        error = error.__cause__ or error.__context__
