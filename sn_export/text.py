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


def to_json_values(value: Any) -> Any:
    """Return ``value`` as JSON can hold it.

    Dataclasses become mappings of their fields, tuples lists, paths texts, NaN None, and infinities
    ``"inf"`` and ``"-inf"``::

        to_json_values({"path": Path("a.onnx"), "shape": (2, 3), "max_abs": math.nan})
        # {"path": "a.onnx", "shape": [2, 3], "max_abs": None}
    """
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else ("inf" if value > 0 else "-inf")
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = (entry.name for entry in dataclasses.fields(value))
        return {name: to_json_values(getattr(value, name)) for name in fields}
    if isinstance(value, Mapping):
        return {str(key): to_json_values(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json_values(entry) for entry in value]
    return fspath(value) if isinstance(value, PathLike) else value


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
