"""What the command line costs: time and memory for large checkpoints, time until help shows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_common import Row, measure_ratio
from safetensors.torch import save_file
from torch.distributed.checkpoint.state_dict_saver import save

# Not ru_maxrss: that starts at what the parent had when it started the process.
_MEASURE = """
import json, re, sys, time
from sn_export.cli import main
start = time.perf_counter()
try:
    main()
finally:
    peak = int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
    measured = {"seconds": time.perf_counter() - start, "bytes": peak}
    print("\\n" + json.dumps(measured), file=sys.stderr)
"""
_AIM = 0.5  # GB: torch itself takes 0.27


def measure_checkpoints(quick: bool) -> list[Row]:
    """Peak resident memory and time of ``inspect`` and ``convert``, each a process of its own."""
    share = 10 if quick else 1
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = _measure(
            _write_safetensors(folder, 100 // share, (2560, 4096)), folder / "plain", ""
        )
        return rows + _measure(
            _write_distributed(folder, 36 // share, (4096, 4096)), folder / "dcp", "/"
        )


def measure_help(quick: bool) -> list[Row]:
    """``sn-export --help`` against the import of torch alone."""
    ours = [sys.executable, "-m", "sn_export", "--help"]
    theirs = [sys.executable, "-c", "import torch"]
    return [
        measure_ratio(
            "sn-export --help / import torch",
            lambda: subprocess.run(ours, check=True, capture_output=True),
            lambda: subprocess.run(theirs, check=True),
            repeats=2 if quick else 5,
        )
    ]


def _measure(source: Path, target: Path, suffix: str) -> list[Row]:
    folder = source if source.is_dir() else source.parent
    size = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
    output = f"{target}{suffix or '.safetensors'}"
    shards = [] if suffix else ["--max-shard-size", "1GB"]
    rows = []
    for command in (
        ["inspect", source],
        ["convert", source, "--to", "plain", "-o", output, *shards],
    ):
        process = [sys.executable, "-c", _MEASURE, *map(str, command)]
        threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
        ran = subprocess.run(
            process, check=True, capture_output=True, text=True, env=os.environ | threads
        )
        measured = json.loads(ran.stderr.splitlines()[-1])
        title = f"{command[0]} {size / 1e9:.1f} GB, {'DCP folder' if suffix else 'safetensors'}"
        rows.append(Row(f"{title}: peak memory", measured["bytes"] / 1e9, _AIM, "GB"))
        rows.append(Row(f"{title}: seconds", measured["seconds"], None, "s"))
    return rows


def _make_layers(count: int, shape: tuple[int, int]) -> Callable[[int], dict[str, torch.Tensor]]:
    """Return a function that gives the tensors of one of ``count`` layers; they share a weight."""
    torch.manual_seed(0)
    weight = torch.randn(shape)
    u = torch.nn.functional.normalize(torch.randn(shape[0]), dim=0)
    v = torch.nn.functional.normalize(weight.mT @ u, dim=0)

    def layer(number: int) -> dict[str, torch.Tensor]:
        parts = {"weight_orig": weight, "weight_u": u, "weight_v": v}
        return {f"{number}.{name}": value for name, value in parts.items()}

    return layer


def _write_safetensors(folder: Path, count: int, shape: tuple[int, int]) -> Path:
    """Write shards of ten layers and their index, so that this process stays small too."""
    layer, places = _make_layers(count, shape), dict[str, str]()
    (folder / "shards").mkdir()
    for start in range(0, count, 10):
        shard = f"part-{start:03d}.safetensors"
        tensors: dict[str, Any] = {}
        for number in range(start, min(start + 10, count)):
            tensors |= {name: value.clone() for name, value in layer(number).items()}
        save_file(tensors, folder / "shards" / shard)
        places.update(dict.fromkeys(tensors, shard))
    index = folder / "shards" / "large.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return index


def _write_distributed(folder: Path, count: int, shape: tuple[int, int]) -> Path:
    layer = _make_layers(count, shape)
    state = {name: value for number in range(count) for name, value in layer(number).items()}
    save(state, checkpoint_id=folder / "saved", no_dist=True)
    return folder / "saved"
