"""Names, numbers and texts for state dicts, messages and JSON. This file needs no torch."""

from __future__ import annotations

import dataclasses
import json
import math
import operator
import re
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from os import PathLike, fspath
from typing import Any

# Where the stack frames begin in torch's C++ errors, and in Python's that passed through C++.
_FRAMES = re.compile(
    r"\s*^(?:Exception raised from .+ \(most recent call first\):$|frame #\d+: "
    r"|At:\n  .+\(\d+\): )",
    re.MULTILINE,
)

_PLURALS = {"is": "are", "was": "were", "has": "have", "looks": "look"}


def qualify(path: str, name: str) -> str:
    """Join a module's path and a name as `torch.nn.Module.state_dict` does; the root's is empty."""
    return f"{path}.{name}" if path else name


def name_dtype(tensor: Any) -> str:
    """Return the name of a tensor's dtype, such as ``"float32"``."""
    return str(tensor.dtype).removeprefix("torch.")


def escape_unprintable(text: str) -> str:
    r"""Return ``text`` with every character that is not printable written as Python escapes it.

    A text from a file must neither move a terminal's cursor (ESC, BEL, CR, C1), nor turn other
    text around (bidirectional marks), nor begin a line of its own, nor fail to be encoded (lone
    surrogates). Escaping twice changes nothing more. HTML, Markdown and rich markup are printable,
    so whoever writes one of them escapes its markup besides.

    Example::

        escape_unprintable("a\x1b[31m\nsn-export: done")  # r"a\x1b[31m\nsn-export: done"
    """
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def escape_lines(value: Any) -> Any:
    """Return a text with each of its lines escaped, and any other value as it is."""
    if not isinstance(value, str):
        return value
    return "\n".join(map(escape_unprintable, value.split("\n")))


def quote_name(name: object) -> str:
    """Return a name or path in quotes and escaped, without the middle of a very long one."""
    text = str(name)
    if len(text) > 1000:
        text = f"{text[:500]}...{text[-500:]}"
    return f"'{escape_unprintable(text)}'"


def quote_names(names: Iterable[object], most: int = 5) -> str:
    """Return names in quotes and escaped, the first few of many."""
    return shorten_list(map(quote_name, names), most)


def quote_subject(names: Sequence[object], verb: str) -> str:
    """Return names with their verb, which is given in the singular.

    ::

        quote_subject(["a"], "is")  # "'a' is"
        quote_subject(["a", "b"], "is")  # "'a', 'b' are"
    """
    return f"{quote_names(names)} {verb if len(names) == 1 else _PLURALS[verb]}"


def shorten_list(texts: Iterable[str], most: int = 5) -> str:
    """Return texts with commas between them, and how many more there are past ``most``."""
    texts = list(texts)
    more = f" and {len(texts) - most} more" if len(texts) > most else ""
    return ", ".join(texts[:most]) + more


def format_count(number: int, noun: str) -> str:
    """Return a number with its noun: ``"1 entry"``, ``"2 entries"``, ``"0 tensors"``."""
    if number == 1:
        return f"1 {noun}"
    return f"{number} {noun[:-1]}ies" if noun.endswith("y") else f"{number} {noun}s"


def describe_type(value: object) -> str:
    """Return ``"a value of type 'int'"``: a message must not show the value, which a file chose."""
    return f"a value of type {quote_name(type(value).__name__)}"


def describe_error(error: BaseException) -> str:
    """Return an error with its type: ``"ValueError: no such key"``."""
    return f"{type(error).__name__}: {error}"


def join_lines(text: str) -> str:
    """Return ``text`` as one line: each break and the blanks around it become one blank."""
    return " ".join(line.strip() for line in text.splitlines() if line.strip())


def strip_frames(text: str) -> str:
    """Return the text of an error without the stack frames that torch's C++ code appends."""
    return _FRAMES.split(text, maxsplit=1)[0]


def format_json(content: Any) -> str:
    """Return JSON in ASCII, all of it printable, whatever texts it holds.

    Raises:
        ValueError: for NaN and infinities, which `to_json_values` replaces.
    """
    return json.dumps(content, indent=2, allow_nan=False).replace("\x7f", r"\u007f")


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


def as_plain_integer(value: object) -> int | None:
    """Return an integer of Python or numpy as Python's; None for anything else, and for a bool."""
    if type(value).__name__ in ("bool", "bool_"):  # numpy 1.26 takes its own for integers
        return None
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return None


def require_choice(option: str, value: Any, choices: Sequence[object]) -> Any:
    """Return ``value`` if it is one of the choices of ``option``.

    Raises:
        ValueError: if it is not: ``freeze must be 'spectral_norm' or 'all', got 'none'``.
    """
    if value in choices:
        return value
    *others, last = map(repr, choices)
    raise ValueError(f"{option} must be {', '.join(others)} or {last}, got {value!r}")


def as_plain_number(value: object) -> float | None:
    """Return a real number of Python or numpy as Python's; None for anything else."""
    whole = as_plain_integer(value)
    if whole is not None:
        return whole
    return float(value) if isinstance(value, Real) and not isinstance(value, bool) else None
