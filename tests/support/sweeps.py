"""What the sweeps over many networks share: their options, quiet, and errors on one line."""

from __future__ import annotations

import argparse
import logging
import warnings

import torch


def parse_sweep(
    doc: str | None, named: str, option: str, default: int, counted: str
) -> tuple[list[str], int]:
    """Return the names on the command line, and the number that ``option`` gives."""
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("names", nargs="*", help=f"part of the name of a {named}")
    parser.add_argument(
        option, dest="count", type=int, default=default, help=f"{counted}, default: {default}"
    )
    options = parser.parse_args()
    return options.names, options.count


def start_sweep() -> None:
    """Show nothing but what is printed, and compute in one thread, so that each run is alike."""
    warnings.simplefilter("ignore")
    logging.disable()
    torch.set_num_threads(1)


def is_named(name: str, names: list[str]) -> bool:
    """Whether one of ``names`` occurs in ``name``; none given stand for all."""
    return not names or any(part.lower() in name.lower() for part in names)


def shorten_error(error: Exception, length: int = 300) -> str:
    """Return the beginning of an error's text on one line, as a cell of a table takes it."""
    return " ".join(str(error).replace("|", "\\|").split())[:length]
