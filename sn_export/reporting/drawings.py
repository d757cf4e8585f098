"""What a page draws: the geometry of its charts, and samples of outputs as PNG and SVG paths.

A chart is as wide as its page. Text in a drawing that is scaled to a phone would be too small to
read, so no chart is scaled: x is in percent of the page, y in pixels.
"""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .content import (
    as_number,
    format_deviation,
    format_error,
    format_sigma,
    name_module,
    name_tensor,
)

_LEAST = 0.8  # percent: the width of the smallest bar, so that what is not zero can be seen
_TICKS = 6  # the most on one scale
_COLOURS = {1: 0, 3: 2, 4: 6}  # PNG's colour type by the number of channels
_MOST = 2**22  # bytes of a picture: more than any that a report holds
_TITLES = ("model", "file", "difference")


@dataclass(frozen=True)
class Tick:
    """A mark on the scale: its place in percent and its label."""

    at: float
    label: str


@dataclass(frozen=True)
class Bar:
    """A bar: start and width in percent, its label, and its kind, which decides the colour."""

    start: float
    width: float
    text: str
    kind: str = "value"


@dataclass(frozen=True)
class Row:
    """A row of a bar chart: its label, one or two bars, and a mark behind them."""

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
    """A column of a histogram: start, width and height in percent, its range and count."""

    start: float
    width: float
    height: float
    range: str
    count: int
    kind: str = "value"


@dataclass(frozen=True)
class _Histogram:
    edges: list[float]
    counts: list[int]
    zeros: int
    not_finite: int


@dataclass(frozen=True)
class Columns:
    """A histogram; ``limit`` is the place of the absolute tolerance in percent, None if outside."""

    columns: tuple[Column, ...]
    ticks: tuple[Tick, ...]
    limit: float | None


def chart_sigma(frozen: Sequence[Mapping[str, Any]]) -> BarChart | None:
    """Return a chart of each stored sigma above the true one, from 0; None without values."""
    found = [
        (name_tensor(entry), as_number(entry["sigma"]), as_number(entry["sigma_exact"]))
        for entry in frozen
        if "sigma" in entry
    ]
    values = [value for _, *both in found for value in both if math.isfinite(value)]
    top = max(values, default=0.0)
    if not top > 0:
        return None
    step = _choose_step(top)
    end = math.ceil(top / step - 1e-9) * step

    def bar(value: float, name: str, kind: str) -> Bar:
        is_drawn = math.isfinite(value) and value > 0
        width = max(100 * value / end, _LEAST) if is_drawn else 0.0
        return Bar(0.0, width, f"{name} {format_sigma(value)}", kind)

    rows = []
    for name, stored, exact in found:
        bars = [bar(stored, "stored", "stored")]
        if not math.isnan(exact):
            bars.append(bar(exact, "true", "exact"))
        rows.append(Row(name, tuple(bars)))
    ticks = [Tick(100 * i * step / end, f"{i * step:.6g}") for i in range(1 + round(end / step))]
    return BarChart(tuple(rows), tuple(ticks))


def chart_modules(modules: Sequence[Mapping[str, Any]], first: int | None) -> BarChart | None:
    """Return the largest absolute error of each module on a scale of decades; None if empty.

    Args:
        modules: the modules of the JSON, in network order.
        first: position of the first module outside tolerance; None if there is none.
    """
    if not modules:
        return None
    errors = [as_number(entry["max_abs"]) for entry in modules]
    finite = [value for value in errors if math.isfinite(value) and value > 0]
    low = math.floor(math.log10(min(finite, default=1e-9))) - 1
    high = max(low + 2, math.ceil(math.log10(max(finite, default=1e-9))))

    def width(value: float) -> float:
        if value == 0:
            return 0.0
        if not math.isfinite(value):
            return 100.0
        return max(100 * (math.log10(value) - low) / (high - low), _LEAST)

    rows = []
    for i, (entry, value) in enumerate(zip(modules, errors, strict=True)):
        passed = entry["passed"]
        bar = Bar(0.0, width(value), format_error(value), "value" if passed else "bad")
        mark = "✗ first outside" if i == first else "" if passed else "✗ outside"
        rows.append(Row(f"{name_module(entry)} · {entry['type']}", (bar,), mark))
    return BarChart(tuple(rows), tuple(_mark_decades(low, high)))


def make_strip(chart: BarChart) -> tuple[Column, ...]:
    """Return an overview of a chart with many rows: the first bar of each, as columns in a line."""
    width = 100 / len(chart.rows)
    return tuple(
        Column(i * width, width, bar.width, f"{row.label}: {bar.text}", 1, bar.kind)
        for i, (row, bar) in enumerate((row, row.bars[0]) for row in chart.rows)
    )


def describe_worst_sigma(frozen: Sequence[Mapping[str, Any]]) -> str:
    """Return a sentence on the sigma furthest from the true one; without true ones, the largest."""
    normed = [entry for entry in frozen if math.isfinite(as_number(entry.get("sigma")))]
    off = [
        (abs(as_number(entry["sigma"]) / as_number(entry["sigma_exact"]) - 1), entry)
        for entry in normed
        if entry["sigma_exact"] and math.isfinite(as_number(entry["sigma_exact"]))
    ]
    if off:
        _, worst = max(off, key=lambda pair: pair[0])
        far = format_deviation(worst["sigma"], worst["sigma_exact"])
        return f"Furthest from the true sigma: {name_tensor(worst)}, {far}."
    if not normed:
        return ""
    largest = max(normed, key=lambda entry: as_number(entry["sigma"]))
    return f"Largest sigma: {name_tensor(largest)}, {format_sigma(largest['sigma'])}."


def describe_worst_module(modules: Sequence[Mapping[str, Any]]) -> str:
    """Return a sentence on the module with the largest error; NaN is larger than any number."""

    def error(entry: Mapping[str, Any]) -> float:
        value = as_number(entry["max_abs"])
        return math.inf if math.isnan(value) else value

    worst = max(modules, key=error)
    return f"Largest error: {name_module(worst)}, {format_error(worst['max_abs'])}."


def chart_histogram(output: Mapping[str, Any]) -> Columns | None:
    """Return a histogram of an output's errors by decade; the height is the count's logarithm."""
    if output["histogram"] is None:
        return None
    found, atol = _Histogram(**output["histogram"]), as_number(output["atol"])
    if not (sum(found.counts) or found.zeros or found.not_finite):
        return None
    first, last = _find_span(found, atol)
    ranges = _list_ranges(found, first, last)
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
    return Columns(columns, ticks, _find_limit(atol, found, first, last, start, width))


def _list_ranges(found: _Histogram, first: int, last: int) -> list[tuple[str, int, str]]:
    ranges = [("no error", found.zeros, "zero")] if found.zeros else []
    for i in range(first, last):
        text = f"{found.edges[i]:.0e} to {found.edges[i + 1]:.0e}"
        ranges.append((text, found.counts[i], "value"))
    if found.not_finite:
        ranges.append(("NaN or ∞", found.not_finite, "bad"))
    return ranges


def _find_span(found: _Histogram, atol: float) -> tuple[int, int]:
    """Return the first and last edge that are drawn, around every count and the tolerance."""
    held = [i for i, count in enumerate(found.counts) if count]
    if not held:
        return (0, 0)
    held += [i for i in range(len(found.counts)) if _holds(found, i, atol)]
    return (min(held), max(held) + 1)


def _holds(found: _Histogram, bucket: int, error: float) -> bool:
    return 0 < found.edges[bucket] <= error < found.edges[bucket + 1]


def _find_limit(
    atol: float, found: _Histogram, first: int, last: int, start: float, width: float
) -> float | None:
    for i in range(first, last):
        if _holds(found, i, atol):
            low, high = found.edges[i], found.edges[i + 1]
            return start + (i - first + math.log(atol / low) / math.log(high / low)) * width
    return None


def _mark_decades(low: int, high: int) -> list[Tick]:
    every = max(1, math.ceil((high - low) / _TICKS))
    return [
        Tick(100 * (decade - low) / (high - low), f"1e{decade:+03d}")
        for decade in range(low, high + 1, every)
    ]


def _choose_step(top: float) -> float:
    """Return the distance of ticks on a scale from 0 to ``top``: 1, 2 or 5 times a power of ten.

    Example: ``_choose_step(1.3)`` is 0.5, for ticks at 0, 0.5, 1 and 1.5.
    """
    power: float = 10.0 ** math.floor(math.log10(top / 4))
    for factor in (1, 2, 5):
        if top / (factor * power) <= _TICKS:
            return factor * power
    return 10 * power


@dataclass(frozen=True)
class View:
    """One drawing of a sample: its title, and a PNG as a data URL or the path of an SVG."""

    title: str
    source: str


def draw_sample(picture: Mapping[str, Any]) -> list[View]:
    """Return the drawings of one sample: in the model, in the file, and their difference.

    Args:
        picture: an `sn_export.results.Picture` of the JSON.

    Raises:
        KeyError: if a key is missing.
        ValueError: if a drawing has not as many bytes as the size of the picture asks for.
    """
    return [View(title, _draw(picture, title)) for title in _TITLES]


def _draw(entry: Mapping[str, Any], title: str) -> str:
    width, height = int(entry["width"]), int(entry["height"])
    is_sound = entry["kind"] == "sound"
    channels = 1 if is_sound or title == "difference" else int(entry["channels"])
    size = width * height * channels
    if min(width, height) < 1 or size > _MOST or channels not in _COLOURS:
        raise ValueError(f"a picture of {width} x {height} with {channels} channels")
    pixels = base64.b64decode(entry[title], validate=True)
    if len(pixels) != size or (is_sound and height != 2):
        raise ValueError(f"the {title} of '{entry['sample']}' has {len(pixels)} bytes, not {size}")
    if is_sound:
        return _trace_wave(pixels[:width], pixels[width:], from_bottom=title == "difference")
    png = base64.b64encode(_encode_png(width, height, channels, pixels)).decode()
    return f"data:image/png;base64,{png}"


def _encode_png(width: int, height: int, channels: int, pixels: bytes) -> bytes:
    """Return the bytes of a PNG file (RFC 2083) with 8 bits a channel and no filters."""
    row = width * channels
    lines = b"".join(b"\0" + pixels[i : i + row] for i in range(0, len(pixels), row))
    header = struct.pack(">IIBBBBB", width, height, 8, _COLOURS[channels], 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(lines)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


def _trace_wave(lowest: bytes, highest: bytes, from_bottom: bool) -> str:
    """Return an SVG path around a wave, 256 high and one unit wide for each column.

    Example: ``_trace_wave(bytes([64]), bytes([128]), False)`` is ``"M0,127V192H1V127Z"``: y grows
    downwards.
    """
    return "".join(
        f"M{x},{255 - high}V{256 if from_bottom else 256 - low}H{x + 1}V{255 - high}Z"
        for x, (low, high) in enumerate(zip(lowest, highest, strict=True))
        if high or not from_bottom
    )
