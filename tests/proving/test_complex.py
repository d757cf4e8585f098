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


class Vocoder(nn.Module):
    """An inverse STFT behind a layer, as in Vocos."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = spectral_norm(nn.Linear(8, 10))
        self.register_buffer("window", torch.hann_window(8))

    def forward(self, x: Tensor) -> Tensor:
        """Return a signal."""
        size, phase = self.layer(x).transpose(1, 2).chunk(2, 1)
        spectrum = torch.complex(size.exp() * phase.cos(), size.exp() * phase.sin())
        return torch.istft(spectrum, 8, 4, window=self.window)


def test_inverse_stft(tmp_path: Path) -> None:
    """The indices in int32 that the dynamo exporter writes for it are cast to what ONNX takes."""
    model, path = Vocoder().eval(), tmp_path / "net.onnx"
    assert export_onnx(model, (torch.randn(2, 5, 8),), path).exporter == "dynamo"
    assert "ScatterND" in {node.op_type for node in onnx.load(path).graph.node}
