"""What a forward writes is there for its later steps, and gone before the next run.

`Copies` is called inside, on tensors that share memory as those of no module do.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from export_models import EXPORTERS, assert_as_before, rows
from fingerprint import contents, fingerprint
from torch import Tensor, nn

from sn_export import ExportError, ParityError, export_onnx
from sn_export.running import preserved
from sn_export.running.tensor_memory import Copies

VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "the same memory": lambda base: base.detach(),
    "a part": lambda base: base[1:3],
    "every other element": lambda base: base[::2],
    "transposed": lambda base: base.view(2, 3).t(),
    "expanded": lambda base: base[2:3].expand(4),
    "other bits": lambda base: base.view(torch.int32),
    "narrow elements": lambda base: base.view(torch.uint8)[5:7],
    "a scalar": lambda base: base[1],
}


class Viewing(nn.Module):
    """Writes a buffer and reads a view of it, in another module and an attribute too."""

    def __init__(self, view: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        base = torch.arange(1.0, 7.0)
        self.register_buffer("base", base)
        self.inner = nn.Module()
        self.inner.register_buffer("view", view(base))
        self.kept = [base[1:]]

    def forward(self, x: Tensor) -> Tensor:
        self.base.mul_(2)
        self.kept[0].add_(1)
        result: Tensor = x + self.inner.view.double().sum() + self.kept[0].sum()
        return result


@pytest.mark.parametrize("view", VIEWS)
def test_views_of_a_buffer(view: str) -> None:
    """A run reads through a view what it wrote, as the model does, and every run does the same."""
    model = Viewing(VIEWS[view])
    expected = copy.deepcopy(model)(torch.zeros(1))
    before = fingerprint(model)
    with preserved(model) as state:
        for _ in range(3):
            assert torch.equal(model(torch.zeros(1)), expected)
            state.reset()
        assert torch.equal(model.inner.view, VIEWS[view](torch.arange(1.0, 7.0)))
    assert_as_before(before, model)


def test_a_view_that_was_moved_is_a_view_again() -> None:
    """A forward that gives a buffer other memory does not part it from its views for good."""
    model = Viewing(VIEWS["a part"])
    before = fingerprint(model)
    with preserved(model) as state:
        model.base.data = torch.ones(6)
        state.reset()
        model.base.fill_(3)
        assert (model.inner.view == 3).all()
    assert_as_before(before, model)


def test_only_what_is_shared_is_copied_together() -> None:
    """Parts of one memory that do not overlap are separate copies, without what lies between."""
    base = torch.arange(1000)
    first, overlapping, last = base[:10], base[5:15], base[-10:]
    copies = Copies([first, last, overlapping])
    sizes = [copies.of[id(t)].untyped_storage().nbytes() for t in (first, overlapping, last)]
    assert sizes == [15 * 8, 15 * 8, 10 * 8]


@pytest.mark.parametrize("dtype", [torch.bool, torch.float16, torch.float64, torch.complex128])
@pytest.mark.parametrize("start", range(4))
def test_views_at_any_offset(dtype: torch.dtype, start: int) -> None:
    """Elements of any size are found at their places, wherever the shared range starts."""
    base = torch.arange(20).to(dtype)
    part, within = base[start : start + 9], base[start + 2 : start + 5]
    copies = Copies([part, within])
    new_part, new_within = copies.of[id(part)], copies.of[id(within)]
    assert contents(new_part) == contents(part) and contents(new_within) == contents(within)
    new_part.zero_()
    assert not new_within.any() and base[start + 2 : start + 5].any()
    copies.reset()
    assert contents(new_within) == contents(within)


class OnAParameter(nn.Module):
    """Writes a parameter and reads a buffer on its memory, or the other way round."""

    def __init__(self, parameter_first: bool) -> None:
        super().__init__()
        self.parameter_first = parameter_first
        torch.manual_seed(0)
        self.layer = nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3))
        memory = torch.randn(5)
        self.scale = nn.Parameter(memory[:3])
        self.register_buffer("rest", memory[1:])

    def forward(self, x: Tensor) -> Tensor:
        tensors = [self.scale.data[1:], self.rest[:2]]
        written, read = tensors if self.parameter_first else reversed(tensors)
        written.add_(1)
        y: Tensor = self.layer(x) * read.sum() + self.rest.sum()
        return y


@pytest.mark.parametrize("parameter_first", [True, False])
@pytest.mark.parametrize("limit", [2**29, 0])
def test_a_buffer_on_a_parameter(
    parameter_first: bool, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is written to a parameter is read from a buffer on its memory, and back, in each run."""
    monkeypatch.setattr("sn_export.running.tensor_memory.LARGE", limit)
    model = OnAParameter(parameter_first)
    with torch.no_grad():  # a deep copy would part them
        right = OnAParameter(parameter_first).eval()(rows())
    before = fingerprint(model)
    with torch.no_grad(), preserved(model) as state:
        for _ in range(3):
            assert torch.equal(model(rows()), right)
            state.reset()
            state.settle()
    assert_as_before(before, model)


@pytest.mark.parametrize("exporter", EXPORTERS)
@pytest.mark.parametrize("parameter_first", [True, False])
def test_a_file_without_the_write_to_a_parameter_is_refused(
    tmp_path: Path, exporter: str, parameter_first: bool
) -> None:
    """No exporter keeps such a write, and the reference of the proof has it."""
    model = OnAParameter(parameter_first)
    before = fingerprint(model)
    with pytest.raises((ExportError, ParityError)):
        export_onnx(model, rows(), tmp_path / "net.onnx", exporter=exporter)
    assert list(tmp_path.iterdir()) == []
    assert_as_before(before, model)


def test_a_pending_backward_can_go_on(tmp_path: Path) -> None:
    """A graph over a parameter that an export writes is still good for its backward."""
    model = OnAParameter(parameter_first=False)
    loss = model.scale.square().sum()
    with pytest.raises((ExportError, ParityError)):
        export_onnx(model, rows(), tmp_path / "net.onnx", exporter="torchscript")
    loss.backward()
    assert torch.equal(model.scale.grad, 2 * model.scale.detach())


class ReadingViews(nn.Module):
    """Reads two halves of one table, and the table."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3))
        table = torch.randn(2, 3)
        self.register_buffer("table", table)
        self.register_buffer("first", table[0])
        self.register_buffer("second", table[1])

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x) * self.first + self.second + self.table.sum()
        return y


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_views_are_exported(tmp_path: Path, exporter: str) -> None:
    """Buffers that are views of each other are exported and proved by both exporters."""
    model = ReadingViews()
    before = fingerprint(model)
    assert export_onnx(model, rows(), tmp_path / "net.onnx", exporter=exporter).parity.passed
    assert_as_before(before, model)


class WritingViews(ReadingViews):
    """Writes one half and reads the table."""

    def forward(self, x: Tensor) -> Tensor:
        self.first.add_(x.mean())
        y: Tensor = self.layer(x) + self.table.sum()
        return y


@pytest.mark.parametrize(
    ("exporter", "error"), [("dynamo", ExportError), ("torchscript", ParityError)]
)
def test_a_file_without_the_write_is_refused(
    tmp_path: Path, exporter: str, error: type[Exception]
) -> None:
    """What torch refuses to export, or loses a write of, is not proved by a reference like it."""
    model = WritingViews()
    right = copy.deepcopy(model).eval()(rows())
    before = fingerprint(model)
    with preserved(model):
        assert torch.equal(model(rows()), right)
    with pytest.raises(error):
        export_onnx(model, rows(), tmp_path / "net.onnx", exporter=exporter)
    assert list(tmp_path.iterdir()) == []
    assert_as_before(before, model)
