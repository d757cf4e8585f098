"""The error of everything that reads, understands or writes a checkpoint."""

from __future__ import annotations

from ..errors import SnExportError


class CheckpointError(SnExportError):
    """A checkpoint cannot be read, understood, fitted to a model or written."""
