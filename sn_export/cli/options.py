"""What a person writes on the command line, as values."""

from __future__ import annotations

import json
import re
from typing import Any

from ..errors import UsageError
from ..results import Tolerance

_DYNAMIC = re.compile(r"(?P<name>\w+):(?P<position>\d+)=(?P<dim>[A-Za-z_]\w*)")
_SIZE = re.compile(r"(?P<number>\d+(?:\.\d+)?) *(?P<unit>[KMGT]i?B|B)?", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Return the bytes that ``"500MB"`` or ``"2GiB"`` says."""
    match = _SIZE.fullmatch(text.strip())
    if match is None or not float(match["number"]):
        raise UsageError(f"--max-shard-size must be a size such as 500MB or 2GiB, got '{text}'")
    unit = (match["unit"] or "B").upper()
    base = 1024 if "I" in unit else 1000
    return int(float(match["number"]) * base ** " KMGT".find(unit[0] if unit != "B" else " "))


def parse_dims(texts: list[str]) -> dict[str, int]:
    """Return the dims that ``--dim NAME=D`` gives."""
    dims: dict[str, int] = {}
    for text in texts:
        name, _, number = text.rpartition("=")
        if not name or not re.fullmatch(r"-?\d+", number):
            raise UsageError(f"--dim must be NAME=D such as body.0.weight=1, got '{text}'")
        if name in dims:
            raise UsageError(f"--dim gives '{name}' twice: {dims[name]} and {int(number)}")
        dims[name] = int(number)
    return dims


def parse_kwargs(text: str | None) -> dict[str, Any]:
    """Return the keyword arguments in ``--model-kwargs``."""
    if text is None:
        return {}
    try:
        value = json.loads(text)
    except ValueError as error:
        raise UsageError(f"--model-kwargs must be a JSON object, got '{text}': {error}") from error
    if not isinstance(value, dict):
        raise UsageError(f"--model-kwargs must be a JSON object, got '{text}'")
    return value


def parse_metadata(texts: list[str]) -> dict[str, str]:
    """Return what ``--metadata KEY=VALUE`` gives; a value may hold ``=``."""
    found: dict[str, str] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not (key and equals):
            raise UsageError(f"--metadata must be KEY=VALUE such as run=42, got '{text}'")
        if key in found:
            raise UsageError(f"--metadata gives '{key}' twice: '{found[key]}' and '{value}'")
        found[key] = value
    return found


def parse_tolerance(option: str, texts: list[str]) -> Tolerance:
    """Return what ``--rtol`` or ``--atol`` gives: a number, or numbers by OUTPUT=NUMBER."""
    entries: dict[str | int, float] = {}
    for text in texts:
        output, equals, number = text.rpartition("=")
        try:
            value = float(number)
        except ValueError:
            raise UsageError(
                f"{option} must be a number, or OUTPUT=NUMBER such as score=1e-3, got '{text}'"
            ) from None
        if not equals and len(texts) == 1:
            return value
        key = int(output) if output.isdecimal() else output
        if not output or key in entries:
            raise UsageError(
                f"{option} must be one number for all outputs, or one OUTPUT=NUMBER for each, "
                f"got {' and '.join(texts)}"
            )
        entries[key] = value
    return entries or None


def parse_dynamic(texts: list[str], names: list[str]) -> dict[str, dict[int, str] | None] | None:
    """Return ``--dynamic x:0=batch`` as `torch.export` takes it, for inputs ``names``."""
    if not texts:
        return None
    shapes: dict[str, dict[int, str] | None] = dict.fromkeys(names)
    for text in texts:
        match = _DYNAMIC.fullmatch(text)
        if match is None:
            raise UsageError(f"--dynamic must be INPUT:DIM=NAME such as x:0=batch, got '{text}'")
        if match["name"] not in shapes:
            raise UsageError(
                f"--dynamic names the input '{match['name']}'; the inputs are {', '.join(names)}"
            )
        entry, position = shapes[match["name"]] or {}, int(match["position"])
        if position in entry:
            raise UsageError(
                f"--dynamic gives dimension {position} of '{match['name']}' twice: "
                f"'{entry[position]}' and '{match['dim']}'"
            )
        entry[position] = match["dim"]
        shapes[match["name"]] = entry
    return shapes
