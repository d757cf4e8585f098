"""Hold back what the exporters print, log and warn about."""

from __future__ import annotations

import contextlib
import ctypes
import io
import logging
import os
import sys
import warnings
import weakref
from collections.abc import Iterator
from typing import Any

from onnxscript.values import TracedOnnxFunction

from ..running import undo_on_exit, undoing

_LOGGERS = ("torch", "torch.onnx", "onnxscript", "onnx_ir")
_parsed: weakref.WeakKeyDictionary[TracedOnnxFunction, Any] = weakref.WeakKeyDictionary()


@undoing
def quiet(verbose: bool) -> Iterator[None]:
    """Keep prints, logs and warnings inside, unless ``verbose``."""
    if verbose:
        yield
        return
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    streams = sys.stdout, sys.stderr
    output = _duplicate_output()
    caught = warnings.catch_warnings()
    caught.__enter__()

    def undo() -> None:
        _restore_output(output)
        sys.stdout, sys.stderr = streams
        for logger, level in zip(loggers, levels, strict=True):
            if logger.level != level:  # each change empties the caches of all loggers
                logger.setLevel(level)
        caught.__exit__(None, None, None)

    with undo_on_exit(undo):
        warnings.simplefilter("ignore")
        for logger in loggers:
            if logger.isEnabledFor(logging.ERROR):  # by itself, not by the one above it
                logger.setLevel(logging.CRITICAL)
        if output:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, 1)
            os.close(nowhere)
        sys.stdout, sys.stderr = io.StringIO(), io.StringIO()
        yield


@undoing
def operators_parsed_once() -> Iterator[None]:
    """Let the operators of onnxscript be parsed once in a process, not at every export.

    `torch.onnx.export` reads and parses the source of some 500 functions whenever it is called,
    for a domain that is the same of all: a third of what the export of a small network takes.
    """
    parse = vars(TracedOnnxFunction).get("function_ir")
    if not isinstance(parse, property):  # another onnxscript
        yield
        return

    def parse_once(function: TracedOnnxFunction) -> Any:
        if function not in _parsed:
            _parsed[function] = parse.__get__(function)
        return _parsed[function]

    with undo_on_exit(lambda: setattr(TracedOnnxFunction, "function_ir", parse)):
        setattr(TracedOnnxFunction, "function_ir", property(parse_once))  # noqa: B010
        yield


def _duplicate_output() -> list[int]:
    """Return a second descriptor of the standard output, if the process has one.

    The TorchScript exporter dumps its graph from C++, past sys.stdout.
    """
    if sys.stdout is not None:
        sys.stdout.flush()
    try:
        return [os.dup(1)]
    except OSError:
        return []


def _restore_output(kept: list[int]) -> None:
    """Let the standard output be what ``kept`` is, and close that; can be repeated."""
    if kept:
        with contextlib.suppress(OSError, AttributeError, TypeError):
            ctypes.CDLL(None).fflush(None)  # what C++ still buffers
        os.dup2(kept[0], 1)
        os.close(kept.pop())
