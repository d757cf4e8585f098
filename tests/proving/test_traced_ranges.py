"""A forward that decides by a size is proved on both sides of its decision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from export_models import EXPORTERS, Head, rows, run_file
from torch import Tensor, nn
from torch.export import Dim

from sn_export import ParityError, export_onnx

_DECLARED: dict[str, Any] = {
    "text": "b",
    "Dim": Dim("b"),
    "range": Dim("b", min=1, max=64),
    "DYNAMIC": Dim.DYNAMIC,
    "AUTO": Dim.AUTO,
}


class Decides(Head):
    """Does something else with few rows than with many."""

    limit = 7

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y if x.shape[0] < self.limit else 2.0 * y


@pytest.mark.parametrize("declared", _DECLARED)
def test_a_decision_above_the_example(tmp_path: Path, declared: str) -> None:
    """No file traced with few rows is published: the first size beyond is named."""
    path = tmp_path / "net.onnx"
    shapes = {"x": {0: _DECLARED[declared]}}
    with pytest.raises(ParityError, match="=7; worst at") as caught:
        export_onnx(Decides(), rows(height=2), path, dynamic_shapes=shapes)
    assert str(caught.value).count("does not reproduce the model") == len(EXPORTERS)
    assert list(tmp_path.iterdir()) == []


def test_a_decision_below_the_example(tmp_path: Path) -> None:
    """So it is where sizes below the traced side are declared, and those tried before passed."""

    class Between(Decides):
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.layer(x)
            return y if x.shape[0] > self.limit or x.shape[0] == 3 else 2.0 * y

    shapes = {"x": {0: Dim("b", min=3, max=64)}}
    with pytest.raises(ParityError, match="b=7"):
        export_onnx(
            Between(),
            rows(height=20),
            tmp_path / "net.onnx",
            exporter="dynamo",
            dynamic_shapes=shapes,
        )


@pytest.mark.parametrize("top", [7, 40])
def test_a_range_beyond_the_decision(tmp_path: Path, top: int) -> None:
    """A range that takes in the other side, if only one size of it, is not proved."""
    shapes = {"x": {0: Dim("b", min=1, max=top)}}
    path = tmp_path / "net.onnx"
    with pytest.raises(ParityError, match="b=7"):
        export_onnx(Decides(), rows(height=2), path, exporter="dynamo", dynamic_shapes=shapes)


def test_a_range_up_to_the_decision(tmp_path: Path) -> None:
    """What is not declared is not tried, and the file is right up to there."""
    model, path, x = Decides(), tmp_path / "net.onnx", rows(height=6)
    shapes = {"x": {0: Dim("b", min=1, max=6)}}
    export_onnx(model, rows(height=2), path, exporter="dynamo", dynamic_shapes=shapes)
    torch.testing.assert_close(torch.from_numpy(run_file(path, x)[0]), model.eval()(x).detach())


class Places(Head):
    """Adds a learned vector for each row, and has seven."""

    def prepare(self) -> None:
        self.places = nn.Embedding(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] > 7:
            raise ValueError("no more than seven rows")
        out: Tensor = self.layer(x) + self.places(torch.arange(x.shape[0], device=x.device))
        return out


def test_a_bound_of_the_model_itself(tmp_path: Path) -> None:
    """Where the model takes no size beyond the program's, that is no fault of the file."""
    report = export_onnx(
        Places(),
        rows(height=2),
        tmp_path / "net.onnx",
        exporter="dynamo",
        dynamic_shapes={"x": {0: "b"}},
    )
    assert report.parity.passed
    assert report.exported_program is not None
    (bounds,) = report.exported_program.range_constraints.values()
    assert int(bounds.upper) == 7


class Half(Head):
    """Decides by half of a size, and takes even ones alone."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        y = y.reshape(x.shape[0] // 2, 2, 3).sum(1)
        return y if x.shape[0] < 14 else 2.0 * y


def test_derived_dimensions_are_left_alone(tmp_path: Path) -> None:
    """The bounds of ``2 * dim`` are those of another number, and no size is made of them."""
    half = Dim("half", min=1, max=6)
    shapes = {"x": {0: 2 * half}}
    path = tmp_path / "net.onnx"
    assert export_onnx(
        Half(), rows(height=4), path, exporter="dynamo", dynamic_shapes=shapes
    ).parity.passed


def test_sizes_out_of_proportion_are_not_tried(tmp_path: Path) -> None:
    """A decision at a billion rows is not run, and the file is proved at the others."""

    class Late(Decides):
        limit = 1_000_000_000

    report = export_onnx(
        Late(),
        rows(height=2),
        tmp_path / "net.onnx",
        exporter="dynamo",
        dynamic_shapes={"x": {0: "b"}},
    )
    assert report.parity.samples == 7
