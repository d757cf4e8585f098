"""Numbers as the reports show them."""

from __future__ import annotations

import math


def error(value: float | None) -> str:
    """Return an error with three digits: ``5.96e-07``, ``0``, ``NaN``, ``∞``; ``–`` for None."""
    if value is None:
        return "–"
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    return f"{value:.3g}"


def sigma(value: float | None) -> str:
    """Return sigma with six digits, as many as float32 holds."""
    if value is None or not math.isfinite(value):
        return error(value)
    return f"{value:.6g}"


def element(value: float | None) -> str:
    """Return the value of an element with the digits that tell float32 values apart."""
    if value is None or not math.isfinite(value):
        return error(value)
    return f"{value:.9g}"


def share(value: float | None) -> str:
    """Return a fraction in percent; a small one does not become 0."""
    if value is None or not math.isfinite(value):
        return error(value)
    return f"{100 * value:.3g} %"


def deviation(value: float | None) -> str:
    """Return a relative difference in percent with its sign."""
    if value is None:
        return "–"
    return f"{100 * value:+.2g} %".replace("-", "−") if value else "0 %"


def size(count: int) -> str:
    """Return a number of bytes with its unit."""
    amount, unit = float(count), "bytes"
    for larger in ("kB", "MB", "GB"):
        if amount < 1000:
            break
        amount, unit = amount / 1000, larger
    return f"{count} bytes" if unit == "bytes" else f"{amount:.3g} {unit}"
