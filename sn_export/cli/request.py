"""The options that subcommands share: how to read a checkpoint, call a network and compare."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import CheckpointError, UsageError
from ..results import Draws, ProofDtype, Tolerance
from .console import print_line, print_note
from .options import (
    Command,
    InputShape,
    Parsed,
    parse_dims,
    parse_factory,
    parse_inputs,
    parse_kwargs,
    parse_names,
    parse_tolerance,
)

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
    """The network that a checkpoint is loaded into, and what it is called with."""

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


def require_checkpoint(path: Path) -> None:
    """Raise a CheckpointError if there is nothing at ``path``."""
    if not path.exists():
        raise CheckpointError(f"there is no checkpoint at '{path}'")


def print_notes_of_checkpoint(notes: Iterable[str]) -> None:
    """Print on stdout what had to be done to load a checkpoint."""
    for note in notes:
        print_line(f"checkpoint: {note}")


def print_warnings(notes: Iterable[str]) -> None:
    """Print sn_export's own warnings on stderr."""
    for note in notes:
        print_note(f"note: {note}")
