"""``sn-export onnx``: a checkpoint, a network, a proved file."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from ..exporting import export_onnx, require_metadata
from ..files import require_place, side_file
from ..freezing import find_suspects
from ..results import ParityError
from .console import FAILED, collect_warnings, print_json, print_line, print_note, progress
from .options import parse_dynamic, parse_metadata
from .output_files import is_pictured, require_apart, require_report, write_report
from .request import Request, _say_notes, _show_notes
from .tables import show_frozen, show_parity


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
    with progress() as show, collect_warnings() as warned:
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
        print_note(f"note: the {attempt.exporter} exporter was tried {when}: {attempt.error}")
    if as_json:
        print_json(content)
    else:
        _show_notes(notes)
        show_frozen(made.frozen)
        show_parity(made.parity, export.per_module)
    if failed:
        print_note(
            f"the file does not reproduce the model, and '{export.output}' was not written "
            f"(exporter: {made.exporter})"
        )
        raise typer.Exit(FAILED)
    if not as_json:
        print_line(f"proved and written: {made.path} (opset {made.opset}, {made.exporter})")
