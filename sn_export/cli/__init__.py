"""The command ``sn-export``: it turns options into calls, and results into text or JSON."""

from .app import main

__all__ = ["main"]
