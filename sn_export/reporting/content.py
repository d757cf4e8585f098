"""The content of a report: plain mappings, lists, texts and numbers, as they are in its JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from ..text import plain, plain_parity


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
            return {"parity": plain_parity(report)}
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
