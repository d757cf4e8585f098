"""What a person asked for and cannot have; needs no torch."""

from __future__ import annotations

from ..errors import SnExportError


class UsageError(SnExportError):
    """An argument, a model or an input on the command line that is not usable."""
