"""`sn-export inspect`: what a checkpoint holds, without the code of a model."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from ..checkpoints import Inspection, inspect_checkpoint
from .console import number, print_json, print_line, print_note, progress, table
from .options import parse_dims


def run_inspect(
    checkpoint: Path, key: str | None, dim: list[str], trust_pickle: bool, as_json: bool
) -> None:
    """List the spectral norms in ``checkpoint``."""
    dims = parse_dims(dim)
    with progress() as show:
        found = inspect_checkpoint(
            checkpoint,
            key=key,
            dims=dims,
            trust_pickle=trust_pickle,
            progress=lambda name, total: show(f"looked at {name}, of {total}"),
        )
    if as_json:
        print_json(_inspection(found))
        return
    for note in found.notes:
        print_note(f"note: {note}")
    _show(found)


def _show(found: Inspection) -> None:
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


def _inspection(found: Inspection) -> dict[str, Any]:
    return {
        "path": str(found.path),
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
