"""Complex inputs and outputs are pairs of reals in a file, and are fed and compared like that."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from sn_export import check_case, check_parity, export_onnx


class Product(nn.Module):
    """Takes a spectrum and returns one."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = spectral_norm(nn.Linear(8, 8))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return a product of complex numbers, and its real part."""
        y = torch.complex(self.layer(x.real), torch.tanh(x.imag))
        return y * x, y.real


@pytest.mark.parametrize("dynamic", [False, True])
def test_complex_inputs_and_outputs(tmp_path: Path, dynamic: bool) -> None:
    """The file has a last dimension of 2, and is proved, replayed and compared with the model."""
    model, x = Product().eval(), torch.randn(3, 8, dtype=torch.complex64)
    path, case = tmp_path / "net.onnx", tmp_path / "net.npz"
    shapes = ({0: torch.export.Dim("batch", min=1, max=64)},) if dynamic else None
    report = export_onnx(
        model, (x,), path, exporter="dynamo", dynamic_shapes=shapes, save_case=case
    )
    assert [output.shape for output in report.parity.outputs] == [(3, 8, 2), (3, 8)]
    assert onnx.load(path).graph.input[0].type.tensor_type.shape.dim[2].dim_value == 2
    assert check_case(path, case).passed
    assert check_parity(model, path, x).passed
    with torch.no_grad():
        model.layer.parametrizations.weight.original[0].add_(1)
    report = check_parity(model, path, x)
    assert not report.passed and report.outputs[0].is_comparable
    assert report.first_divergent == "layer"
