"""Options: each is declared here or in its command, once, with its name, help, type and parser.

A command is a dataclass, and an option of it is a field. The name of the field is that of the
keyword that it becomes, so that `Command.keywords_of` hands it on without naming it again. Nothing
here imports torch: ``--help`` and messages about what was written come at once.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from ..errors import UsageError
from ..results import Tolerance

_DYNAMIC = re.compile(r"(?P<name>\w+):(?P<position>\d+)=(?P<dim>[A-Za-z_]\w*)")
_INPUT = re.compile(r"(?:(?P<name>\w+)=)?(?P<shape>[^:=]*)(?::(?P<dtype>\w+))?")
_MOST = 2**31  # elements of one input; they are drawn in 8 bytes each
_SHAPE = re.compile(r"\d+(?:x\d+)*")
_SIZE = re.compile(r"(?P<number>\d+(?:\.\d+)?) *(?P<unit>[KMGT]i?B|B)?", re.IGNORECASE)
_DTYPES = (
    "float64",
    "float32",
    "float16",
    "bfloat16",
    "complex64",
    "complex128",
    "int64",
    "int32",
    "int16",
    "int8",
    "uint8",
    "bool",
)


@dataclass(frozen=True)
class Parsed:
    """An option whose value is made from what is written.

    Attributes:
        written: the type that typer reads.
        parse: makes the value of it; raises a UsageError for what cannot be understood.
        default: what counts as written where the option is not given; ``...`` where it must be.
    """

    written: Any
    parse: Callable[[Any], Any]
    default: Any = ...


@dataclass(frozen=True)
class InputShape:
    """One ``--input``: ``x=1x77:int64`` has the name x, the shape 1 x 77 and the dtype int64."""

    text: str
    name: str | None
    shape: tuple[int, ...]
    dtype: str


DynamicDims = dict[str, dict[int, str]]  # names of dimensions by input and position


def import_from_current_folder() -> None:
    """Let modules in the current folder be imported, as ``python -m`` does."""
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)


def parse_size(text: str | None) -> int | None:
    """Return the bytes that ``"500MB"`` or ``"2GiB"`` says."""
    if text is None:
        return None
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
    except (ValueError, RecursionError) as error:
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


def parse_names(option: str, texts: list[str]) -> list[str] | None:
    """Return the names that ``--input-names x,y`` gives, or ``--input-names x --input-names y``."""
    names = [name.strip() for text in texts for name in text.split(",")]
    if "" in names:
        raise UsageError(f"{option} must be names with commas between them, got '{texts[0]}'")
    return names or None


def parse_dynamic(texts: list[str]) -> DynamicDims:
    """Return what ``--dynamic x:0=batch`` gives: ``{"x": {0: "batch"}}``."""
    dims: DynamicDims = {}
    for text in texts:
        match = _DYNAMIC.fullmatch(text)
        if match is None:
            raise UsageError(f"--dynamic must be INPUT:DIM=NAME such as x:0=batch, got '{text}'")
        entry, position = dims.setdefault(match["name"], {}), int(match["position"])
        if position in entry:
            raise UsageError(
                f"--dynamic gives dimension {position} of '{match['name']}' twice: "
                f"'{entry[position]}' and '{match['dim']}'"
            )
        entry[position] = match["dim"]
    return dims


def parse_factory(text: str | None) -> str | None:
    """Return ``--model`` if it is MODULE:FACTORY, names with dots on both sides."""
    if text is not None:
        module, colon, factory = text.partition(":")
        if not (module and colon and factory):
            raise UsageError(
                f"--model must be MODULE:FACTORY such as pkg.nets:critic, got '{text}'"
            )
        if not all(part.isidentifier() for part in module.split(".")):
            raise UsageError(
                f"--model must be MODULE:FACTORY with the module as in an import, such as "
                f"pkg.nets:critic, got '{text}'"
            )
    return text


def parse_inputs(texts: list[str]) -> tuple[InputShape, ...]:
    """Return the shapes that ``--input`` gives; those without a name come first."""
    shapes: list[InputShape] = []
    for text in texts:
        one = _parse_input(text)
        names = [shape.name for shape in shapes if shape.name is not None]
        if one.name in names:
            raise UsageError(f"--input gives '{one.name}' twice, again with {text}")
        if one.name is None and names:
            raise UsageError(f"--input {text} has no name and follows one that has")
        shapes.append(one)
    return tuple(shapes)


def _parse_input(text: str) -> InputShape:
    match = _INPUT.fullmatch(text)
    if match is None or not (match["shape"] == "scalar" or _SHAPE.fullmatch(match["shape"])):
        raise UsageError(
            f"--input must be [NAME=]SHAPE[:DTYPE] such as 2x3x8x8 or x=1x77:int64, got '{text}'"
        )
    dtype = match["dtype"] or "float32"
    if dtype not in _DTYPES:
        raise UsageError(f"--input {text}: dtype must be one of {', '.join(_DTYPES)}")
    sizes = () if match["shape"] == "scalar" else tuple(map(int, match["shape"].split("x")))
    count = math.prod(max(size, 1) for size in sizes)  # beside a 0 no size may be too large either
    if count > _MOST:
        raise UsageError(
            f"--input {text}: an input must have at most {_MOST} elements, not {count}"
        )
    return InputShape(text, match["name"], sizes, dtype)


@dataclass(frozen=True, kw_only=True)
class Command:
    """A subcommand: its options are its fields, its help is its docstring."""

    as_json: Annotated[bool, typer.Option("--json", help="Print JSON alone on stdout.")] = False
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False

    def run(self) -> None:
        """Do it."""
        raise NotImplementedError

    def keywords_of(self, function: Callable[..., Any]) -> dict[str, Any]:
        """Return the options that ``function`` takes as keywords of the same name."""
        taken = inspect.signature(function).parameters.values()
        keywords = {one.name for one in taken if one.kind is one.KEYWORD_ONLY}
        names = {entry.name for entry in dataclasses.fields(self)}
        return {name: getattr(self, name) for name in sorted(names & keywords)}
