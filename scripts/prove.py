"""Attack the promises: faults, kills, random models, hostile and made-up files, mutants, rounds.

    scripts/prove [--quick] [--only PART] [--json FILE]

Each part runs in a process of its own, as many at once as there are cores. Each row says what was
tried how often and what survived. The exit code is 1 if less did than must: all, and of mutants
nine in ten.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.metadata import version
from pathlib import Path

from prove_common import Row
from rich.console import Console
from rich.table import Table

_PARTS = ("mutation", "faults", "hostile", "kills", "fuzz", "soak", "models")  # the longest first
_SLOW = ("fuzz", "mutation")  # not in the quick run, unless asked for
_HEADER = ("part", "attack", "tried", "survived", "seconds", "note")
_PACKAGES = ("torch", "onnx", "onnxruntime", "onnxscript", "numpy")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the parts asked for and print one table of them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a minute or two for most parts")
    parser.add_argument("--only", choices=_PARTS, action="append", help="may be repeated")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows as JSON")
    options = parser.parse_args(argv)

    parts = options.only or [p for p in _PARTS if not (options.quick and p in _SLOW)]
    if len(parts) == 1:
        found = [_run(parts[0], options.quick)]
    else:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            found = [*pool.map(partial(_run_in_child, quick=options.quick), parts)]
    rows = [(part, row) for part, rows in zip(parts, found, strict=True) for row in rows]
    environment = {
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        **{name: version(name) for name in _PACKAGES},
        "cores": os.cpu_count(),
        "quick": options.quick,
    }
    _show(rows, environment)
    if options.json is not None:
        content = [{"part": part, **dataclasses.asdict(row)} for part, row in rows]
        text = json.dumps({"environment": environment, "rows": content}, indent=2)
        options.json.write_text(text + "\n")
    return int(any(row.is_missed for _, row in rows))


def _run(part: str, quick: bool) -> list[Row]:
    warnings.simplefilter("ignore")
    rows: list[Row] = []
    start = time.perf_counter()
    for row in importlib.import_module(f"prove_{part}").rows(quick):
        rows.append(dataclasses.replace(row, seconds=round(time.perf_counter() - start)))
        print(f"{part}: {row.attack}: {row.survived} of {row.tried}", file=sys.stderr)
        for failure in row.failures[:10]:
            print(f"  {failure}", file=sys.stderr)
        start = time.perf_counter()
    return rows


def _run_in_child(part: str, quick: bool) -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.json"
        program = [sys.executable, __file__, "--only", part, "--json", str(file)]
        program += ["--quick"] if quick else []
        subprocess.run(program, stdout=subprocess.DEVNULL)
        if not file.exists():  # the error stands above; the other parts go on
            return [Row("the part failed itself", 1, 0)]
        content = json.loads(file.read_text())["rows"]
    return [Row(**{key: row[key] for key in row if key != "part"}) for row in content]


def _show(rows: Sequence[tuple[str, Row]], environment: dict[str, object]) -> None:
    table = Table(*_HEADER, caption=", ".join(f"{k} {v}" for k, v in environment.items()))
    for part, row in rows:
        style = "bold red" if row.is_missed else None
        cells = (part, row.attack, str(row.tried), str(row.survived), str(row.seconds), row.note)
        table.add_row(*cells, style=style)
    Console(width=None if sys.stdout.isatty() else 150).print(table)


if __name__ == "__main__":
    raise SystemExit(main())
