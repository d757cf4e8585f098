"""Hold back what the exporters print, log and warn about."""

from __future__ import annotations

import contextlib
import ctypes
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator

import torch

from ..running import undoing

_LOGGERS = ("torch", "torch.onnx", "onnxscript", "onnx_ir")


@undoing
def quiet(verbose: bool) -> Iterator[None]:
    """Keep prints, logs and warnings inside, unless ``verbose``."""
    if verbose:
        yield
        return
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    with (
        warnings.catch_warnings(),
        _silent_descriptor(1),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        try:
            for logger in loggers:
                logger.setLevel(logging.CRITICAL)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


@undoing
def no_fused_attention() -> Iterator[None]:
    """Keep `torch.nn.TransformerEncoderLayer` off its fused operator, which has no ONNX form."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


@undoing
def _silent_descriptor(descriptor: int) -> Iterator[None]:
    # The TorchScript exporter dumps its graph from C++, past sys.stdout.
    sys.stdout.flush()
    try:
        kept = os.dup(descriptor)
    except OSError:  # a process without standard output
        yield
        return
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), descriptor)
        yield
    finally:
        with contextlib.suppress(OSError, AttributeError, TypeError):
            ctypes.CDLL(None).fflush(None)  # what C++ still buffers
        os.dup2(kept, descriptor)
        os.close(kept)
