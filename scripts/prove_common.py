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
        aim: the part that must survive.
    """

    attack: str
    tried: int
    survived: int
    note: str = ""
    failures: Sequence[str] = ()
    seconds: int = 0
    aim: float = 1.0

    @property
    def is_missed(self) -> bool:
        """Whether less survived than must."""
        return self.survived < self.aim * self.tried
