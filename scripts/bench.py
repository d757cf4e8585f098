"""Measure what this package costs, as ratios to torch doing the same without it.

    python scripts/bench.py [--quick] [--only NAME] [--json FILE] [--markdown] [--threads N]

Both sides of a ratio run turn by turn in one process; the figure is the median of the ratios
of neighbours. Each part prints its rows as it ends. A missed aim is shown as missed; the exit
code is 1 only where a measurement itself failed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import sys
import traceback
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from bench_common import Row
from rich.console import Console
from rich.table import Table

BENCHMARKS = {
    "freeze": ("bench_freeze", "compare_with_torch"),
    "hand": ("bench_freeze", "compare_by_hand"),
    "copy": ("bench_freeze", "compare_with_copying"),
    "growth": ("bench_freeze", "measure_growth"),
    "memory": ("bench_freeze", "measure_memory"),
    "export": ("bench_export", "measure_exports"),
    "networks": ("bench_export", "measure_networks"),
    "first": ("bench_export", "measure_first_exports"),
    "file": ("bench_export", "compare_files"),
    "distributed": ("bench_distributed", "measure_sharding"),
    "large": ("bench_large", "measure_exports"),
    "checkpoints": ("bench_checkpoint", "measure_checkpoints"),
    "help": ("bench_checkpoint", "measure_help"),
}
VERDICTS = {True: "met", False: "MISSED", None: ""}
HEADER = ("name", "measured", "min to max", "aim", "", "seconds")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmarks asked for and report them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer repetitions, smaller files")
    parser.add_argument("--only", choices=BENCHMARKS, action="append", help="may be repeated")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows as JSON")
    parser.add_argument("--markdown", action="store_true", help="print a markdown table")
    parser.add_argument("--threads", type=int, default=1, help="of torch, default: %(default)s")
    options = parser.parse_args(argv)

    torch.set_num_threads(options.threads)
    rows: list[Row] = []
    failed = []
    for name in options.only or BENCHMARKS:
        print(f"measuring {name} ...", file=sys.stderr, flush=True)
        module, function = BENCHMARKS[name]
        try:
            found = getattr(importlib.import_module(module), function)(options.quick)
        except Exception:
            traceback.print_exc()
            failed.append(name)
            continue
        rows += found
        (_print_markdown if options.markdown else _print_rich)(found)

    environment = _describe_environment(options.quick)
    print(", ".join(f"{key} {value}" for key, value in environment.items() if value is not None))
    if options.json is not None:
        report = {
            "environment": environment,
            "rows": [row.as_json() for row in rows],
            "failed": failed,
        }
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    if failed:
        print(f"failed to measure: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def _describe_environment(quick: bool) -> dict[str, Any]:
    names = ("torch", "onnx", "onnxruntime", "onnxscript", "numpy")
    return {
        "python": platform.python_version(),
        **{name: _find_version(name) for name in names},
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "quick": quick,
    }


def _find_version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _make_cells(row: Row) -> tuple[str, ...]:
    detail = row.detail
    name, spread, times = row.name, "", ""
    if row.measured is None:
        spread = "; ".join(f"{key}: {value}" for key, value in detail.items())
    if "min" in detail:
        spread = f"{detail['min']:.3f} to {detail['max']:.3f}"
        times = f"{detail['seconds']:.4f} / {detail['reference_seconds']:.4f}"
    elif "nodes" in detail:
        spread = f"{detail['nodes']} / {detail['reference_nodes']}"
    measured = "" if row.measured is None else f"{row.measured:.3f}"
    aim = "" if row.aim is None else f"{row.aim:.2f}"
    return (name, measured, spread, aim, VERDICTS[row.passed], times)


def _print_rich(rows: Sequence[Row]) -> None:
    table = Table(*HEADER)
    for row in rows:
        style = "bold red" if row.passed is False else None
        table.add_row(*_make_cells(row), style=style)
    Console(width=None if sys.stdout.isatty() else 150).print(table)


def _print_markdown(rows: Sequence[Row]) -> None:
    lines = [HEADER, ("---",) * len(HEADER), *map(_make_cells, rows)]
    print("\n".join("| " + " | ".join(line) + " |" for line in lines), flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
