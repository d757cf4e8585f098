"""The errors of one output, gathered while input sets come in, in bounded memory."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..results import Histogram, OutputParity, Picture
from ..running import is_random
from ..text import name_dtype
from .pictures import MOST, choose_kind, show_samples
from .tolerances import resolve_tolerance

_LOWEST, _HIGHEST = -18, 6  # decades of the histogram

_EDGES = np.array([float(f"1e{decade}") for decade in range(_LOWEST, _HIGHEST + 1)])

_KEPT = 2**20  # errors kept one by one; past that, they are counted

_PER_DECADE = 100

_FINE_LOWEST, _FINE_HIGHEST = -330, 310  # every float64 that is neither 0 nor infinite


class RunningErrors:
    """The errors of one output while input sets come in.

    Args:
        name: name of the output.
        rtol: relative tolerance, by default by dtype.
        atol: absolute tolerance in units of the output, by default by dtype and largest value.
        coarsest: the coarsest dtype that the network computes in; its defaults count.
    """

    def __init__(
        self, name: str, rtol: float | None, atol: float | None, coarsest: str | None = None
    ) -> None:
        self.coarsest = coarsest
        self.name = name
        self.rtol, self.atol = rtol, atol
        self.shape: tuple[int, ...] = ()
        self.dtype = ""
        self.max_abs = self.max_rel = self.total = self.applied_rtol = self.applied_atol = 0.0
        self.elements = self.outside = self.samples = 0
        self.worst_index: tuple[int, ...] = ()
        self.worst_sample = ""
        self.worst_values: tuple[float | None, float | None] = (None, None)
        self.is_comparable = True
        self.blamed, self.reason = -1.0, ""
        self.blamed_on: set[str] = set()
        self.spread = Spread()
        self.is_shown = False
        self.pictures: list[Picture] = []

    def add(self, label: str, expected: Tensor, got: Tensor) -> None:
        """Take in the model's and the file's output for the input set called ``label``."""
        if self.samples == 0:
            self.shape = tuple(expected.shape)
            self.dtype = name_dtype(expected)
        self.samples += 1
        expected = expected.cpu()
        if expected.shape != got.shape or expected.dtype != got.dtype:
            self._fail(
                label,
                max(expected.numel(), 1),
                f"the file gives {name_dtype(got)}{list(got.shape)}, "
                f"the model {name_dtype(expected)}{list(expected.shape)}",
            )
            return
        if expected.numel():
            blamed = self.blamed
            self._measure(label, expected, got)
            if self.is_shown and choose_kind(expected.shape):
                self._show(label, expected, got, self.blamed > blamed)

    def _measure(self, label: str, expected: Tensor, got: Tensor) -> None:
        rtol, atol = resolve_tolerance(expected, self.rtol, self.atol, self.coarsest)
        left, right = _widen(expected), _widen(got)
        is_finite = expected.is_floating_point() and _are_finite(left, right)
        difference = (left - right).abs_() if is_finite else _measure_difference(expected, got)
        magnitude = left.abs().double()
        self.applied_rtol, self.applied_atol = rtol, max(self.applied_atol, atol)
        worst = int(difference.numpy().argmax())  # to numpy NaN is larger than any number
        largest = float(difference.flatten()[worst])
        if math.isnan(largest) or largest > self.max_abs or not self.worst_sample:
            values = _get_value(expected, worst), _get_value(got, worst)
            self._note_worst(label, largest, _unravel_index(worst, expected.shape), values)
        self.max_rel = _take_larger(
            self.max_rel, _find_largest_relative(difference, magnitude, is_finite)
        )
        self.total += float(difference.sum())
        self.elements += expected.numel()
        self.spread.add(difference.flatten().numpy())
        if is_finite and largest <= atol:
            return  # every element is within tolerance
        outside = (difference != 0) & ~(difference <= atol + rtol * magnitude)
        if not is_finite:  # an infinite reference allows itself alone: inf <= atol + rtol * inf
            outside |= (difference != 0) & ~(difference.isfinite() & magnitude.isfinite())
        self.outside += int(outside.count_nonzero())
        if not is_finite and bool((nan := torch.isnan(difference)).any()):
            self._blame(label, math.inf, _describe_nan(nan, torch.isnan(left), label))
        elif bool(outside.any()):
            at = int(torch.where(outside, difference, -1.0).argmax())
            self._blame(
                label,
                float(difference.flatten()[at]),
                f"{int(outside.sum())} of {expected.numel()} elements are outside "
                f"atol {atol:.3g} + rtol {rtol:.3g} on {label}; worst at "
                f"{list(_unravel_index(at, expected.shape))}: the model says "
                f"{expected.flatten()[at].item():.7g}, the file {got.flatten()[at].item():.7g}",
            )

    def _show(self, label: str, expected: Tensor, got: Tensor, is_worst: bool) -> None:
        """Keep the first samples, and in the place of the last one the worst that fails."""
        places = range(min(MOST - len(self.pictures), len(expected)))
        self.pictures += show_samples(label, expected, got, places)
        if is_worst and self.worst_sample == label and self.worst_index[0] not in places:
            self.pictures[-1:] = show_samples(label, expected, got, self.worst_index[:1])

    def _note_worst(
        self,
        label: str,
        largest: float,
        index: tuple[int, ...],
        values: tuple[float | None, float | None],
    ) -> None:
        if not math.isnan(self.max_abs):
            self.max_abs, self.worst_index, self.worst_sample = largest, index, label
            self.worst_values = values

    def _fail(self, label: str, elements: int, reason: str) -> None:
        self._note_worst(label, math.inf, (), (None, None))
        self.max_rel = _take_larger(self.max_rel, math.inf)
        self.total += math.inf
        self.elements += elements
        self.outside += elements
        self.spread.add_infinite(elements)
        self.is_comparable = False
        self._blame(label, math.inf, f"{reason} on {label}")

    def _blame(self, label: str, error: float, reason: str) -> None:
        self.blamed_on.add(label)
        if error > self.blamed:
            self.blamed, self.reason = error, reason

    def _make_reason(self) -> str:
        if not self.blamed_on or not all(map(is_random, self.blamed_on)):
            return self.reason
        return (
            f"{self.reason}. Only random inputs are affected: if no real input is like them, "
            "samples=0 proves the file on the example and on inputs=[...] of your own"
        )

    def make_result(self) -> OutputParity:
        """Return the errors so far."""
        bounds = f"atol {self.applied_atol:.3g} + rtol {self.applied_rtol:.3g}"
        median, p999 = self.spread.estimate_quantiles(500, 999)
        return OutputParity(
            name=self.name,
            shape=self.shape,
            dtype=self.dtype,
            max_abs=self.max_abs,
            max_rel=self.max_rel,
            mean_abs=self.total / self.elements if self.elements else 0.0,
            worst_index=self.worst_index,
            worst_sample=self.worst_sample,
            samples=self.samples,
            rtol=self.applied_rtol,
            atol=self.applied_atol,
            passed=not self.reason and self.samples > 0,
            is_comparable=self.is_comparable,
            reason=self._make_reason(),
            median_abs=median,
            p999_abs=p999,
            quantiles_are_exact=self.spread.is_exact,
            fraction_outside=self.outside / self.elements if self.elements else 0.0,
            worst_expected=self.worst_values[0],
            worst_got=self.worst_values[1],
            histogram=self.spread.make_histogram() if self.elements else None,
            verdict=self._make_reason() or f"every element is within {bounds} of the model",
            pictures=tuple(self.pictures),
        )


def _widen(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().to(torch.complex128 if tensor.is_complex() else torch.float64)


def _are_finite(left: Tensor, right: Tensor) -> bool:
    return all(math.isfinite(float(bound)) for one in (left, right) for bound in one.aminmax())


def _measure_difference(expected: Tensor, got: Tensor) -> Tensor:
    """Return the distances in float64: NaN where a number is NaN, 0 between equal infinities."""
    equal = expected == got  # before widening: float64 does not hold every integer
    # Equal infinities differ by nothing; inf - inf would say NaN.
    found = torch.where(equal, 0.0, (_widen(expected) - _widen(got)).abs()).double()
    if expected.is_floating_point() or expected.is_complex():
        return found
    return torch.where(equal, 0.0, found.clamp(min=1))


def _find_largest_relative(difference: Tensor, magnitude: Tensor, is_finite: bool) -> float:
    """Return the largest distance divided by its reference, where that is not zero; else 0."""
    if is_finite:
        found, size = difference.numpy(), magnitude.numpy()
        return float(np.divide(found, size, out=np.zeros_like(found), where=size > 0).max())
    nonzero = magnitude > 0
    relative = difference / torch.where(torch.isinf(difference), 1.0, magnitude)
    relative = torch.where(torch.isnan(difference), math.nan, relative)[nonzero]
    return float(relative.max()) if relative.numel() else 0.0


def _get_value(tensor: Tensor, at: int) -> float | None:
    if tensor.is_complex():
        return None
    value: float = tensor.flatten()[at].item()
    return int(value) if tensor.dtype == torch.bool else value


def _unravel_index(flat: int, shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(int(i) for i in np.unravel_index(flat, tuple(shape)))


def _describe_nan(nan: Tensor, own: Tensor, label: str) -> str:
    reason = f"{int(nan.sum())} of {nan.numel()} elements are NaN on {label}"
    if not bool(own.any()):
        return reason
    return f"{reason}, {int(own.sum())} of them in the model itself"


def _take_larger(left: float, right: float) -> float:
    return math.nan if math.isnan(left) or math.isnan(right) else max(left, right)


def _count_by_decade(errors: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return how many errors are in each decade of the histogram; its ends count all beyond.

    A comparison with every edge takes a tenth of the time of a search among the edges.
    """
    if not len(errors):
        return np.zeros(len(_EDGES) - 1, np.int64)
    low, high = errors.min(), errors.max()
    reached = [
        len(errors) if edge <= low else np.count_nonzero(errors >= edge) if edge <= high else 0
        for edge in _EDGES[1:-1]
    ]
    return -np.diff([len(errors), *reached, 0])


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
        usual = np.compress(errors > 0, errors)  # a fifth of the time of a mask
        zeros = len(errors) - len(usual)
        if not np.isfinite(errors).all():
            nan = int(np.isnan(errors).sum())
            infinite = int(np.isinf(usual).sum())
            usual = usual[np.isfinite(usual)]
            self.infinite += infinite
            self.nan += nan
            zeros -= nan
        self.zeros += zeros
        self.counts += _count_by_decade(usual)
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

    def estimate_quantiles(self, *permilles: int) -> list[float]:
        """Return the smallest errors that so many of a thousand errors do not exceed, or 0."""
        usual = int(self.counts.sum())
        total = self.zeros + usual + self.infinite + self.nan
        # Positions in order, from 1, of which those up to 0 are zeros.
        ranks = [-(-total * permille // 1000) - self.zeros for permille in permilles]
        within = [rank for rank in ranks if 0 < rank <= usual]
        found = dict(zip(within, self._find_usual(within), strict=True)) if within else {}
        beyond = usual + self.infinite
        return [
            found.get(rank, 0.0 if rank <= 0 else math.inf if rank <= beyond else math.nan)
            for rank in ranks
        ]

    def _find_usual(self, ranks: Sequence[int]) -> list[float]:
        if self.fine is None:  # all in one pass, which takes half of the time of two
            places = np.array(ranks) - 1
            exact: list[float] = np.partition(np.concatenate(self.kept), places)[places].tolist()
            return exact
        buckets = np.searchsorted(self.fine.cumsum(), ranks) + _FINE_LOWEST * _PER_DECADE
        return [10.0 ** (bucket / _PER_DECADE) for bucket in buckets.tolist()]

    def make_histogram(self) -> Histogram:
        """Return the counts by decade."""
        return Histogram(
            tuple(_EDGES.tolist()),
            tuple(self.counts.tolist()),
            self.zeros,
            self.infinite + self.nan,
        )
