"""``sn-export convert``: a checkpoint spelled differently, without the code of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..checkpoints import Conversion, Spelling, convert_checkpoint
from .console import print_json, print_line, print_note, progress
from .options import parse_dims, parse_size


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
        print_json(_conversion(made))
        return
    for note in made.notes:
        print_note(f"note: {note}")
    under = f" under '{made.key}'" if made.key else ""
    kept = len(made.found) - len(made.changed)
    already = f"; {kept} were spelled so already" if kept else ""
    print_line(f"respelled {len(made.changed)} spectral norms{under} as {to}{already}")
    for file in made.files:
        print_line(f"wrote {file}")


def _conversion(made: Conversion) -> dict[str, Any]:
    return {
        "files": [str(file) for file in made.files],
        "key": made.key,
        "found": [site.name for site in made.found],
        "changed": [site.name for site in made.changed],
        "notes": made.notes,
    }
