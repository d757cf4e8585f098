"""The geometry of the charts. Widths are in percent, so that a chart is as wide as its page.

Text in a drawing that is scaled to a phone would be too small to read. So nothing is scaled: x is
in percent of the page, y in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from . import numbers
from .view import FrozenView, HistogramView, ModuleView, OutputView

_LEAST = 0.8  # percent; what is not zero is seen
_TICKS = 6


@dataclass(frozen=True)
class Tick:
    """A mark on the scale: its place in percent and its label."""

    at: float
    label: str


@dataclass(frozen=True)
class Bar:
    """A bar: where it starts and ends in percent, what it says, and its kind for the colour."""

    start: float
    width: float
    text: str
    kind: str = "value"


@dataclass(frozen=True)
class Row:
    """A line of a bar chart: its label and one bar or two."""

    label: str
    bars: tuple[Bar, ...]
    mark: str = ""


@dataclass(frozen=True)
class BarChart:
    """Rows of horizontal bars above one scale."""

    rows: tuple[Row, ...]
    ticks: tuple[Tick, ...]


@dataclass(frozen=True)
class Column:
    """A column of a histogram: place and height in percent, its range and count."""

    start: float
    width: float
    height: float
    range: str
    count: int
    kind: str = "value"


@dataclass(frozen=True)
class Columns:
    """A histogram; ``limit`` is where the absolute tolerance lies, None if outside."""

    columns: tuple[Column, ...]
    ticks: tuple[Tick, ...]
    limit: float | None


def sigma_chart(frozen: Sequence[FrozenView]) -> BarChart | None:
    """Return sigma as stored above the true sigma, on a scale from 0; None without values."""
    values = [
        value
        for entry in frozen
        for value in (entry.sigma, entry.sigma_exact)
        if value is not None and math.isfinite(value)
    ]
    top = max(values, default=0.0)
    if not top > 0:
        return None
    step = _step(top)
    end = math.ceil(top / step - 1e-9) * step

    def bar(value: float | None, name: str, kind: str) -> Bar:
        is_drawn = value is not None and math.isfinite(value) and value > 0
        width = max(100 * value / end, _LEAST) if is_drawn and value is not None else 0.0
        return Bar(0.0, width, f"{name} {numbers.sigma(value)}", kind)

    rows = []
    for entry in frozen:
        bars = [bar(entry.sigma, "stored", "stored")]
        if entry.sigma_exact is not None:
            bars.append(bar(entry.sigma_exact, "true", "exact"))
        rows.append(Row(entry.name, tuple(bars)))
    ticks = [Tick(100 * i * step / end, f"{i * step:.6g}") for i in range(1 + round(end / step))]
    return BarChart(tuple(rows), tuple(ticks))


def module_chart(modules: Sequence[ModuleView]) -> BarChart | None:
    """Return the largest absolute error of each module on a scale of decades; None if empty."""
    if not modules:
        return None
    finite = [m.max_abs for m in modules if math.isfinite(m.max_abs) and m.max_abs > 0]
    low = math.floor(math.log10(min(finite, default=1e-9))) - 1
    high = max(low + 2, math.ceil(math.log10(max(finite, default=1e-9))))

    def width(value: float) -> float:
        if value == 0:
            return 0.0
        if not math.isfinite(value):
            return 100.0
        return max(100 * (math.log10(value) - low) / (high - low), _LEAST)

    rows = tuple(
        Row(
            f"{m.name} · {m.type}",
            (Bar(0.0, width(m.max_abs), numbers.error(m.max_abs), "value" if m.passed else "bad"),),
            "✗ first outside" if m.is_first else "" if m.passed else "✗ outside",
        )
        for m in modules
    )
    return BarChart(rows, tuple(_decades(low, high)))


def histogram_chart(output: OutputView) -> Columns | None:
    """Return the errors of an output by decade, in columns as high as the count's logarithm."""
    found = output.histogram
    if found is None or not (sum(found.counts) or found.zeros or found.not_finite):
        return None
    first, last = _span(found, output.atol)
    ranges = _ranges(found, first, last)
    width = 100 / len(ranges)
    top = math.log10(1 + max(count for _, count, _ in ranges))
    columns = tuple(
        Column(i * width, width, 100 * math.log10(1 + count) / top, text, count, kind)
        for i, (text, count, kind) in enumerate(ranges)
    )
    start = width if found.zeros else 0.0
    every = max(1, math.ceil((last - first + 1) / _TICKS))
    ticks = tuple(
        Tick(start + (i - first) * width, f"{found.edges[i]:.0e}")
        for i in range(first, last + 1, every)
    )
    return Columns(columns, ticks, _place(output.atol, found, first, last, start, width))


def _ranges(found: HistogramView, first: int, last: int) -> list[tuple[str, int, str]]:
    ranges = [("no error", found.zeros, "zero")] if found.zeros else []
    for i in range(first, last):
        text = f"{found.edges[i]:.0e} to {found.edges[i + 1]:.0e}"
        ranges.append((text, found.counts[i], "value"))
    if found.not_finite:
        ranges.append(("NaN or ∞", found.not_finite, "bad"))
    return ranges


def _span(found: HistogramView, atol: float) -> tuple[int, int]:
    """Return the edges around the buckets that hold something, and the tolerance."""
    held = [i for i, count in enumerate(found.counts) if count]
    if not held:
        return (0, 0)
    held += [i for i in range(len(found.counts)) if _holds(found, i, atol)]
    return (min(held), max(held) + 1)


def _holds(found: HistogramView, bucket: int, error: float) -> bool:
    return 0 < found.edges[bucket] <= error < found.edges[bucket + 1]


def _place(
    atol: float, found: HistogramView, first: int, last: int, start: float, width: float
) -> float | None:
    for i in range(first, last):
        if _holds(found, i, atol):
            low, high = found.edges[i], found.edges[i + 1]
            return start + (i - first + math.log(atol / low) / math.log(high / low)) * width
    return None


def _decades(low: int, high: int) -> list[Tick]:
    every = max(1, math.ceil((high - low) / _TICKS))
    return [
        Tick(100 * (decade - low) / (high - low), f"1e{decade:+03d}")
        for decade in range(low, high + 1, every)
    ]


def _step(top: float) -> float:
    """Return a step of 1, 2 or 5 times a power of ten that divides the scale into a few."""
    power: float = 10.0 ** math.floor(math.log10(top / 4))
    for factor in (1, 2, 5):
        if top / (factor * power) <= _TICKS:
            return factor * power
    return 10 * power
