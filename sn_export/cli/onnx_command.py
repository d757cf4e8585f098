"""``sn-export onnx``: load a checkpoint into a network, export that, and prove the file.

Whether reports can be written is checked before the long work, and not only after it.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ..errors import UsageError
from ..files import name_side_file, require_onnx_place, require_writable
from ..results import ExporterChoice, ExportReport, Freeze, ParityError
from .console import (
    FAILED,
    collect_warnings,
    print_json,
    print_line,
    print_note,
    print_notes_of_checkpoint,
    print_warnings,
    show_frozen,
    show_parity,
    show_progress,
)
from .options import (
    CheckpointArgument,
    ModelOption,
    ModelOptions,
    Parsed,
    ProofOptions,
    parse_names,
)

_PICTURED = (".html", ".md")
_DYNAMIC = re.compile(r"(?P<name>\w+):(?P<position>\d+)=(?P<dim>[A-Za-z_]\w*)")

DynamicDims = dict[str, dict[int, str]]  # names of dimensions by input and position


def require_apart(outputs: Mapping[str, Path | None], inputs: Mapping[str, Iterable[Path]]) -> None:
    """Raise if two outputs are one file, or an output is also an input.

    Args:
        outputs: files to write, by their names in messages; None for those not asked for.
        inputs: files to read, by their names in messages.

    Raises:
        UsageError: naming both.
    """
    seen = {os.path.realpath(path): name for name, paths in inputs.items() for path in paths}
    for name, path in outputs.items():
        if path is None:
            continue
        other = seen.setdefault(os.path.realpath(path), name)
        if other != name:
            raise UsageError(f"{name} must be another file than {other}, both are '{path}'")


def require_report(path: Path | None, *, of_checkpoint: bool = False) -> None:
    """Raise if no report can be written to ``path``; None is no report.

    Raises:
        ValueError: for a suffix that such a report cannot have.
        OSError: if its folder is absent or cannot be written to, or it is a folder.
    """
    if path is not None:
        # Imported here: the templates take a moment to load.
        from ..reporting import INSPECTION_SUFFIXES, REPORT_SUFFIXES, require_report_path

        require_report_path(path, INSPECTION_SUFFIXES if of_checkpoint else REPORT_SUFFIXES)
        require_writable(path)


def is_pictured(path: Path | None) -> bool:
    """Whether a report is one to look at, with modules and true sigma."""
    return path is not None and path.suffix in _PICTURED


def write_report(
    content: Mapping[str, Any],
    path: Path | None,
    written: Path | None = None,
    *,
    of_checkpoint: bool = False,
) -> None:
    """Write a report, with the command line that asked for it.

    Args:
        content: the content of its JSON.
        path: the file; None for no report.
        written: the ONNX file that is already in its place, for the message.
        of_checkpoint: whether the content is from ``inspect``, not from an export.

    Raises:
        UsageError: if it cannot be written, as when the disk is full.
    """
    if path is None:
        return
    from ..reporting import save_inspection, save_report

    save = save_inspection if of_checkpoint else save_report
    try:
        save(content, path, command=shlex.join(["sn-export", *sys.argv[1:]]))
    except OSError as error:
        there = f"; '{written}' was proved and written all the same" if written else ""
        raise UsageError(f"cannot write '{path}': {error.strerror or error}{there}") from error


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


_EXTERNAL_DATA = {"auto": "auto", "always": True, "never": False}


@dataclass(frozen=True, kw_only=True)
class OnnxCommand(ModelOptions, ProofOptions):
    """Export a checkpoint to ONNX and prove the file; it is written only if it is equal.

    Exit codes: 0 proved and written, 1 not equal and nothing written, 2 bad input.
    """

    checkpoint: CheckpointArgument
    model: ModelOption
    output: Annotated[Path, typer.Option("--output", "-o", help="The ONNX file to write.")]
    overwrite: Annotated[
        bool,
        typer.Option("--force", help="Write -o also over what is no ONNX file, or as a .pt, say."),
    ] = False
    dynamic: Annotated[
        DynamicDims,
        Parsed(list[str], parse_dynamic, []),
        typer.Option("--dynamic", help="INPUT:DIM=NAME, a dimension that varies, e.g. x:0=batch."),
    ]
    exporter: Annotated[
        ExporterChoice,
        typer.Option(help="Torch's exporter; auto: dynamo, then torchscript where that fails."),
    ] = "auto"
    freeze: Annotated[
        Freeze, typer.Option(help="Every reparametrization, or spectral norm alone.")
    ] = "all"
    opset_version: Annotated[
        int | None, typer.Option("--opset", help="ONNX opset, from 11; torch's by default.")
    ] = None
    input_names: Annotated[
        list[str] | None,
        Parsed(list[str], partial(parse_names, "--input-names"), []),
        typer.Option("--input-names", help="Names of the file's inputs, with commas between."),
    ]
    output_names: Annotated[
        list[str] | None,
        Parsed(list[str], partial(parse_names, "--output-names"), []),
        typer.Option("--output-names", help="Names of the file's outputs, with commas between."),
    ]
    images: Annotated[
        list[str] | None,
        Parsed(list[str], partial(parse_names, "--images"), []),
        typer.Option("--images", help="Outputs shown in the report; by default pictures, sound."),
    ]
    external_data: Annotated[
        bool | Literal["auto"],
        Parsed(Literal["auto", "always", "never"], _EXTERNAL_DATA.__getitem__, "auto"),
        typer.Option("--external-data", help="Weights in a file of their own; auto: past 2 GB."),
    ]
    report: Annotated[
        Path | None, typer.Option(help="A report to keep: .html, .md or .json by its suffix.")
    ] = None
    save_case: Annotated[
        Path | None,
        typer.Option(help="An .npz of the proof's inputs and outputs, for 'check --case'."),
    ] = None
    metadata: Annotated[
        Mapping[str, str],
        Parsed(list[str], parse_metadata, []),
        typer.Option("--metadata", help="KEY=VALUE, to be written into the file."),
    ]
    per_module: Annotated[
        bool, typer.Option("--per-module", help="Compare the output of every module too.")
    ] = False

    def run(self) -> None:
        """Export and prove; raise `typer.Exit` with code 1 if the outputs differ."""
        self._require_possible()
        failed: ParityError | None = None
        with show_progress() as show, collect_warnings() as warned:
            from ..exporting import require_metadata
            from ..freezing import find_suspects
            from .model_factory import prepare_model

            require_metadata(self.metadata)
            model, inputs, loaded = prepare_model(self, self.checkpoint, self.model, show)
            suspects = [dataclasses.asdict(suspect) for suspect in find_suspects(model)]
            try:
                made = self._export(model, inputs, loaded.metadata())
            except ParityError as error:
                assert error.export is not None
                failed, made = error, error.export
        content = made.content() | {"suspects": suspects, "notes": [*loaded.notes, *warned]}
        write_report(content, self.report, None if failed else made.path)
        print_warnings(warned)
        for attempt in made.attempts:
            when = "too" if failed else "first"
            print_note(f"note: the {attempt.exporter} exporter was tried {when}: {attempt.error}")
        if self.as_json:
            print_json(content)
        else:
            print_notes_of_checkpoint(loaded.notes)
            self._show(made, warned)
        if failed:
            print_note(
                f"the file does not reproduce the model, and '{self.output}' was not written "
                f"(exporter: {made.exporter})"
            )
            raise typer.Exit(FAILED)

    def _require_possible(self) -> None:
        """Raise if a file cannot be read or written; torch is not imported for that."""
        self.require_files(self.checkpoint)
        require_apart(
            {
                "-o": self.output,
                "the external data of -o": name_side_file(self.output),
                "--report": self.report,
                "--save-case": self.save_case,
            },
            {"the checkpoint": [self.checkpoint], "--input-file": self.input_files},
        )
        require_onnx_place(
            self.output,
            has_data=self.external_data is True,
            overwrite=self.overwrite,
            advice="--force writes it all the same",
        )
        require_report(self.report)

    def _export(self, model: Any, inputs: Any, fit: Mapping[str, str]) -> ExportReport:
        from ..exporting import export_onnx

        is_index = self.checkpoint.name.endswith(".index.json")
        has_source = self.checkpoint.is_file() and not is_index  # one file holds all weights
        options = self.select_keywords(export_onnx) | {
            "per_module": self.per_module or is_pictured(self.report),
            "sigma_exact": is_pictured(self.report),
            "metadata": {**fit, **self.metadata},
        }
        return export_onnx(
            model,
            inputs.example.args,
            self.output,
            kwargs=inputs.example.kwargs,
            inputs=list(inputs.own),
            dynamic_shapes=inputs.make_dynamic_shapes(model, self.dynamic),
            source=self.checkpoint if has_source else None,
            keep_programs=False,
            **options,
        )

    def _show(self, made: ExportReport, told: Sequence[str]) -> None:
        show_frozen(made.frozen)
        show_parity(made.parity, self.per_module, told)
        if made.parity.passed:
            print_line(f"proved and written: {made.path} (opset {made.opset}, {made.exporter})")
