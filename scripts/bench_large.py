"""What the export of a network past 2 GB costs in memory, beside torch's of the plain network.

The aim is a bare export plus one copy of the weights under spectral norm. Each of the mechanisms
for large models stands because the aim is missed without it (dynamo, 2.3 GB of linear layers under
hooks, of the aim): all on 0.63; frozen weights in memory 1.01; proof of the file as a whole 1.01;
every parameter copied before it may be written 1.02; onnxruntime with its packed copies of
weights 1.07. Computed weights of hooks kept for the whole forward are 0.99, and 1.03 for
convolutions, which need memory of their own while they run. The network was never trained, so the
proof asks the truth in float64 too, by which all on is 0.73; without giving back what each module
has read there it is 1.10.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from bench_common import KINDS, Row

_LAYERS, _WIDTH = 14, 6400  # 2.3 GB in float32
# Not ru_maxrss: that starts at what the parent had when it started the process.
_MEASURE = """
import re, sys, torch
from torch import nn
_, kind, exporter, path, layers, width = sys.argv
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
torch.manual_seed(0)
net = nn.Sequential(*(nn.Linear(int(width), int(width), bias=False) for _ in range(int(layers))))
for module in net:
    torch.nn.init.normal_(module.weight, std=int(width) ** -0.5)
    if kind == "hook":
        torch.nn.utils.spectral_norm(module)
    elif kind == "parametrization":
        torch.nn.utils.parametrizations.spectral_norm(module)
net.eval()
x = torch.randn(1, int(width))
if kind != "plain":
    from sn_export import export_onnx
    report = export_onnx(net, (x,), path, exporter=exporter, external_data=True)
    assert report.exporter == exporter or exporter == "auto"
else:
    torch.onnx.export(net, (x,), path, dynamo=exporter == "auto", external_data=True, verbose=False)
print(peak())
"""


def measure_exports(quick: bool) -> list[Row]:
    """Peak resident memory of export and proof, against bare export plus the frozen weights."""
    layers = 4 if quick else _LAYERS
    return [row for exporter in ("auto", "torchscript") for row in _make_rows(exporter, layers)]


def _make_rows(exporter: str, layers: int) -> list[Row]:
    weights = layers * _WIDTH**2 * 4
    with tempfile.TemporaryDirectory() as folder:
        peaks = {
            kind: _measure_peak(kind, exporter, Path(folder) / kind, layers)
            for kind in ("plain", *KINDS)
        }
    bare = peaks["plain"]
    return [
        Row(
            f"export of {weights / 1e9:.1f} GB, {kind}, exporter {exporter}: peak memory / {name}",
            peaks[kind] / reference,
            aim,
            "",
            {"ours": peaks[kind], "bare": bare, "weights": weights},
        )
        for kind in KINDS
        for name, reference, aim in (
            ("(bare export + frozen weights)", bare + weights, 1.0),
            ("bare export", bare, None),
        )
    ]


def _measure_peak(kind: str, exporter: str, folder: Path, layers: int) -> int:
    folder.mkdir()
    command = [sys.executable, "-c", _MEASURE, kind, exporter, str(folder / "net.onnx")]
    ran = subprocess.run(
        [*command, str(layers), str(_WIDTH)], check=True, capture_output=True, text=True
    )
    for file in folder.iterdir():
        file.unlink()
    return int(ran.stdout.splitlines()[-1])
