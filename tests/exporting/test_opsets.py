"""Opsets: each that both exporters and onnxruntime take, and a clear error outside.

The range is asked inside: it depends on what is installed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from export_models import EXPORTERS, Head, images, rows, small_net
from torch import Tensor

from sn_export import ExportError, export_onnx
from sn_export.exporting.opset import OLDEST_OPSET, newest_opset


def _opset(path: Path) -> int:
    (found,) = (entry.version for entry in onnx.load(path).opset_import if entry.domain == "")
    return int(found)


@pytest.mark.parametrize("opset", range(OLDEST_OPSET, newest_opset() + 1))
@pytest.mark.parametrize("exporter", EXPORTERS)
def test_every_opset(tmp_path: Path, exporter: str, opset: int) -> None:
    """Both exporters make a proved file of each opset, and it is the one in the file."""
    path = tmp_path / "net.onnx"
    report = export_onnx(
        small_net("hook"), images(), path, exporter=exporter, opset_version=opset, samples=1
    )
    assert _opset(path) == report.opset == opset


def test_newest_is_what_is_installed() -> None:
    """The newest opset is taken by torch and runs; it is no number that somebody wrote down."""
    constants: Any = torch.onnx._constants
    assert 20 <= newest_opset() <= min(constants.ONNX_MAX_OPSET, onnx.defs.onnx_opset_version())


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


@pytest.mark.parametrize("opset", [5, 16, newest_opset() + 1, 99, 0, -1])
def test_outside(tmp_path: Path, opset: int) -> None:
    """An opset outside is refused, with the range and the versions that give it."""
    with pytest.raises(ValueError) as caught:
        export_onnx(Head(), rows(), tmp_path / "net.onnx", opset_version=opset)
    assert str(caught.value) == (
        f"opset_version must be from 17 to {newest_opset()}, the newest that both exporters of "
        f"torch {torch.__version__} and onnxruntime {ort.__version__} take, got {opset}"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("opset", ["18", 18.0, True, np.True_, np.float32(18)])
def test_no_integer(tmp_path: Path, opset: Any) -> None:
    """What is no integer is told apart from a bad number."""
    with pytest.raises(TypeError, match="opset_version must be an integer"):
        export_onnx(Head(), rows(), tmp_path / "net.onnx", opset_version=opset)
