"""What the parts of scripts/prove share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One attack, repeated.

    Attributes:
        attack: what was done.
        tried: how often.
        survived: how often everything was afterwards as promised.
        note: what else was measured.
        failures: what was not as promised, one text each.
        seconds: how long it took.
    """

    attack: str
    tried: int
    survived: int
    note: str = ""
    failures: Sequence[str] = ()
    seconds: int = 0
