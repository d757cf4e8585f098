"""Tensors of any layout in a model are no obstacle, and stay as they are.

`Copies` is called inside, on layouts that no forward can be given.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from export_models import APPLY, KINDS, rows
from torch import Tensor, nn

from sn_export import export_onnx, frozen_spectral_norm
from sn_export.running import have_same_bits, tensor_memory
from sn_export.running.tensor_memory import Copies

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*in beta state:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*is in prototype:UserWarning"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per:UserWarning"),
]


def _ragged() -> list[Tensor]:
    return [torch.randn(2), torch.randn(3)]


LAYOUTS: dict[str, Callable[[], Tensor]] = {
    "a column": lambda: torch.randn(4, 4)[:, 0],
    "expanded": lambda: torch.zeros(1).expand(4),
    "a negated view": lambda: torch.randn(3, dtype=torch.complex64).conj().imag,
    "a conjugate": lambda: torch.randn(3, dtype=torch.complex64).conj(),
    "sparse_coo": lambda: torch.eye(3).to_sparse(),
    "sparse_csr": lambda: torch.eye(3).to_sparse_csr(),
    "sparse_csc": lambda: torch.eye(3).to_sparse_csc(),
    "sparse_bsr": lambda: torch.eye(4).to_sparse_bsr((2, 2)),
    "mkldnn": lambda: torch.randn(4, 4).to_mkldnn(),
    "nested": lambda: torch.nested.nested_tensor(_ragged()),
    "jagged": lambda: torch.nested.nested_tensor(_ragged(), layout=torch.jagged),
    "quantized": lambda: torch.quantize_per_tensor(torch.randn(4), 0.1, 0, torch.quint8),
    "by channel": lambda: torch.quantize_per_channel(
        torch.randn(2, 2), torch.tensor([0.1, 0.2]), torch.tensor([0, 0]), 0, torch.qint8
    ),
}
MOVES: dict[str, Callable[[nn.Module], object]] = {
    "half": lambda model: model.half(),
    "there and back": lambda model: model.half().float(),
}


class Holder(nn.Module):
    """Holds a tensor that it does not use, as a buffer and in an attribute."""

    def __init__(self, tensor: Tensor, kind: str = "hook") -> None:
        super().__init__()
        self.layer = APPLY[kind](nn.Linear(3, 3))
        self.register_buffer("held", tensor)
        self.kept = [tensor.clone()]

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = torch.relu(self.layer(x))
        return out


@pytest.mark.parametrize("limit", [2**29, 0])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_export(tmp_path: Path, layout: str, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that holds such a tensor is exported, and has the same object with the same bits."""
    monkeypatch.setattr(tensor_memory, "LARGE", limit)
    model = Holder(LAYOUTS[layout]())
    held, kept = model.held, model.kept[0]
    before = held.clone(), kept.clone()
    for exporter in ("auto", "torchscript"):  # dynamo alone does not take each of them
        assert export_onnx(model, rows(), tmp_path / "net.onnx", exporter=exporter).parity.passed
    assert model.held is held and model.kept[0] is kept
    assert have_same_bits(held, before[0]) and have_same_bits(kept, before[1])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_copies(layout: str) -> None:
    """A copy has the bits of its original, and has them again after it was written."""
    original = LAYOUTS[layout]()
    other = LAYOUTS[layout]()
    copies = Copies([original])
    copied = copies.of[id(original)]
    assert copied is not original and have_same_bits(copied, original)
    if layout == "expanded":
        other = other + 1
    if layout not in ("mkldnn", "jagged"):  # which cannot be written, or not from another one
        copied.copy_(other)
        assert have_same_bits(copied, original) == (layout[:6] == "sparse")
        copied.copy_(other * 2 if layout[:6] == "sparse" else other)
        assert not have_same_bits(copied, original)
    copies.reset()
    assert have_same_bits(copied, original)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8, torch.float64])
def test_bits_at_any_place(dtype: torch.dtype) -> None:
    """Bits are compared wherever a tensor begins and ends in its memory, and each one counts."""
    memory = torch.arange(40, dtype=dtype)
    for start, stop in [(0, 32), (1, 33), (1, 8), (3, 3)]:
        part = memory[start:stop]
        other = part.clone()
        assert have_same_bits(part, other)
        for place in range(len(part)):
            other[place] += 1
            assert not have_same_bits(part, other) and not have_same_bits(other, part)
            other[place] -= 1


@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", [*LAYOUTS][:10])
def test_moves_within_a_block(layout: str, kind: str, move: str) -> None:
    """Dtypes that were changed inside come back, also of sparse tensors and gradients."""
    model = Holder(LAYOUTS[layout](), kind)
    model.embedding = nn.Embedding(5, 3, sparse=True)
    (model.embedding(torch.tensor([1, 2])).sum() + model(rows()).sum()).backward()
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    gradient = model.embedding.weight.grad
    assert gradient is not None and gradient.is_sparse
    before = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    gradient_before = copy.deepcopy(gradient)
    with warnings.catch_warnings(), frozen_spectral_norm(model):
        warnings.simplefilter("ignore")
        try:
            MOVES[move](model)
        except RuntimeError:  # torch moves no mkldnn tensor
            assert layout == "mkldnn"
    now = dict(model.named_parameters()) | dict(model.named_buffers())
    assert all(now[name] is tensor for name, tensor in tensors.items())
    assert all(have_same_bits(now[name].detach(), old) for name, old in before.items())
    assert model.embedding.weight.grad is gradient
    assert have_same_bits(gradient, gradient_before)
