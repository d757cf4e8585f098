"""What an error of an export advises is true, and the line that it names is the model's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sn_export import ExportError, ParityError, export_onnx


def test_no_line_of_the_caller_is_named(tmp_path: Path) -> None:
    """Where a layer of torch's fails, no line of a file that only calls the exporter is told."""
    lengths = torch.full((4,), 50), torch.full((4,), 30)
    args = (torch.randn(50, 4, 20).log_softmax(2), torch.randint(1, 20, (4, 30)), *lengths)
    with pytest.raises(ExportError, match=r"in the forward \(CTCLoss\)") as caught:
        export_onnx(nn.CTCLoss(), args, tmp_path / "net.onnx", exporter="torchscript", samples=0)
    assert Path(__file__).name not in str(caught.value)


class Noisy(nn.Module):
    """Adds noise of a scale that it is given."""

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        """Return the input with noise."""
        return x + scale * torch.randn_like(x)


def test_noise_of_scale_zero_is_proved_as_the_error_says(tmp_path: Path) -> None:
    """A model that draws random numbers is refused with what gets a proof, and that does."""
    x, path = torch.randn(2, 3), tmp_path / "net.onnx"
    with pytest.raises(ParityError, match="with 0 as its value in the example and samples=0"):
        export_onnx(Noisy(), (x, torch.tensor(1.0)), path)
    assert export_onnx(Noisy(), (x, torch.tensor(0.0)), path, samples=0).parity.passed
