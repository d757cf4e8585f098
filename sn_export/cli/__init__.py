"""The command line: it translates, nothing else."""

from .app import main

__all__ = ["main"]
