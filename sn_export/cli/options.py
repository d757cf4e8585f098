"""Options that several commands share, each declared once with its name, help, type and parser.

A command is a dataclass, and each of its options a field. A field has the name of the keyword that
it is passed as, so that `Command.select_keywords` passes it on without naming it again. Nothing
here imports torch, so ``--help`` and messages about wrong options come at once.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import CheckpointError, UsageError
from ..results import Draws, ProofDtype, Tolerance

_INPUT = re.compile(r"(?:(?P<name>\w+)=)?(?P<shape>[^:=]*)(?::(?P<dtype>\w+))?")
_MOST = 2**31  # elements of one input; they are drawn in 8 bytes each
_SHAPE = re.compile(r"\d+(?:x\d+)*")
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
    """Marks a field whose value is parsed from the text of the option.

    Attributes:
        written: the type that typer reads, such as ``list[str]``.
        parse: returns the value of the field; raises a UsageError for text without a meaning.
        default: parsed if the option is not given; ``...`` if it must be given.
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


def import_from_current_folder() -> None:
    """Let modules in the current folder be imported, as ``python -m`` does."""
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)


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


def parse_factory(text: str | None) -> str | None:
    """Return ``--model`` if it has the form ``pkg.nets:critic``; None if it was not given."""
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
    """Return the shapes that ``--input`` gives; positional ones must come first."""
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
    count = math.prod(max(size, 1) for size in sizes)  # a size beside a 0 counts too
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
        """Run the command."""
        raise NotImplementedError

    def select_keywords(self, function: Callable[..., Any]) -> dict[str, Any]:
        """Return the options that ``function`` takes as keywords of the same name."""
        taken = inspect.signature(function).parameters.values()
        keywords = {one.name for one in taken if one.kind is one.KEYWORD_ONLY}
        names = {entry.name for entry in dataclasses.fields(self)}
        return {name: getattr(self, name) for name in sorted(names & keywords)}


CheckpointArgument = Annotated[
    Path, typer.Argument(metavar="CHECKPOINT", help="A file, or a folder of shards.")
]


ModelOption = Annotated[
    str,
    Parsed(str, parse_factory),
    typer.Option("--model", help="MODULE:FACTORY; the current folder is importable."),
]


@dataclass(frozen=True, kw_only=True)
class CheckpointOptions(Command):
    """How a checkpoint is read."""

    key: Annotated[
        str | None, typer.Option("--key", help="Where in the checkpoint the state dict is.")
    ] = None
    dims: Annotated[
        Mapping[str, int],
        Parsed(list[str], parse_dims, []),
        typer.Option("--dim", help="NAME=D, where the dim of a tensor cannot be told."),
    ]
    trust_pickle: Annotated[
        bool,
        typer.Option(
            "--trust-pickle", help="Let the checkpoint run any code as you while it loads."
        ),
    ] = False


@dataclass(frozen=True, kw_only=True)
class ProofOptions(Command):
    """How a file is run and what counts as equal."""

    rtol: Annotated[
        Tolerance,
        Parsed(list[str], partial(parse_tolerance, "--rtol"), []),
        typer.Option(
            "--rtol", help="Relative tolerance, OUTPUT=NUMBER for one output; by default by dtype."
        ),
    ]
    atol: Annotated[
        Tolerance,
        Parsed(list[str], partial(parse_tolerance, "--atol"), []),
        typer.Option(
            "--atol", help="Absolute tolerance, OUTPUT=NUMBER for one output; by default by dtype."
        ),
    ]
    proof_dtype: Annotated[
        ProofDtype | None,
        typer.Option(
            help="Prove a copy of the file in this dtype, where onnxruntime lacks operators."
        ),
    ] = None
    draws: Annotated[
        Draws | None,
        typer.Option(help="zeros: without the noise of the forward, in the model as in the file."),
    ] = None
    providers: Annotated[
        Sequence[str],
        Parsed(list[str], partial(parse_names, "--providers"), ["CPUExecutionProvider"]),
        typer.Option("--providers", help="onnxruntime's execution providers, with commas between."),
    ]
    samples: Annotated[int, typer.Option(min=0, help="Random inputs beside the example.")] = 3


@dataclass(frozen=True, kw_only=True)
class ModelOptions(CheckpointOptions):
    """The network that a checkpoint is loaded into, and the inputs that it is called with."""

    shapes: Annotated[
        tuple[InputShape, ...],
        Parsed(list[str], parse_inputs, []),
        typer.Option("--input", help="[NAME=]SHAPE[:DTYPE], e.g. 2x3x8x8, x=1x77:int64."),
    ]
    input_files: Annotated[
        tuple[Path, ...],
        Parsed(list[Path], tuple, []),
        typer.Option("--input-file", help="An .npz of real inputs; part of the proof."),
    ]
    model_kwargs: Annotated[
        dict[str, Any],
        Parsed(str | None, parse_kwargs, None),
        typer.Option("--model-kwargs", help="Arguments of the factory as JSON."),
    ]
    network: Annotated[
        str | None,
        typer.Option(help="Attribute of what the factory makes that the checkpoint is for."),
    ] = None
    submodule: Annotated[
        str | None, typer.Option(help="Take this module within it, e.g. decoder or blocks.0.")
    ] = None
    method: Annotated[str | None, typer.Option(help="Call this method in place of forward.")] = None
    device: Annotated[
        str, typer.Option(help="Where the network runs, e.g. cuda; the file runs by --providers.")
    ] = "cpu"
    prefix: Annotated[
        str | None, typer.Option(help="Start of the names that are the network's.")
    ] = None
    strict: Annotated[
        bool,
        typer.Option(
            "--strict/--no-strict",
            help="Refuse missing and unknown keys, or list them and go on.",
        ),
    ] = True

    def require_files(self, checkpoint: Path) -> None:
        """Raise if a file to read is absent, or there is no input.

        Raises:
            CheckpointError: if there is no checkpoint.
            UsageError: for the inputs.
        """
        require_checkpoint(checkpoint)
        for path in self.input_files:
            if not path.exists():
                raise UsageError(f"there is no input file '{path}'")
        if not self.shapes and not self.input_files:
            raise UsageError(
                "give the shape of each input with --input, or values with --input-file"
            )


def refuse_options(given: Mapping[str, object], reason: str) -> None:
    """Raise a UsageError that names the options with a value, if there are any."""
    names = [name for name, value in given.items() if value]
    if names:
        raise UsageError(f"{reason}: leave out {', '.join(names)}")


def require_checkpoint(path: Path) -> None:
    """Raise a CheckpointError if there is nothing at ``path``."""
    if not path.exists():
        raise CheckpointError(f"there is no checkpoint at '{path}'")
