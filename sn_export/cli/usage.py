"""Wrong usage as one line, where typer draws a box of several."""

from __future__ import annotations

import sys
from typing import Any

import typer

from .console import BAD_INPUT, INTERRUPTED, say

# Typer keeps click to itself, or depends on it, by version; this class is the same in both.
_USAGE_ERROR: type[Exception] = typer.BadParameter.__bases__[0]


def run(app: typer.Typer, name: str) -> int:
    """Run the command line and return its exit code; without arguments it shows its help."""
    arguments = sys.argv[1:] or ["--help"]
    try:
        return app(arguments, prog_name=name, standalone_mode=False) or 0
    except typer.Abort:
        return INTERRUPTED
    except _USAGE_ERROR as error:
        say(_message(error, name))
        return BAD_INPUT


def _message(error: Any, name: str) -> str:
    command = error.ctx.command_path if error.ctx is not None else name
    text = " ".join(error.format_message().split()).replace("Value error, ", "")
    return f"{text.rstrip('.')}; see '{command} --help'"
