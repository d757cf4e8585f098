"""Dynamic dimensions that are equal in the example are proved apart, and empty ones filled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from export_models import APPLY, EXPORTERS, rows, run_file
from torch import Tensor, nn
from torch.export import Dim

from sn_export import ExportError, ParityError, export_onnx

_EACH: dict[str, Any] = {"text": ("h", "w"), "Dim": (Dim("h", min=4), Dim("w", min=4))}


class Squares(nn.Module):
    """Does something else with images that are square, if told so."""

    def __init__(self, minds: bool = True) -> None:
        super().__init__()
        self.filter = APPLY["hook"](nn.Conv2d(1, 2, 3, padding=1))
        self.minds = minds

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.filter(x)
        if self.minds and y.shape[2] == y.shape[3]:
            return y.mean((2, 3))
        return y.amax((2, 3))


@pytest.mark.parametrize("names", _EACH)
def test_a_branch_on_equal_sizes_is_found(tmp_path: Path, names: str) -> None:
    """Neither exporter's file is published, and one is told to have made one of two dimensions."""
    h, w = _EACH[names]
    path = tmp_path / "net.onnx"
    # Before torch 2.13 dynamo refuses to, or fixes both.
    said = "does not reproduce" if torch.__version__ < "2.13" else "made them one"
    with pytest.raises(ParityError, match=said) as caught:
        export_onnx(Squares(), (torch.randn(1, 1, 8, 8),), path, dynamic_shapes=({2: h, 3: w},))
    assert "does not reproduce the model" in str(caught.value)
    assert not path.exists()


@pytest.mark.parametrize("exporter", EXPORTERS)
@pytest.mark.parametrize("names", _EACH)
def test_equal_sizes_that_are_free(tmp_path: Path, exporter: Any, names: str) -> None:
    """A network that takes any height and width is proved, and right where they differ."""
    h, w = _EACH[names]
    model, path = Squares(minds=False), tmp_path / "net.onnx"
    shapes = ({2: h, 3: w},)
    export_onnx(model, (torch.randn(1, 1, 8, 8),), path, exporter=exporter, dynamic_shapes=shapes)
    x = torch.randn(1, 1, 5, 12)
    torch.testing.assert_close(torch.from_numpy(run_file(path, x)[0]), model.eval()(x).detach())


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_two_names_for_what_must_be_equal(tmp_path: Path, exporter: Any) -> None:
    """Where the model takes them equal alone, the file is proved at equal sizes."""

    class Sum(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x + 2 * y

    report = export_onnx(
        Sum(),
        (rows(), rows()),
        tmp_path / "net.onnx",
        exporter=exporter,
        dynamic_shapes={"x": {0: "a"}, "y": {0: "b"}},
    )
    assert report.parity.samples == 1 + 3 + 3


def test_one_name_on_two_sizes() -> None:
    """A name is one size."""
    with pytest.raises(ValueError, match="both b, and the example has 2 in the one and 4"):
        export_onnx(
            Past(), (rows(), rows(height=4)), "net.onnx", dynamic_shapes=({0: "b"}, {0: "b"})
        )


class Past(nn.Module):
    """Puts rows after those of earlier calls, of which there may be none."""

    def __init__(self, minds: bool = False) -> None:
        super().__init__()
        self.layer = APPLY["hook"](nn.Linear(3, 3))
        self.minds = minds

    def forward(self, x: Tensor, past: Tensor) -> Tensor:
        if self.minds and past.shape[0] == 0:
            return 2 * x
        result: Tensor = self.layer(torch.cat([past, x])).sum(0)
        return result


def test_an_empty_tensor_grows(tmp_path: Path) -> None:
    """A dimension of size 0 is proved at other sizes, with values in it."""
    model, path = Past(), tmp_path / "net.onnx"
    report = export_onnx(
        model, (rows(), torch.empty(0, 3)), path, dynamic_shapes={"past": {0: "past"}}
    )
    assert report.parity.samples > 4
    past = rows(height=5)
    found = torch.from_numpy(run_file(path, rows(), past)[0])
    torch.testing.assert_close(found, model.eval()(rows(), past).detach())


def test_a_branch_on_an_empty_tensor_is_found(tmp_path: Path) -> None:
    """What an exporter has baked in for the empty tensor is refused."""
    with pytest.raises((ParityError, ExportError)):
        export_onnx(
            Past(minds=True),
            (rows(), torch.empty(0, 3)),
            tmp_path / "net.onnx",
            dynamic_shapes={"past": {0: Dim("past")}},
        )
    assert list(tmp_path.iterdir()) == []


def test_own_inputs_of_other_sizes_count(tmp_path: Path) -> None:
    """Where random values are rejected, the user's own sizes are the proof."""

    class Permuted(nn.Module):
        def forward(self, x: Tensor, order: Tensor) -> Tensor:
            if not torch.compiler.is_compiling() and not torch.jit.is_tracing():
                assert sorted(order.tolist()) == list(range(len(x))), "no permutation"
            return x[order]

    calls = [(rows(height=n), torch.randperm(n)) for n in (5, 2, 8)]
    report = export_onnx(
        Permuted(),
        calls[0],
        tmp_path / "net.onnx",
        samples=0,
        inputs=calls[1:],
        dynamic_shapes={"x": {0: "n"}, "order": {0: "n"}},
    )
    assert report.parity.samples == 3
