"""Files that a command writes: checked before the long work begins, and written after it."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..files import require_writable

_PICTURED = (".html", ".md")


def require_apart(outputs: Mapping[str, Path | None], inputs: Mapping[str, Iterable[Path]]) -> None:
    """Raise where two outputs are one file, or one is an input.

    Args:
        outputs: files to write by what they are called in messages; None for those not asked for.
        inputs: files to read, likewise.

    Raises:
        UsageError: naming both.
    """
    seen = {os.path.realpath(path): name for name, paths in inputs.items() for path in paths}
    for name, path in outputs.items():
        if path is None:
            continue
        other = seen.setdefault(os.path.realpath(path), name)
        if other != name:
            raise UsageError(f"{name} must be another file than {other}, both are '{path}'")


def require_report(path: Path | None) -> None:
    """Raise if no report can be written to ``path``.

    Raises:
        ValueError: for a suffix that says no kind of report.
        OSError: if its folder is absent or cannot be written to, or it is a folder.
    """
    if path is not None:
        from ..reporting import require_report_path  # its templates take a moment to load

        require_report_path(path)
        require_writable(path)


def is_pictured(path: Path | None) -> bool:
    """Whether a report is one to look at, with modules and true sigma."""
    return path is not None and path.suffix in _PICTURED


def write_report(content: Mapping[str, Any], path: Path | None, written: Path | None) -> None:
    """Write a report, with the command line that asked for it.

    Args:
        content: of its JSON.
        path: the file; None for none.
        written: the ONNX file that is already in place, for the message.

    Raises:
        UsageError: if the disk is full, say.
    """
    if path is None:
        return
    from ..reporting import save_report

    try:
        save_report(content, path, command=shlex.join(["sn-export", *sys.argv[1:]]))
    except OSError as error:
        there = f"; '{written}' was proved and written all the same" if written else ""
        raise UsageError(f"cannot write '{path}': {error.strerror or error}{there}") from error
