"""What the command line costs: memory for a large checkpoint, and time until help is there."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from bench_common import Row, ratio
from safetensors.torch import save_file

_LAYERS, _SHAPE = 100, (2560, 4096)  # 4.2 GB in float32
# Not ru_maxrss: that starts at what the parent had when it started the process.
_MEASURE = """
import re, sys
from sn_export.checkpoints import convert_checkpoint
_, source, target, to = sys.argv
convert_checkpoint(source, target, to, max_shard_size=10**9)
print(int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024)
"""


def converting(quick: bool) -> list[Row]:
    """Peak resident memory of a process that converts a checkpoint of 4.2 GB."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = _checkpoint(folder, _LAYERS // 10 if quick else _LAYERS)
        return [_peak(source, folder / to, to) for to in ("plain", "parametrization")]


def helping(quick: bool) -> list[Row]:
    """``sn-export --help`` against the import of torch alone."""
    ours = [sys.executable, "-m", "sn_export", "--help"]
    theirs = [sys.executable, "-c", "import torch"]
    return [
        ratio(
            "sn-export --help / import torch",
            lambda: subprocess.run(ours, check=True, capture_output=True),
            lambda: subprocess.run(theirs, check=True),
            repeats=2 if quick else 5,
        )
    ]


def _peak(source: Path, folder: Path, to: str) -> Row:
    folder.mkdir()
    target = folder / "converted.safetensors"
    command = [sys.executable, "-c", _MEASURE, str(source), str(target), to]
    ran = subprocess.run(command, check=True, capture_output=True, text=True)
    for file in folder.iterdir():
        file.unlink()
    size = sum(file.stat().st_size for file in source.parent.glob("*.safetensors"))
    return Row(
        f"convert --to {to}, {size / 1e9:.1f} GB: peak memory in GB",
        int(ran.stdout) / 1e9,
        1.0,
        "GB",
        {"bytes": size},
    )


def _checkpoint(folder: Path, layers: int) -> Path:
    """Write shards of ten layers and their index, so that this process stays small too."""
    torch.manual_seed(0)
    weight = torch.randn(_SHAPE)
    files = {}
    for start in range(0, layers, 10):
        shard = f"part-{start:03d}.safetensors"
        tensors = {}
        for i in range(start, min(start + 10, layers)):
            tensors[f"{i}.weight_orig"] = weight.clone()
            tensors[f"{i}.weight_u"] = torch.randn(_SHAPE[0])
            tensors[f"{i}.weight_v"] = torch.randn(_SHAPE[1])
        save_file(tensors, folder / shard)
        files.update(dict.fromkeys(tensors, shard))
    index = folder / "large.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return index
