"""``sn-export convert``: write a checkpoint in another spelling, without the code of a model."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import UsageError
from ..results import OrthogonalMap, Respellable, Spelling
from ..text import format_count
from .console import print_json, print_line, print_note, show_progress
from .options import CheckpointArgument, CheckpointOptions, Parsed, require_checkpoint

_SIZE = re.compile(r"(?P<number>\d+(?:\.\d+)?) *(?P<unit>[KMGT]i?B|B)?", re.IGNORECASE)


def parse_size(text: str | None) -> int | None:
    """Return the bytes that ``"500MB"`` or ``"2GiB"`` says."""
    if text is None:
        return None
    match = _SIZE.fullmatch(text.strip())
    if match is None or not float(match["number"]):
        raise UsageError(f"--max-shard-size must be a size such as 500MB or 2GiB, got '{text}'")
    unit = (match["unit"] or "B").upper()
    base = 1024 if "I" in unit else 1000
    return int(float(match["number"]) * base ** " KMGT".find(unit[0] if unit != "B" else " "))


@dataclass(frozen=True, kw_only=True)
class ConvertCommand(CheckpointOptions):
    """Write a checkpoint with its reparametrizations spelled differently, bit for bit the same.

    Spectral norm and weight norm have three spellings, the others a plain one. What cannot be
    spelled so is named, and nothing is written then.
    """

    checkpoint: CheckpointArgument
    to: Annotated[Spelling, typer.Option(help="How to spell them.")]
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            help="A .pt or .safetensors file, or a new folder where a sharded one is read.",
        ),
    ]
    only: Annotated[
        Respellable | None, typer.Option(help="Respell these alone, and leave others as they are.")
    ] = None
    orthogonal_map: Annotated[
        OrthogonalMap | None,
        typer.Option(help="How orthogonal weights were made, which no file says."),
    ] = None
    weights_only: Annotated[
        bool, typer.Option("--weights-only", help="Keep the state dict alone.")
    ] = False
    max_shard_size: Annotated[
        int | None,
        Parsed(str | None, parse_size, None),
        typer.Option(
            "--max-shard-size", help="Shards of at most this size, e.g. 2GB, with an index."
        ),
    ]

    def run(self) -> None:
        """Convert, and print what was changed and written."""
        require_checkpoint(self.checkpoint)
        with show_progress() as show:
            from ..checkpoints import convert_checkpoint

            made = convert_checkpoint(
                self.checkpoint,
                self.output,
                self.to,
                progress=lambda name, total: show(f"wrote {name}, of {total}"),
                **self.select_keywords(convert_checkpoint),
            )
        if self.as_json:
            print_json(
                {
                    "files": made.files,
                    "key": made.key,
                    "found": [site.name for site in made.found],
                    "changed": [site.name for site in made.changed],
                    "notes": made.notes,
                }
            )
            return
        for note in made.notes:
            print_note(f"note: {note}")
        under = f" under '{made.key}'" if made.key else ""
        kept = len(made.found) - len(made.changed)
        already = f"; {kept} were spelled so already" if kept else ""
        print_line(f"respelled {_count_kinds(made.changed)}{under} as {self.to}{already}")
        for file in made.files:
            print_line(f"wrote {file}")


def _count_kinds(changed: Iterable[Any]) -> str:
    """Return what was respelled, as in "3 spectral norms and 2 weight norms"."""
    counts = Counter(site.label for site in changed)
    nouns = {"pruning": "pruning mask", "orthogonality": "orthogonal weight"}
    shown = [format_count(n, nouns.get(label, label)) for label, n in counts.items()]
    return " and ".join(shown) or "nothing"
