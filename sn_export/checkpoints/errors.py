"""The error of everything that reads, understands or writes a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable

from ..errors import SnExportError

_SHOWN = 5


class CheckpointError(SnExportError):
    """A checkpoint cannot be read, understood, fitted to a model or written."""


def listed(names: Iterable[str]) -> str:
    """Return names in quotes, the first few of many."""
    quoted = [f"'{name}'" for name in names]
    shown = ", ".join(quoted[:_SHOWN])
    return shown if len(quoted) <= _SHOWN else f"{shown} and {len(quoted) - _SHOWN} more"
