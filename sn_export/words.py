"""Names and texts as they stand in state dicts, messages and reports. It needs no torch."""

from __future__ import annotations

import re
from collections.abc import Iterable
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


def listed(names: Iterable[str], most: int = 5) -> str:
    """Return names in quotes, the first few of many."""
    return first_few((f"'{name}'" for name in names), most)


def first_few(texts: Iterable[str], most: int = 5) -> str:
    """Return texts with commas between them, and how many more there are past ``most``."""
    texts = list(texts)
    more = f" and {len(texts) - most} more" if len(texts) > most else ""
    return ", ".join(texts[:most]) + more


def without_frames(text: str) -> str:
    """Return the text of an error up to where it lists the frames of C++ that it came from."""
    return _FRAMES.split(text, maxsplit=1)[0]
