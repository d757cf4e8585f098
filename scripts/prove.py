"""Attack the promises: faults, kills, random models, hostile and made-up files, mutants, rounds.

    scripts/prove [--quick] [--only PART] [--json FILE]

Each row says what was tried how often and what survived. The exit code is 1 if anything did not.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib
import json
import os
import platform
import sys
import time
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from prove_common import Row
from rich.console import Console
from rich.table import Table

PARTS = {
    "faults": "prove_faults",
    "kills": "prove_kills",
    "models": "prove_models",
    "hostile": "prove_hostile",
    "fuzz": "prove_fuzz",
    "mutation": "prove_mutation",
    "soak": "prove_soak",
}
_SLOW = ("fuzz", "mutation")  # not in the quick run, unless asked for
HEADER = ("part", "attack", "tried", "survived", "seconds", "note")
PACKAGES = ("torch", "onnx", "onnxruntime", "onnxscript", "numpy")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the parts asked for and print one table of them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="about two minutes for all parts")
    parser.add_argument("--only", choices=PARTS, action="append", help="may be repeated")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows as JSON")
    options = parser.parse_args(argv)

    warnings.simplefilter("ignore")
    rows: list[tuple[str, Row]] = []
    for part in options.only or [p for p in PARTS if not (options.quick and p in _SLOW)]:
        module = importlib.import_module(PARTS[part])
        start = time.perf_counter()
        for row in module.rows(options.quick):
            took = time.perf_counter() - start
            rows.append((part, dataclasses.replace(row, seconds=round(took))))
            print(f"{part}: {row.attack}: {row.survived} of {row.tried}", file=sys.stderr)
            for failure in row.failures[:10]:
                print(f"  {failure}", file=sys.stderr)
            start = time.perf_counter()
    environment = {
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
        "cores": os.cpu_count(),
        "quick": options.quick,
    }
    _show(rows, environment)
    if options.json is not None:
        content = [{"part": part, **dataclasses.asdict(row)} for part, row in rows]
        text = json.dumps({"environment": environment, "rows": content}, indent=2)
        options.json.write_text(text + "\n")
    return int(any(row.survived < row.tried for _, row in rows))


def _show(rows: Sequence[tuple[str, Row]], environment: dict[str, object]) -> None:
    table = Table(*HEADER, caption=", ".join(f"{k} {v}" for k, v in environment.items()))
    for part, row in rows:
        style = "bold red" if row.survived < row.tried else None
        cells = (part, row.attack, str(row.tried), str(row.survived), str(row.seconds), row.note)
        table.add_row(*cells, style=style)
    Console(width=None if sys.stdout.isatty() else 150).print(table)


if __name__ == "__main__":
    raise SystemExit(main())
