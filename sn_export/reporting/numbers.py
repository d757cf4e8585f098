"""Numbers of a report's JSON, and how the pages write them."""

from __future__ import annotations

import math
from collections.abc import Sequence

Number = float | str | None  # in JSON NaN is null, and infinities are the texts "inf" and "-inf"


def as_number(value: Number) -> float:
    """Return a number of the JSON as a float."""
    return math.nan if value is None else float(value)


def error(value: Number, digits: int = 3) -> str:
    """Return an error with three digits: ``5.96e-07``, ``0``, ``NaN``, ``∞``."""
    number = as_number(value)
    if math.isnan(number):
        return "NaN"
    if math.isinf(number):
        return "∞" if number > 0 else "−∞"
    return f"{number:.{digits}g}"


def sigma(value: Number) -> str:
    """Return sigma with six digits, as many as float32 holds."""
    return error(value, 6)


def element(value: Number) -> str:
    """Return the value of an element with the digits that tell float32 values apart."""
    return error(value, 9)


def share(value: float) -> str:
    """Return a fraction in percent; a small one does not become 0."""
    return f"{100 * value:.3g} %"


def deviation(value: Number, exact: Number) -> str:
    """Return how far ``value`` is from ``exact`` in percent of it, with its sign.

    ::

        deviation(1.25, 1.2625)  # "−0.99 %"
    """
    number, true = as_number(value), as_number(exact)
    if not (math.isfinite(number) and math.isfinite(true) and true):
        return "–"
    relative = number / true - 1
    return f"{100 * relative:+.2g} %".replace("-", "−") if relative else "0 %"


def size(count: int) -> str:
    """Return a number of bytes with its unit."""
    amount, unit = float(count), "bytes"
    for larger in ("kB", "MB", "GB"):
        if amount < 1000:
            break
        amount, unit = amount / 1000, larger
    return f"{count} bytes" if unit == "bytes" else f"{amount:.3g} {unit}"


def shape(sizes: Sequence[int | str]) -> str:
    """Return a shape as ``batch × 32 × 3 × 3``."""
    return " × ".join(map(str, sizes)) or "scalar"
