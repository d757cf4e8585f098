"""Names as they stand in state dicts, messages and reports. It needs no torch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


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
