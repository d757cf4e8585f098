"""Names, numbers and texts as they stand in state dicts, messages and JSON. It needs no torch."""

from __future__ import annotations

import dataclasses
import math
import operator
import re
from collections.abc import Iterable, Mapping
from numbers import Real
from os import PathLike, fspath
from typing import Any

# Of torch's C++ errors, and of Python's own where they passed through C++.
_FRAMES = re.compile(
    r"\s*^(?:Exception raised from .+ \(most recent call first\):$|frame #\d+: "
    r"|At:\n  .+\(\d+\): )",
    re.MULTILINE,
)


def qualified(path: str, name: str) -> str:
    """Join a module's path and a name as `torch.nn.Module.state_dict` does; the root's is empty."""
    return f"{path}.{name}" if path else name


def dtype_name(tensor: Any) -> str:
    """Return the name of a tensor's dtype, such as ``"float32"``."""
    return str(tensor.dtype).removeprefix("torch.")


def quote_names(names: Iterable[str], most: int = 5) -> str:
    """Return names in quotes, the first few of many."""
    return shorten_list((f"'{name}'" for name in names), most)


def shorten_list(texts: Iterable[str], most: int = 5) -> str:
    """Return texts with commas between them, and how many more there are past ``most``."""
    texts = list(texts)
    more = f" and {len(texts) - most} more" if len(texts) > most else ""
    return ", ".join(texts[:most]) + more


def without_frames(text: str) -> str:
    """Return the text of an error up to where it lists the frames of C++ that it came from."""
    return _FRAMES.split(text, maxsplit=1)[0]


def plain(value: Any) -> Any:
    """Return ``value`` as JSON holds it: NaN becomes None, infinities become texts.

    Dataclasses become mappings of their fields; a comparison says itself what its JSON holds.
    """
    if hasattr(value, "outputs") and hasattr(value, "passed"):  # passed is no field of its own
        return plain_parity(value)
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


def plain_parity(parity: Any) -> dict[str, Any]:
    """Return what the JSON of an `sn_export.ParityReport` holds."""
    if hasattr(parity, "content"):
        return dict(plain(parity.content()))
    fields = {entry.name: getattr(parity, entry.name) for entry in dataclasses.fields(parity)}
    return {**plain(fields), "passed": bool(parity.passed)}


def plain_integer(value: object) -> int | None:
    """Return an integer, numpy's too, as Python's own; None for anything else, and for a bool."""
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return None


def plain_number(value: object) -> float | None:
    """Return a real number as `plain_integer` does an integer."""
    whole = plain_integer(value)
    if whole is not None:
        return whole
    return float(value) if isinstance(value, Real) and not isinstance(value, bool) else None
