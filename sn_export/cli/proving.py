"""``sn-export onnx`` and ``sn-export check``: a checkpoint, a network, a proof."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
from torch import nn

from ..checkpoints import load_checkpoint, read_checkpoint
from ..checkpoints.publishing import drafts, publish
from ..divergence import Divergence
from ..errors import ExportError, ParityError
from ..exporting import export_onnx
from ..freezing import SpectralNormInfo
from ..parity import ParityReport, check_parity
from ..samples import random_sets
from .arguments import parse_dims, parse_dynamic, parse_kwargs
from .console import FAILED, answer, as_text, number, progress, say, table
from .factories import build_model
from .inputs import Inputs, gather

_BEFORE, _AFTER = 5, 3  # modules shown around the first one to differ


@dataclass(frozen=True)
class Request:
    """What both subcommands are given, as it was written."""

    checkpoint: Path
    model: str
    model_kwargs: str | None
    inputs: list[str]
    input_files: list[Path]
    rtol: float | None
    atol: float | None
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


def run_onnx(
    request: Request,
    output: Path,
    dynamic: list[str],
    exporter: Any,
    opset: int | None,
    external_data: Any,
    report_file: Path | None,
    as_json: bool,
) -> None:
    """Export and prove; raise `typer.Exit` with code 1 if the outputs differ."""
    with progress() as show:
        model, inputs, notes = request.prepare(show)
        _require_writable(report_file)
        failure: ParityError | None = None
        try:
            report = export_onnx(
                model,
                inputs.example.args,
                output,
                kwargs=inputs.example.kwargs,
                exporter=exporter,
                opset_version=opset,
                dynamic_shapes=parse_dynamic(dynamic, inputs.names(model)),
                external_data=external_data,
                rtol=request.rtol,
                atol=request.atol,
                samples=request.samples,
                inputs=list(inputs.own),
            )
        except ParityError as error:
            failure = error
    if failure is not None:
        parity = failure.report
        content = {"path": None, "parity": _parity(parity), "notes": notes}
        _deliver(content, report_file, as_json, lambda: _show_parity(parity))
        say(f"the file does not reproduce the model, and '{output}' was not written")
        raise typer.Exit(FAILED)

    def show_all() -> None:
        _show_notes(notes)
        _show_frozen(report.frozen)
        _show_parity(report.parity)
        print(f"proved and written: {report.path} (opset {report.opset}, {report.exporter})")

    _deliver({**json.loads(report.to_json()), "notes": notes}, report_file, as_json, show_all)


def run_check(request: Request, file: Path, as_json: bool) -> None:
    """Compare; raise `typer.Exit` with code 1 if the outputs differ."""
    with progress() as show:
        model, inputs, notes = request.prepare(show)
        sets = [inputs.example, *random_sets(inputs.example, request.samples), *inputs.own]
        show(f"comparing {len(sets)} input sets with onnxruntime")
        parity = check_parity(model, file, sets, rtol=request.rtol, atol=request.atol)
    _require_comparable(parity)

    def show_all() -> None:
        _show_notes(notes)
        _show_parity(parity)

    _deliver(
        {"path": str(file), "parity": _parity(parity), "notes": notes}, None, as_json, show_all
    )
    if not parity.passed:
        say(f"'{file}' does not reproduce the model")
        raise typer.Exit(FAILED)


def _require_comparable(parity: ParityReport) -> None:
    for output in parity.outputs:
        if not output.is_comparable:
            raise ExportError(f"output '{output.name}' cannot be compared: {output.reason}")


def _require_writable(path: Path | None) -> None:
    if path is not None:
        with drafts(path):
            pass


def _deliver(
    content: dict[str, Any],
    report_file: Path | None,
    as_json: bool,
    show: Callable[[], None],
) -> None:
    if report_file is not None:
        with drafts(report_file) as folder:
            draft = folder / report_file.name
            draft.write_text(as_text(content) + "\n", "utf-8")
            publish([draft], report_file.parent)
    answer(content) if as_json else show()


def _parity(parity: ParityReport) -> dict[str, Any]:
    return parity.content()


def _show_notes(notes: tuple[str, ...]) -> None:
    for note in notes:
        print(f"checkpoint: {note}")


def _show_frozen(frozen: tuple[SpectralNormInfo, ...]) -> None:
    if not frozen:
        print("no spectral norm in the model")
        return
    table(
        "frozen",
        ["tensor", "kind", "shape", "dtype", "dim", "sigma"],
        [
            [
                info.name,
                info.kind,
                "x".join(map(str, info.shape)),
                info.dtype,
                str(info.dim),
                number(info.sigma),
            ]
            for info in frozen
        ],
    )


def _show_parity(parity: ParityReport) -> None:
    table(
        f"parity with onnxruntime over {parity.samples} input sets",
        ["output", "shape", "dtype", "max abs", "max rel", "mean abs", "result"],
        [
            [
                output.name,
                "x".join(map(str, output.shape)),
                output.dtype,
                number(output.max_abs),
                number(output.max_rel),
                number(output.mean_abs),
                "equal" if output.passed else "NOT EQUAL",
            ]
            for output in parity.outputs
        ],
    )
    for output in parity.outputs:
        if output.reason:
            print(f"{output.name}: {output.reason}")
    if parity.divergence is not None and not parity.passed:
        _show_modules(parity.divergence)


def _show_modules(divergence: Divergence) -> None:
    """Print the modules around the first one to differ; the report has them all."""
    modules = divergence.modules
    bad = next((i for i, entry in enumerate(modules) if not entry.passed), len(modules))
    if divergence.first:
        table(
            "modules in network order",
            ["module", "type", "max abs", "result"],
            [
                [
                    entry.module or "(the model itself)",
                    entry.type,
                    number(entry.max_abs),
                    "equal" if entry.passed else "NOT EQUAL" + (", first" if i == bad else ""),
                ]
                for i, entry in enumerate(modules)
                if bad - _BEFORE <= i <= bad + _AFTER
            ],
        )
    print(divergence.reason)
