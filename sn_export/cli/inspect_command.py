"""`sn-export inspect`: what a checkpoint holds, without the code of a model."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from .console import number, print_json, print_line, print_note, progress, table
from .request import CheckpointArgument, CheckpointOptions, require_checkpoint


@dataclass(frozen=True, kw_only=True)
class InspectCommand(CheckpointOptions):
    """List the spectral norms in a checkpoint; no model code is needed."""

    checkpoint: CheckpointArgument

    def run(self) -> None:
        """List them."""
        require_checkpoint(self.checkpoint)
        with progress() as show:
            from ..checkpoints import inspect_checkpoint

            found = inspect_checkpoint(
                self.checkpoint,
                progress=lambda name, total: show(f"looked at {name}, of {total}"),
                **self.keywords_of(inspect_checkpoint),
            )
        if self.as_json:
            print_json(_content(found))
            return
        for note in found.notes:
            print_note(f"note: {note}")
        _show(found)


def _show(found: Any) -> None:
    under = f" under '{found.key}'" if found.key else ""
    title = (
        f"{found.path} ({found.format}){under}: {found.tensors} entries, "
        f"{len(found.layers)} tensors under spectral norm"
    )
    if not found.layers:
        print_line(
            f"{found.path} ({found.format}){under}: no spectral norm in {found.tensors} entries"
        )
        return
    keyed = len({layer.key for layer in found.layers}) > 1
    columns = ["module", "tensor", "kind", "shape", "dim", "sigma", "exact", "short by", "meaning"]
    rows = [
        [
            layer.module,
            layer.tensor,
            layer.kind,
            "x".join(map(str, layer.shape)),
            "?" if layer.dim is None else str(layer.dim),
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
    table(title, columns, rows)


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
