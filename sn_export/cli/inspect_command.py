"""`sn-export inspect`: what a checkpoint holds, without the code of a model."""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import UsageError
from ..files import starts_as_onnx
from ..text import format_count
from .console import number, print_json, print_line, print_note, progress, table
from .onnx_command import require_apart, require_report, write_report
from .request import CheckpointArgument, CheckpointOptions, require_checkpoint

_STATES = {
    "spectral_norm": "under spectral norm",
    "weight_norm": "under weight norm",
    "orthogonal": "kept orthogonal",
    "pruning": "pruned",
    "parametrization": "under other parametrizations",
}


@dataclass(frozen=True, kw_only=True)
class InspectCommand(CheckpointOptions):
    """List the reparametrized tensors in a checkpoint; no model code is needed.

    Of an ONNX file it shows inputs, outputs, opset, sizes, what made it, and the frozen layers.
    """

    checkpoint: CheckpointArgument
    report: Annotated[
        Path | None, typer.Option(help="A page to keep, .html, or its content, .json.")
    ] = None

    def run(self) -> None:
        """List them."""
        require_checkpoint(self.checkpoint)
        require_report(self.report)
        if self.report is not None and self.report.suffix == ".md":
            raise UsageError(f"the report of a checkpoint is .html or .json, got '{self.report}'")
        require_apart({"--report": self.report}, {"the checkpoint": [self.checkpoint]})
        if self._is_onnx():
            self._inspect_onnx()
            return
        with progress() as show:
            from ..checkpoints import inspect_checkpoint

            found = inspect_checkpoint(
                self.checkpoint,
                progress=lambda name, total: show(f"looked at {name}, of {total}"),
                **self.keywords_of(inspect_checkpoint),
            )
        content = _content(found)
        write_report(content, self.report, of_checkpoint=True)
        if self.as_json:
            print_json(content)
            return
        for note in found.notes:
            print_note(f"note: {note}")
        _show(found)

    def _is_onnx(self) -> bool:
        path = self.checkpoint
        return path.is_file() and (path.suffix == ".onnx" or starts_as_onnx(path))

    def _inspect_onnx(self) -> None:
        given: dict[str, Any] = {
            "--key": self.key,
            "--dim": self.dims,
            "--trust-pickle": self.trust_pickle,
            "--report": self.report is not None,
        }
        names = [name for name, value in given.items() if value]
        if names:
            raise UsageError(f"an ONNX file has no state dict: leave out {', '.join(names)}")
        from .onnx_file import inspect_onnx

        inspect_onnx(self.checkpoint, self.as_json)


def _show(found: Any) -> None:
    under = f" under '{found.key}'" if found.key else ""
    title, entries = f"{found.path} ({found.format}){under}", format_count(found.tensors, "entry")
    if not found.layers:
        print_line(f"{title}: no spectral norm or other reparametrization in {entries}")
        return
    keyed = len({layer.key for layer in found.layers}) > 1
    columns = ["module", "tensor", "kind", "shape", "dim", "sigma", "exact", "short by", "meaning"]
    rows = [
        [
            layer.module,
            layer.tensor,
            f"{layer.group.replace('_', ' ')} ({layer.spelling})",
            "x".join(map(str, layer.shape)),
            _dim(layer),
            number(layer.sigma),
            number(layer.sigma_exact),
            number(layer.shortfall),
            layer.meaning,
        ]
        for layer in found.layers
    ]
    if keyed:
        columns.insert(0, "under")
        rows = [[layer.key, *row] for layer, row in zip(found.layers, rows, strict=True)]
    table(f"{title}: {entries}, {_counts(found)}", columns, rows)


def _counts(found: Any) -> str:
    """Return how many there are, as in "2 tensors under spectral norm, 1 pruned"."""
    counts = Counter(layer.group for layer in found.layers)
    (first, state), *others = [
        (counts[group], _STATES[group]) for group in _STATES if counts[group]
    ]
    shown = [f"{format_count(first, 'tensor')} {state}", *(f"{n} {text}" for n, text in others)]
    return ", ".join(shown)


def _dim(layer: Any) -> str:
    if layer.dim is not None or (layer.group == "weight_norm" and "g" in layer.keys):
        return str(layer.dim)
    return "?" if layer.group.endswith("norm") else "-"


def _content(found: Any) -> dict[str, Any]:
    return {
        "path": found.path,
        "format": found.format,
        "key": found.key,
        "tensors": found.tensors,
        "notes": found.notes,
        "layers": [
            dataclasses.asdict(layer)
            | {
                "shortfall": layer.shortfall,
                "norm_in_use": layer.norm_in_use,
                "meaning": layer.meaning,
            }
            for layer in found.layers
        ],
    }
