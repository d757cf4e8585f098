"""The content of a report: plain mappings, lists, texts and numbers, as they are in its JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from os import PathLike, fspath
from typing import Any


def as_content(report: Any) -> dict[str, Any]:
    """Return what the JSON of a report holds.

    Args:
        report: an `sn_export.ExportReport`, an `sn_export.ParityReport`, or the content that
            was read from the JSON of one.

    Returns:
        A new mapping with the key ``parity``; NaN is None and infinities are texts.

    Raises:
        TypeError: for anything else.
    """
    if dataclasses.is_dataclass(report) and not isinstance(report, type):
        if hasattr(report, "outputs"):  # the comparison alone
            return {"parity": _parity(report)}
        if hasattr(report, "to_json"):
            content = json.loads(report.to_json(indent=None))
            return dict(content)
    elif isinstance(report, Mapping):
        content = plain(report)
        if isinstance(content.get("parity"), dict):
            return dict(content)
        if isinstance(content.get("outputs"), list):
            return {"parity": content}
        raise TypeError(
            "report must be the JSON content of a report with the key 'parity' or 'outputs', "
            f"got the keys {sorted(content)}"
        )
    raise TypeError(f"report must be a report or its JSON content, got {type(report).__name__}")


def plain(value: Any) -> Any:
    """Return ``value`` as JSON holds it: NaN becomes None, infinities become texts."""
    if hasattr(value, "outputs") and hasattr(value, "passed"):  # passed is no field of its own
        return _parity(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else ("inf" if value > 0 else "-inf")
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            entry.name: plain(getattr(value, entry.name)) for entry in dataclasses.fields(value)
        }
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    return fspath(value) if isinstance(value, PathLike) else value


def _parity(parity: Any) -> dict[str, Any]:
    if hasattr(parity, "content"):  # says itself what its JSON holds
        return dict(plain(parity.content()))
    fields = {entry.name: getattr(parity, entry.name) for entry in dataclasses.fields(parity)}
    return {**plain(fields), "passed": bool(parity.passed)}
