"""``sn-export inspect`` and ``sn-export convert``: no model code."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from ..checkpoints.convert import Conversion, convert_checkpoint
from ..checkpoints.inspection import Inspection, inspect_checkpoint
from ..checkpoints.sites import Spelling
from .arguments import parse_dims, parse_size
from .console import answer, number, progress, say, table


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
        answer(_inspection(found))
        return
    for note in found.notes:
        say(f"note: {note}")
    _show(found)


def run_convert(
    checkpoint: Path,
    to: Spelling,
    output: Path,
    weights_only: bool,
    max_shard_size: str | None,
    key: str | None,
    dim: list[str],
    trust_pickle: bool,
    as_json: bool,
) -> None:
    """Write ``checkpoint`` to ``output`` with its spectral norm spelled as ``to``."""
    dims = parse_dims(dim)
    limit = parse_size(max_shard_size) if max_shard_size is not None else None
    with progress() as show:
        made = convert_checkpoint(
            checkpoint,
            output,
            to,
            key=key,
            weights_only=weights_only,
            dims=dims,
            max_shard_size=limit,
            trust_pickle=trust_pickle,
            progress=lambda name, total: show(f"wrote {name}, of {total}"),
        )
    if as_json:
        answer(_conversion(made))
        return
    for note in made.notes:
        say(f"note: {note}")
    under = f" under '{made.key}'" if made.key else ""
    kept = len(made.found) - len(made.changed)
    already = f"; {kept} were spelled so already" if kept else ""
    print(f"respelled {len(made.changed)} spectral norms{under} as {to}{already}")
    for file in made.files:
        print(f"wrote {file}")


def _show(found: Inspection) -> None:
    under = f" under '{found.key}'" if found.key else ""
    title = (
        f"{found.path} ({found.format}){under}: {found.tensors} entries, "
        f"{len(found.layers)} tensors under spectral norm"
    )
    if not found.layers:
        print(f"{found.path} ({found.format}){under}: no spectral norm in {found.tensors} entries")
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


def _conversion(made: Conversion) -> dict[str, Any]:
    return {
        "files": [str(file) for file in made.files],
        "key": made.key,
        "found": [site.name for site in made.found],
        "changed": [site.name for site in made.changed],
        "notes": made.notes,
    }
