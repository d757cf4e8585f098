"""What is said of a file that would run code while it is read."""

from __future__ import annotations

import re

_GLOBAL = re.compile(r"(?:GLOBAL|class|function) ([\w.]+\.[\w.]+)")


def forbidden_call(error: BaseException) -> str | None:
    """Return the callable that `torch.load` refused to call, if that is what ``error`` says."""
    found = _GLOBAL.search(str(error))
    return found[1] if found is not None else None


def refusal(what: str, name: str) -> str:
    """Return the message about ``what`` that wants to call ``name``."""
    return (
        f"{what} wants to call '{name}' while it is read, and nothing was run; --trust-pickle "
        "lets the file run any code as you, so use it only for files whose origin you trust"
    )
