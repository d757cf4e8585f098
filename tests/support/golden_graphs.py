"""What the exporters make of a few networks, written down to see when an upgrade changes it.

Write the tables anew after a change that is meant::

    .venv/bin/python tests/support/golden_graphs.py --write
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm as parametrized
from torch.nn.utils.spectral_norm import spectral_norm

FOLDER = Path(__file__).parent.parent / "golden"


class Residual(nn.Module):
    """A block of an image critic: two convolutions, a shortcut, a pooled score."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = spectral_norm(nn.Conv2d(3, 4, 3, padding=1))
        self.conv2 = spectral_norm(nn.Conv2d(4, 4, 3, padding=1))
        self.shortcut = spectral_norm(nn.Conv2d(3, 4, 1))
        self.head = spectral_norm(nn.Linear(4, 1))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        out = self.conv2(torch.relu(self.conv1(torch.relu(images)))) + self.shortcut(images)
        features = nn.functional.avg_pool2d(out, 2).sum((2, 3))
        return self.head(features), features


class Generator(nn.Sequential):
    """Transposed convolutions with batch norm, under parametrizations."""

    def __init__(self) -> None:
        super().__init__(
            nn.Unflatten(1, (6, 1, 1)),
            parametrized(nn.ConvTranspose2d(6, 4, 4)),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            parametrized(nn.ConvTranspose2d(4, 3, 4, 2, 1)),
            nn.Tanh(),
        )


class SelfAttention(nn.Module):
    """SAGAN's attention over positions."""

    def __init__(self) -> None:
        super().__init__()
        self.query = parametrized(nn.Conv1d(8, 2, 1))
        self.key = parametrized(nn.Conv1d(8, 2, 1))
        self.value = parametrized(nn.Conv1d(8, 8, 1))
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        weights = torch.softmax(self.query(x).transpose(1, 2) @ self.key(x), -1)
        out: Tensor = self.gamma * (self.value(x) @ weights.transpose(1, 2)) + x
        return out


class Projection(nn.Module):
    """A conditional critic: the score takes the embedding of a label."""

    def __init__(self) -> None:
        super().__init__()
        self.body = spectral_norm(nn.Linear(5, 4))
        self.embed = spectral_norm(nn.Embedding(7, 4))
        self.head = spectral_norm(nn.Linear(4, 1))

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        hidden = nn.functional.leaky_relu(self.body(x), 0.2)
        out: Tensor = self.head(hidden) + (hidden * self.embed(label)).sum(1, keepdim=True)
        return out


class Recurrent(nn.Module):
    """An LSTM with its matrices under spectral norm."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(4, 3, batch_first=True)
        for name in ("weight_ih_l0", "weight_hh_l0"):
            spectral_norm(self.rnn, name)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.rnn(x)[0]
        return out


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Tensor, ...]]]] = {
    "residual": (Residual, lambda: (torch.randn(2, 3, 8, 8),)),
    "generator": (Generator, lambda: (torch.randn(2, 6),)),
    "attention": (SelfAttention, lambda: (torch.randn(2, 8, 5),)),
    "projection": (Projection, lambda: (torch.randn(3, 5), torch.tensor([0, 6, 2]))),
    "recurrent": (Recurrent, lambda: (torch.randn(2, 6, 4),)),
}


def golden_path(network: str, exporter: str) -> Path:
    """Return the file of one table."""
    return FOLDER / f"{network}-{exporter}.json"


def table_of(network: str, exporter: str, folder: Path) -> dict[str, Any]:
    """Export a network and return what its table says about the graph."""
    from sn_export import export_onnx

    torch.manual_seed(0)
    build, example = NETWORKS[network]
    path = folder / f"{network}.onnx"
    export_onnx(build().eval(), example(), path, exporter=exporter, samples=0)
    file = onnx.load(path)
    graph = file.graph
    return {
        "opsets": {entry.domain or "ai.onnx": entry.version for entry in file.opset_import},
        "inputs": {value.name: _type(value) for value in graph.input},
        "outputs": {value.name: _type(value) for value in graph.output},
        "initializers": sorted(entry.name for entry in graph.initializer),
        "operators": dict(sorted(Counter(node.op_type for node in graph.node).items())),
    }


def as_text(table: dict[str, Any]) -> str:
    """Return a table as its file holds it."""
    return json.dumps(table, indent=2) + "\n"


def _type(value: onnx.ValueInfoProto) -> str:
    tensor = value.type.tensor_type
    sizes = [dim.dim_param or dim.dim_value for dim in tensor.shape.dim]
    return f"{onnx.TensorProto.DataType.Name(tensor.elem_type).lower()}{sizes}"


def main() -> int:
    """Write every table anew if ``--write`` is given."""
    if sys.argv[1:] != ["--write"]:
        print(__doc__.strip(), file=sys.stderr)
        return 2
    FOLDER.mkdir(exist_ok=True)
    for network in NETWORKS:
        for exporter in ("dynamo", "torchscript"):
            with tempfile.TemporaryDirectory() as folder:
                text = as_text(table_of(network, exporter, Path(folder)))
            golden_path(network, exporter).write_text(text)
            print(golden_path(network, exporter))
    return 0


if __name__ == "__main__":
    sys.exit(main())
