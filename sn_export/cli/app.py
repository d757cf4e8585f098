"""The four subcommands. Torch is imported inside them, so that ``--help`` answers at once."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from enum import Enum
from functools import partial
from importlib.metadata import PackageNotFoundError, version as version_of
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import UsageError
from .console import errors_as_messages, run
from .options import parse_tolerance

app = typer.Typer(
    name="sn-export",
    help="From a checkpoint with spectral normalisation to a proved ONNX file.",
    pretty_exceptions_enable=False,
)


class Exporter(str, Enum):
    """The two exporters of torch, or whichever proves first."""

    auto = "auto"
    dynamo = "dynamo"
    torchscript = "torchscript"


class Freeze(str, Enum):
    """Which tensors are frozen."""

    spectral_norm = "spectral_norm"
    all = "all"


class ProofDtype(str, Enum):
    """The dtypes in which a copy of a file can be proved."""

    float32 = "float32"


class ExternalData(str, Enum):
    """Where the weights of an ONNX file go."""

    auto = "auto"
    always = "always"
    never = "never"


class Spelling(str, Enum):
    """How a state dict says spectral norm."""

    plain = "plain"
    hook = "hook"
    parametrization = "parametrization"


CheckpointArgument = Annotated[
    Path, typer.Argument(metavar="CHECKPOINT", help="A file, or a folder of shards.")
]
Model = Annotated[
    str, typer.Option("--model", help="MODULE:FACTORY; the current folder is importable.")
]
ModelKwargs = Annotated[
    str | None, typer.Option("--model-kwargs", help="Arguments of the factory as JSON.")
]
Input = Annotated[
    list[str], typer.Option("--input", help="[NAME=]SHAPE[:DTYPE], e.g. 2x3x8x8, x=1x77:int64.")
]
InputFile = Annotated[
    list[Path], typer.Option("--input-file", help="An .npz of real inputs; part of the proof.")
]
Rtol = Annotated[
    list[str],
    typer.Option(help="Relative tolerance, OUTPUT=NUMBER for one output; by default by dtype."),
]
Atol = Annotated[
    list[str],
    typer.Option(help="Absolute tolerance, OUTPUT=NUMBER for one output; by default by dtype."),
]
ProofType = Annotated[
    ProofDtype | None,
    typer.Option(help="Prove a copy of the file in this dtype, where onnxruntime lacks operators."),
]
Samples = Annotated[int, typer.Option(min=0, help="Random inputs beside the example.")]
Key = Annotated[str | None, typer.Option(help="Where in the checkpoint the state dict is.")]
Prefix = Annotated[str | None, typer.Option(help="Start of the names that are the network's.")]
Dim = Annotated[
    list[str], typer.Option("--dim", help="NAME=D, where a square weight's dim cannot be told.")
]
TrustPickle = Annotated[
    bool,
    typer.Option("--trust-pickle", help="Let the checkpoint run any code as you while it loads."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON alone on stdout.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def main() -> None:
    """Run the command line."""
    sys.exit(run(app, "sn-export"))


def _version(wanted: bool) -> None:
    if wanted:
        try:
            print(f"sn-export {version_of('sn-export')}")
        except PackageNotFoundError:
            print("sn-export, not installed")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


@app.command()
def onnx(
    checkpoint: CheckpointArgument,
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="The ONNX file to write.")],
    inputs: Input = [],  # noqa: B006 - typer copies it
    input_files: InputFile = [],  # noqa: B006
    model_kwargs: ModelKwargs = None,
    dynamic: Annotated[
        list[str], typer.Option(help="INPUT:DIM=NAME, a dimension that varies, e.g. x:0=batch.")
    ] = [],  # noqa: B006
    exporter: Annotated[
        Exporter,
        typer.Option(help="Torch's exporter; auto: dynamo, then torchscript where that fails."),
    ] = Exporter.auto,
    freeze: Annotated[
        Freeze, typer.Option(help="Spectral norm alone, or every reparametrization.")
    ] = Freeze.spectral_norm,
    opset: Annotated[int | None, typer.Option(help="ONNX opset; torch's by default.")] = None,
    rtol: Rtol = [],  # noqa: B006
    atol: Atol = [],  # noqa: B006
    proof_dtype: ProofType = None,
    samples: Samples = 3,
    external_data: Annotated[
        ExternalData, typer.Option(help="Weights in a file of their own; auto: past 2 GB.")
    ] = ExternalData.auto,
    report: Annotated[
        Path | None, typer.Option(help="A report to keep: .html, .md or .json by its suffix.")
    ] = None,
    save_case: Annotated[
        Path | None,
        typer.Option(help="An .npz of the proof's inputs and outputs, for 'check --case'."),
    ] = None,
    metadata: Annotated[
        list[str], typer.Option("--metadata", help="KEY=VALUE, to be written into the file.")
    ] = [],  # noqa: B006
    per_module: Annotated[
        bool, typer.Option("--per-module", help="Compare the output of every module too.")
    ] = False,
    key: Key = None,
    prefix: Prefix = None,
    dim: Dim = [],  # noqa: B006
    trust_pickle: TrustPickle = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Export a checkpoint to ONNX and prove the file; it is written only if it is equal.

    Exit codes: 0 proved and written, 1 not equal and nothing written, 2 bad input.
    """
    with errors_as_messages(debug):
        from .onnx_command import Export, run_onnx
        from .request import Request

        relative, absolute = parse_tolerance("--rtol", rtol), parse_tolerance("--atol", atol)
        request = Request(
            checkpoint, model, model_kwargs, inputs, input_files, relative, absolute, samples
        ).choosing(key, prefix, dim, trust_pickle)
        side_file = {"auto": "auto", "always": True, "never": False}[external_data.value]
        export = Export(
            output,
            dynamic,
            exporter.value,
            opset,
            side_file,
            report,
            save_case,
            metadata,
            per_module,
            freeze.value,
            proof_dtype.value if proof_dtype else None,
        )
        run_onnx(request, export, as_json)


@app.command()
def inspect(
    checkpoint: CheckpointArgument,
    key: Key = None,
    dim: Dim = [],  # noqa: B006
    trust_pickle: TrustPickle = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """List the spectral norms in a checkpoint; no model code is needed."""
    with errors_as_messages(debug):
        from .inspect_command import run_inspect

        run_inspect(checkpoint, key, dim, trust_pickle, as_json)


@app.command()
def convert(
    checkpoint: CheckpointArgument,
    to: Annotated[Spelling, typer.Option(help="How to spell spectral norm.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="A .pt or .safetensors file.")],
    weights_only: Annotated[
        bool, typer.Option("--weights-only", help="Keep the state dict alone.")
    ] = False,
    max_shard_size: Annotated[
        str | None, typer.Option(help="Shards of at most this size, e.g. 2GB, with an index.")
    ] = None,
    key: Key = None,
    dim: Dim = [],  # noqa: B006
    trust_pickle: TrustPickle = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write a checkpoint with its spectral norm spelled differently, bit for bit the same."""
    with errors_as_messages(debug):
        from .convert_command import run_convert

        run_convert(
            checkpoint,
            to.value,
            output,
            weights_only,
            max_shard_size,
            key,
            dim,
            trust_pickle,
            as_json,
        )


@app.command()
def check(
    file: Annotated[
        Path, typer.Argument(metavar="MODEL.onnx", help="The ONNX file, or a folder of cases.")
    ],
    checkpoint: Annotated[
        Path | None, typer.Argument(metavar="[CHECKPOINT]", help="A file, or a folder of shards.")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="MODULE:FACTORY, as for 'onnx'.")
    ] = None,
    case: Annotated[
        Path | None, typer.Option(help="Replay what 'onnx --save-case' wrote; no model needed.")
    ] = None,
    inputs: Input = [],  # noqa: B006
    input_files: InputFile = [],  # noqa: B006
    model_kwargs: ModelKwargs = None,
    rtol: Rtol = [],  # noqa: B006
    atol: Atol = [],  # noqa: B006
    proof_dtype: ProofType = None,
    samples: Samples = 3,
    key: Key = None,
    prefix: Prefix = None,
    dim: Dim = [],  # noqa: B006
    trust_pickle: TrustPickle = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Compare an ONNX file with a checkpoint, or with a saved case.

    A folder is searched for NAME.onnx with NAME.npz beside it, and every case is replayed.

    Exit codes: 0 equal, 1 not equal, 2 they cannot be compared.
    """
    with errors_as_messages(debug):
        relative, absolute = parse_tolerance("--rtol", rtol), parse_tolerance("--atol", atol)
        dtype: Any = proof_dtype.value if proof_dtype else None
        given = {
            "CHECKPOINT": checkpoint,
            "--model": model,
            "--input": inputs,
            "--input-file": input_files,
            "--model-kwargs": model_kwargs,
            "--key": key,
            "--prefix": prefix,
            "--dim": dim,
            "--trust-pickle": trust_pickle,
        }
        if case is not None or file.is_dir():
            _require_none(given, "--case" if case is not None else "a folder of cases")
            if case is not None and file.is_dir():
                raise UsageError(f"--case goes with one ONNX file, and '{file}' is a folder")
            from ..proving import check_case
            from .check_command import run_case, run_folder

            replay = partial(check_case, rtol=relative, atol=absolute, proof_dtype=dtype)
            if case is not None:
                run_case(file, case, replay, as_json)
            else:
                run_folder(file, replay, as_json)
            return
        if not file.exists():
            raise UsageError(f"there is no file or folder '{file}'")
        if checkpoint is None or model is None:
            missing = "CHECKPOINT" if checkpoint is None else "--model"
            raise UsageError(f"check needs {missing}, or a saved case with --case")
        from .check_command import run_check
        from .request import Request

        request = Request(
            checkpoint, model, model_kwargs, inputs, input_files, relative, absolute, samples
        ).choosing(key, prefix, dim, trust_pickle)
        run_check(request, file, as_json, dtype)


def _require_none(given: Mapping[str, object], instead: str) -> None:
    names = [name for name, value in given.items() if value]
    if names:
        raise UsageError(f"{instead} needs no model: leave out {', '.join(names)}")
