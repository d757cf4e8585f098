"""What the export of a network past 2 GB costs in memory, beside torch's of the plain network."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from bench_common import Row

_LAYERS, _WIDTH = 14, 6400  # 2.3 GB in float32
# Not ru_maxrss: that starts at what the parent had when it started the process.
_MEASURE = """
import re, sys, torch
from torch import nn
_, side, exporter, path, layers, width = sys.argv
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
torch.manual_seed(0)
net = nn.Sequential(*(nn.Linear(int(width), int(width), bias=False) for _ in range(int(layers))))
for module in net:
    torch.nn.init.normal_(module.weight, std=int(width) ** -0.5)
    if side == "ours":
        torch.nn.utils.spectral_norm(module, n_power_iterations=1)
net.eval()
x = torch.randn(1, int(width))
if side == "ours":
    from sn_export import export_onnx
    report = export_onnx(net, (x,), path, exporter=exporter)
    assert report.exporter == exporter or exporter == "auto"
else:
    torch.onnx.export(net, (x,), path, dynamo=exporter == "auto", external_data=True, verbose=False)
print(peak())
"""


def exporting(quick: bool) -> list[Row]:
    """Peak resident memory of export and proof, against bare export plus the frozen weights."""
    layers = 4 if quick else _LAYERS
    weights = layers * _WIDTH**2 * 4
    return [_row(exporter, layers, weights) for exporter in ("auto", "torchscript")]


def _row(exporter: str, layers: int, weights: int) -> Row:
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = (
            _peak(side, exporter, Path(folder) / side, layers) for side in ("ours", "bare")
        )
    size = f"{weights / 1e9:.1f} GB, exporter {exporter}"
    return Row(
        f"export of {size}: peak memory / (bare export + frozen weights)",
        ours / (theirs + weights),
        1.0,
        "",
        {"ours": ours, "bare": theirs, "weights": weights},
    )


def _peak(side: str, exporter: str, folder: Path, layers: int) -> int:
    folder.mkdir()
    command = [sys.executable, "-c", _MEASURE, side, exporter, str(folder / "net.onnx")]
    ran = subprocess.run(
        [*command, str(layers), str(_WIDTH)], check=True, capture_output=True, text=True
    )
    for file in folder.iterdir():
        file.unlink()
    return int(ran.stdout.splitlines()[-1])
