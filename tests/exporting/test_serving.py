"""What the page says of serving a file is what runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import sn_export
from sn_export import export_onnx

PAGE = Path(sn_export.__file__).parent / "exporting" / "README.md"


def test_the_example_of_onnxruntime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first block of "Serve it" gives the outputs of the model; the others need other tools."""

    class Critic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.utils.spectral_norm(nn.Conv2d(3, 2, 3))

        def forward(self, x: torch.Tensor) -> Any:
            return self.conv(x)

    monkeypatch.chdir(tmp_path)
    model, x = Critic().eval(), torch.randn(2, 3, 64, 64)
    export_onnx(model, (x,), "critic.onnx", exporter="torchscript")
    page = PAGE.read_text("utf-8")
    code = re.search(r"## Serve it.*?```python\n(.*?)```", page, re.DOTALL)
    assert code is not None
    found: dict[str, Any] = {}
    exec(code[1], found)
    with torch.no_grad():
        np.testing.assert_allclose(found["output"], model(torch.from_numpy(found["x"])), atol=1e-4)
