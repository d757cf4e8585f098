"""``sn-export onnx`` and ``sn-export check``: a checkpoint, a network, a proof."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
from torch import nn

from ..checkpoints.load import load_checkpoint
from ..checkpoints.read import read_checkpoint
from ..errors import ExportError
from ..exporting import export_onnx
from ..files import require_place, side_file
from ..freezing.find import find_suspects
from ..metadata import require_metadata
from ..parity import check_parity
from ..results import ParityError, ParityReport
from ..running.input_set import random_sets
from ..tolerances import Tolerance
from .arguments import parse_dims, parse_dynamic, parse_kwargs, parse_metadata
from .console import FAILED, answer, noted, progress, say
from .factories import build_model
from .inputs import Inputs, gather
from .outputs import is_pictured, require_apart, require_report, write_report
from .showing import show_frozen, show_parity


@dataclass(frozen=True)
class Request:
    """What both subcommands are given, as it was written."""

    checkpoint: Path
    model: str
    model_kwargs: str | None
    inputs: list[str]
    input_files: list[Path]
    rtol: Tolerance
    atol: Tolerance
    samples: int
    key: str | None = None
    prefix: str | None = None
    dim: tuple[str, ...] = ()
    trust_pickle: bool = False

    def choosing(
        self, key: str | None, prefix: str | None, dim: list[str], trust_pickle: bool
    ) -> Request:
        """Return the request with what it says about the checkpoint."""
        return dataclasses.replace(
            self, key=key, prefix=prefix, dim=tuple(dim), trust_pickle=trust_pickle
        )

    def prepare(self, show: Callable[[str], None]) -> tuple[nn.Module, Inputs, tuple[str, ...]]:
        """Return the network with the checkpoint in it, the inputs, and what had to be done."""
        kwargs, dims = parse_kwargs(self.model_kwargs), parse_dims(list(self.dim))
        inputs = gather(self.inputs, self.input_files)
        show(f"reading {self.checkpoint}")
        content = read_checkpoint(self.checkpoint, trust_pickle=self.trust_pickle)
        show(f"building {self.model}")
        model = build_model(self.model, kwargs)
        show("loading the checkpoint into the model")
        loaded = load_checkpoint(model, content, key=self.key, prefix=self.prefix, dims=dims)
        return model, inputs, loaded.notes

    def source(self) -> Path | None:
        """Return the file that says what the weights are; an index or a folder does not."""
        is_index = self.checkpoint.name.endswith(".index.json")
        return self.checkpoint if self.checkpoint.is_file() and not is_index else None


@dataclass(frozen=True)
class Export:
    """What ``sn-export onnx`` is given besides, as it was written."""

    output: Path
    dynamic: list[str]
    exporter: Any
    opset: int | None
    external_data: Any
    report: Path | None
    save_case: Path | None
    metadata: list[str]
    per_module: bool
    freeze: Any
    proof_dtype: Any

    def require_possible(self, request: Request) -> dict[str, str]:
        """Return the metadata, if that and the files to write are possible."""
        require_place(self.output)
        require_apart(
            {
                "-o": self.output,
                "the external data of -o": side_file(self.output),
                "--report": self.report,
                "--save-case": self.save_case,
            },
            {"the checkpoint": [request.checkpoint], "--input-file": request.input_files},
        )
        require_report(self.report)
        metadata = parse_metadata(self.metadata)
        require_metadata(metadata)
        return metadata


def run_onnx(request: Request, export: Export, as_json: bool) -> None:
    """Export and prove; raise `typer.Exit` with code 1 if the outputs differ."""
    metadata = export.require_possible(request)
    failed: ParityError | None = None
    with progress() as show, noted() as warned:
        model, inputs, notes = request.prepare(show)
        suspects = [dataclasses.asdict(suspect) for suspect in find_suspects(model)]
        try:
            made = export_onnx(
                model,
                inputs.example.args,
                export.output,
                kwargs=inputs.example.kwargs,
                exporter=export.exporter,
                opset_version=export.opset,
                dynamic_shapes=parse_dynamic(export.dynamic, inputs.names(model)),
                external_data=export.external_data,
                rtol=request.rtol,
                atol=request.atol,
                samples=request.samples,
                inputs=list(inputs.own),
                freeze=export.freeze,
                proof_dtype=export.proof_dtype,
                keep_programs=False,
                per_module=export.per_module or is_pictured(export.report),
                save_case=export.save_case,
                metadata=metadata,
                source=request.source(),
                sigma_exact=is_pictured(export.report),
            )
        except ParityError as error:
            assert error.export is not None
            failed, made = error, error.export
    content = json.loads(made.to_json())
    content |= {"suspects": suspects, "notes": [*notes, *warned]}
    write_report(content, export.report, None if failed else made.path)
    _say_notes(warned)
    for attempt in made.attempts:
        when = "too" if failed else "first"
        say(f"note: the {attempt.exporter} exporter was tried {when}: {attempt.error}")
    if as_json:
        answer(content)
    else:
        _show_notes(notes)
        show_frozen(made.frozen)
        show_parity(made.parity, export.per_module)
    if failed:
        say(
            f"the file does not reproduce the model, and '{export.output}' was not written "
            f"(exporter: {made.exporter})"
        )
        raise typer.Exit(FAILED)
    if not as_json:
        print(f"proved and written: {made.path} (opset {made.opset}, {made.exporter})")


def run_check(request: Request, file: Path, as_json: bool, proof_dtype: Any = None) -> None:
    """Compare; raise `typer.Exit` with code 1 if the outputs differ."""
    with progress() as show, noted() as warned:
        model, inputs, notes = request.prepare(show)
        sets = [inputs.example, *random_sets(inputs.example, request.samples), *inputs.own]
        show(f"comparing {len(sets)} input sets with onnxruntime")
        parity = check_parity(
            model, file, sets, rtol=request.rtol, atol=request.atol, proof_dtype=proof_dtype
        )
    require_comparable(parity)
    _say_notes(warned)
    if as_json:
        answer({"path": str(file), "parity": parity.content(), "notes": [*notes, *warned]})
    else:
        _show_notes(notes)
        show_parity(parity)
    if not parity.passed:
        say(f"'{file}' does not reproduce the model")
        raise typer.Exit(FAILED)


def require_comparable(parity: ParityReport) -> None:
    """Raise an ExportError if an output has nothing that could be compared."""
    for output in parity.outputs:
        if not output.is_comparable:
            raise ExportError(f"output '{output.name}' cannot be compared: {output.reason}")


def _show_notes(notes: Iterable[str]) -> None:
    for note in notes:
        print(f"checkpoint: {note}")


def _say_notes(notes: Iterable[str]) -> None:
    for note in notes:
        say(f"note: {note}")
