"""What the block costs on sharded models: time beside one forward, growth, memory of a rank.

torchrun starts this file on 1, 2 and 4 ranks of this machine; each measures, and the slowest or
largest rank counts. More ranks than cores share them, in the forward as well as in the block.
"""

from __future__ import annotations

import gc
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from bench_common import KINDS, Row, make_linear_stack, measure_seconds
from bench_freeze import fit_slope, read_status
from torch import nn
from torch.distributed.fsdp import fully_shard

from sn_export import frozen_spectral_norm

_RANKS = (1, 2, 4)
_LAYERS, _WIDTH = 400, 288  # 133 MB
_WIDE_LAYERS, _WIDE = 16, 2048  # 268 MB, in layers that are large beside Python's objects
_SIZES = (10, 100, 1000, 4000)
_NARROW = 16
_GROWING_ON = 2  # ranks


def measure_sharding(quick: bool) -> list[Row]:
    """Measure on each number of ranks."""
    rows: list[Row] = []
    for ranks in _RANKS:
        found = _measure_on(ranks, quick)
        for kind in KINDS:
            rows += _make_rows(ranks, kind, found[kind])
    return rows


def _make_rows(ranks: int, kind: str, found: dict[str, Any]) -> list[Row]:
    where = f"{kind}, {ranks} rank{'' if ranks == 1 else 's'}"
    shard = _WIDE_LAYERS * _WIDE**2 * 4 / ranks
    entering = shard + 2 * _WIDE**2 * 4
    rows = [
        Row(
            f"freeze + restore, {_LAYERS} x Linear {_WIDTH}, {where}, to one forward",
            found["ratio"],
            1.1,
            "ratio",
            found["times"],
        ),
        Row(
            f"memory held in the block, {_WIDE_LAYERS} x Linear {_WIDE}, {where}, to the shard",
            found["held"] / shard,
            1.01,  # the block's own objects
            "ratio",
            {"bytes": found["held"]},
        ),
        Row(
            f"memory on entering, {_WIDE_LAYERS} x Linear {_WIDE}, {where}, to shard + two layers",
            found["peak"] / entering,
            1.01,
            "ratio",
            {"bytes": found["peak"]},
        ),
    ]
    if "growth" in found:
        best = {int(size): taken for size, taken in found["growth"].items()}
        exponent = fit_slope([math.log(n) for n in best], [math.log(t) for t in best.values()])
        name = f"growth of freeze + restore, {min(best)} to {max(best)} x Linear {_NARROW}, {where}"
        rows.append(Row(name, exponent, 1.05, "exponent", {"seconds": best}))
    return rows


def _measure_on(ranks: int, quick: bool) -> dict[str, dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.json"
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        done = subprocess.run(
            [sys.executable, *launcher, __file__, str(results), "quick" if quick else "full"],
            capture_output=True,
            text=True,
            # glibc gives every large tensor pages of its own: a freed one is not taken unseen.
            env={**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20), "OMP_NUM_THREADS": "1"},
        )
        if done.returncode:
            raise RuntimeError(f"{ranks} ranks did not measure:\n{done.stderr[-4000:]}")
        found: dict[str, dict[str, Any]] = json.loads(results.read_text())
    return found


def _make_sharded(kind: str, layers: int, width: int) -> nn.Module:
    model = make_linear_stack(kind, layers, width)
    for layer in model:
        fully_shard(layer)
    fully_shard(model)
    _make_forward(model, width)()  # torch initialises itself in the first one
    return model


def _make_forward(model: nn.Module, width: int) -> Callable[[], object]:
    x = torch.randn(1, width)

    def forward() -> None:
        with torch.no_grad():
            model(x)

    return forward


def _make_freeze(model: nn.Module) -> Callable[[], object]:
    def freeze_and_restore() -> None:
        with frozen_spectral_norm(model):
            pass

    return freeze_and_restore


def _find_slowest(step: Callable[[], object]) -> float:
    dist.barrier()
    return _find_largest(measure_seconds(step))


def _find_largest(value: float) -> float:
    found = torch.tensor([value], dtype=torch.float64)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return float(found)


def _measure_time(kind: str, repeats: int) -> dict[str, Any]:
    model = _make_sharded(kind, _LAYERS, _WIDTH)
    steps = (_make_freeze(model), _make_forward(model, _WIDTH))
    pairs = [tuple(_find_slowest(step) for step in steps) for _ in range(repeats + 1)][1:]
    ratios = [ours / theirs for ours, theirs in pairs]
    times = {
        "min": min(ratios),
        "max": max(ratios),
        "seconds": statistics.median(ours for ours, _ in pairs),
        "reference_seconds": statistics.median(theirs for _, theirs in pairs),
    }
    return {"ratio": statistics.median(ratios), "times": times}


def _measure_memory(kind: str) -> dict[str, Any]:
    gc.collect()  # the models of other measurements
    model = _make_sharded(kind, _WIDE_LAYERS, _WIDE)
    with frozen_spectral_norm(model):  # what is imported and cached once is no part of it
        pass
    model.reshard()  # type: ignore[operator]
    gc.collect()
    dist.barrier()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again
    before = read_status("VmRSS")
    with frozen_spectral_norm(model):
        peak, held = read_status("VmHWM") - before, read_status("VmRSS") - before
    return {"held": _find_largest(held), "peak": _find_largest(peak)}


def _measure_growth(kind: str, quick: bool) -> dict[str, Any]:
    best = {}
    for size in _SIZES[: 3 if quick else None]:
        freeze = _make_freeze(_make_sharded(kind, size, _NARROW))
        best[size] = min(_find_slowest(freeze) for _ in range(3))
    return {"growth": best}


def main(path: str, how: str) -> None:
    """Measure on this rank; the first one writes the results as JSON."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    is_quick = how == "quick"
    # Memory first: what other measurements have freed would be taken again unseen.
    found = {kind: _measure_memory(kind) for kind in KINDS}
    for kind in KINDS:
        found[kind] |= _measure_time(kind, 3 if is_quick else 9)
        if dist.get_world_size() == _GROWING_ON:
            found[kind] |= _measure_growth(kind, is_quick)
    if dist.get_rank() == 0:
        Path(path).write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
