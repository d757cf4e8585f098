"""Opsets: each that both exporters and onnxruntime take, and a clear error outside.

The range is asked inside: it depends on what is installed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from export_models import EXPORTERS, Head, images, rows, small_net
from torch import Tensor, nn
from torch.nn.utils import spectral_norm

from sn_export import ExportError, ParityError, export_onnx
from sn_export.exporting import onnx_file
from sn_export.exporting.graph import find_opsets


def _opset(path: Path) -> int:
    (found,) = (entry.version for entry in onnx.load(path).opset_import if entry.domain == "")
    return int(found)


@pytest.mark.parametrize(
    "exporter, opset",
    [(name, n) for name in EXPORTERS for n in find_opsets(name)],
)
def test_every_opset(tmp_path: Path, exporter: str, opset: int) -> None:
    """Each exporter makes a proved file of each of its opsets, and it is the one in the file."""
    path = tmp_path / "net.onnx"
    report = export_onnx(
        small_net("hook"), images(), path, exporter=exporter, opset_version=opset, samples=1
    )
    assert _opset(path) == report.opset == opset


class Reduced(nn.Module):
    """Splits and reduces, for which later opsets have an attribute more."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = spectral_norm(nn.Linear(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.layer(x).chunk(2, 1)
        return first.logsumexp(1) + second.prod(1) + (first * second).std(1)


def test_the_oldest_opset_of_dynamo_splits_and_reduces(tmp_path: Path) -> None:
    """What onnx leaves of a later opset's attributes does not spoil the file."""
    oldest = find_opsets("dynamo")[0]
    report = export_onnx(
        Reduced(), rows(), tmp_path / "net.onnx", exporter="dynamo", opset_version=oldest
    )
    assert report.parity.passed
    assert _opset(tmp_path / "net.onnx") == oldest


# On Python 3.10 torch warns of its own use of it as if it were the caller.
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
def test_newest_is_what_is_installed(tmp_path: Path) -> None:
    """The newest opset is torch's, onnx's or onnxruntime's; it is no number that somebody wrote."""
    constants: Any = torch.onnx._constants
    known = onnx.defs.onnx_opset_version()
    assert 20 <= find_opsets("torchscript")[-1] <= min(constants.ONNX_MAX_OPSET, known)
    newest = find_opsets("dynamo")[-1]
    assert newest <= known
    if newest < known:  # because onnxruntime lacks it
        torch.onnx.export(
            Head().eval(), rows(), tmp_path / "x.onnx", opset_version=newest + 1, dynamo=True
        )
        with pytest.raises(Exception, match="opset"):
            ort.InferenceSession(tmp_path / "x.onnx", providers=["CPUExecutionProvider"])


class Mean(Head):
    """Ends in an operator that is another one in opset 17."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x).mean(1)
        return y


def test_opset_that_an_exporter_does_not_have(tmp_path: Path) -> None:
    """The dynamo exporter has no opset 17 of this network: an error says so, auto finds one."""
    path = tmp_path / "net.onnx"
    with pytest.raises(ExportError, match=r"opset 17 was asked for .* ReduceMean differ"):
        export_onnx(Mean(), rows(), path, exporter="dynamo", opset_version=17)
    assert not path.exists()
    report = export_onnx(Mean(), rows(), path, opset_version=17)
    assert (report.exporter, _opset(path)) == ("torchscript", 17)
    assert "ReduceMean" in report.attempts[0].error


def networks() -> dict[str, tuple[nn.Module, Tensor]]:
    """What old opsets write otherwise: padding, resizing, recurrence, attention, norms."""
    norm = nn.Sequential(spectral_norm(nn.Linear(3, 8)), nn.LayerNorm(8), nn.GELU(), nn.Softmax(1))
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    spectral_norm(layer.linear1)
    recurrent = Last(spectral_norm(nn.GRU(5, 4, batch_first=True), "weight_hh_l0"))
    up = nn.Sequential(
        nn.ReflectionPad2d(1),
        spectral_norm(nn.Conv2d(3, 4, 3)),
        nn.BatchNorm2d(4),
        nn.Upsample(scale_factor=2, mode="bilinear"),
        nn.PixelShuffle(2),
    )
    return {
        "up": (up, torch.randn(2, 3, 6, 6)),
        "norm": (norm, rows()),
        "recurrent": (recurrent, torch.randn(2, 3, 5)),
        "attention": (layer, torch.randn(2, 3, 8)),
    }


class Last(nn.Module):
    """The outputs of a recurrent network without its states."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.network(x)[0]
        return y


@pytest.mark.parametrize(
    "name, opset",
    [(name, n) for name in ("up", "norm", "recurrent") for n in range(11, 17)]
    + [("attention", n) for n in (14, 15, 16)],  # torch has no attention before
)
def test_old_opsets(tmp_path: Path, name: str, opset: int) -> None:
    """Left to itself, an old opset is made by the exporter that has it, and proved, dynamic too."""
    model, x = networks()[name]
    for _ in range(20):
        model(x)
    path = tmp_path / "net.onnx"
    report = export_onnx(model, (x,), path, opset_version=opset, dynamic_shapes=({0: "batch"},))
    assert (report.exporter, _opset(path), report.attempts) == ("torchscript", opset, ())


def test_an_old_opset_proves_no_wrong_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight that is off by 1 % in a file of opset 11 is refused; the file is changed inside."""
    model = small_net("hook")
    save = onnx_file.save

    def altered(graph: Any, *args: Any, **kwargs: Any) -> Any:
        value = next(v for v in graph.graph.initializers.values() if len(v.shape) > 1)
        value.const_value = ir.tensor(value.const_value.numpy() * np.float32(1.01))
        return save(graph, *args, **kwargs)

    monkeypatch.setattr(onnx_file, "save", altered)
    with pytest.raises(ParityError):
        export_onnx(model, images(), tmp_path / "net.onnx", opset_version=11)
    assert list(tmp_path.iterdir()) == []


def test_an_exporter_that_lacks_the_opset(tmp_path: Path) -> None:
    """An old opset of the dynamo exporter is refused, with its range."""
    with pytest.raises(ValueError, match=r"must be 17 to \d+ \(dynamo\) with .*, got 16"):
        export_onnx(Head(), rows(), tmp_path / "net.onnx", exporter="dynamo", opset_version=16)


@pytest.mark.parametrize("opset", [5, 10, find_opsets("dynamo")[-1] + 1, 99, 0, -1])
def test_outside(tmp_path: Path, opset: int) -> None:
    """An opset outside is refused, with the range and the versions that give it."""
    with pytest.raises(ValueError) as caught:
        export_onnx(Head(), rows(), tmp_path / "net.onnx", opset_version=opset)
    assert str(caught.value) == (
        f"opset_version must be 17 to {find_opsets('dynamo')[-1]} (dynamo) or 11 to "
        f"{find_opsets('torchscript')[-1]} (torchscript) with torch {torch.__version__}, onnx "
        f"{onnx.__version__} and onnxruntime {ort.__version__}, got {opset}"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("opset", ["18", 18.0, True, np.True_, np.float32(18)])
def test_no_integer(tmp_path: Path, opset: Any) -> None:
    """What is no integer is told apart from a bad number."""
    with pytest.raises(TypeError, match="opset_version must be an integer"):
        export_onnx(Head(), rows(), tmp_path / "net.onnx", opset_version=opset)
