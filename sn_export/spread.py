"""The spread of absolute errors: a histogram by decade, and quantiles, in bounded memory."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from .results import Histogram

_LOWEST, _HIGHEST = -18, 6  # decades of the histogram
_EDGES = np.array([float(f"1e{decade}") for decade in range(_LOWEST, _HIGHEST + 1)])
_KEPT = 2**20  # errors kept one by one; past that, they are counted
_PER_DECADE = 100
_FINE_LOWEST, _FINE_HIGHEST = -330, 310  # every float64 that is neither 0 nor infinite


class Spread:
    """A histogram by decade, and quantiles: exact while few errors are known."""

    def __init__(self) -> None:
        self.zeros = self.infinite = self.nan = 0
        self.counts = np.zeros(len(_EDGES) - 1, np.int64)
        self.kept: list[NDArray[np.float64]] = []  # neither zero nor infinite nor NaN
        self.fine: NDArray[np.int64] | None = None

    @property
    def is_exact(self) -> bool:
        """Whether every error is known, not only its bucket."""
        return self.fine is None

    def add(self, errors: NDArray[np.float64]) -> None:
        """Take in absolute errors, shape (n,)."""
        usual = errors[np.isfinite(errors) & (errors > 0)]
        self.zeros += int((errors == 0).sum())
        self.infinite += int(np.isinf(errors).sum())
        self.nan += int(np.isnan(errors).sum())
        bucket = np.searchsorted(_EDGES, usual, side="right") - 1
        self.counts += np.bincount(bucket.clip(0, len(self.counts) - 1), minlength=len(self.counts))
        self.kept.append(usual)
        if self.fine is not None or sum(map(len, self.kept)) > _KEPT:
            self._count_finely()

    def add_infinite(self, elements: int) -> None:
        """Take in errors of elements that cannot be compared."""
        self.infinite += elements

    def _count_finely(self) -> None:
        size = (_FINE_HIGHEST - _FINE_LOWEST) * _PER_DECADE
        if self.fine is None:
            self.fine = np.zeros(size, np.int64)
        for errors in self.kept:
            bucket = np.ceil(np.log10(errors) * _PER_DECADE).astype(np.int64)
            self.fine += np.bincount(bucket - _FINE_LOWEST * _PER_DECADE, minlength=size)
        self.kept = []

    def quantile(self, permille: int) -> float:
        """Return the smallest error that so many of a thousand do not exceed; 0 if none came."""
        usual = int(self.counts.sum())
        total = self.zeros + usual + self.infinite + self.nan
        rank = -(-total * permille // 1000)  # the how-manieth of all errors in order
        if rank <= self.zeros:
            return 0.0
        rank -= self.zeros
        if rank > usual:
            return math.inf if rank <= usual + self.infinite else math.nan
        if self.fine is None:
            return float(np.partition(np.concatenate(self.kept), rank - 1)[rank - 1])
        bucket = int(np.searchsorted(self.fine.cumsum(), rank)) + _FINE_LOWEST * _PER_DECADE
        return float(10.0 ** (bucket / _PER_DECADE))

    def histogram(self) -> Histogram:
        """Return the counts by decade."""
        return Histogram(
            tuple(_EDGES.tolist()),
            tuple(self.counts.tolist()),
            self.zeros,
            self.infinite + self.nan,
        )
