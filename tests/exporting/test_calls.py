"""Calls of every form: what is no tensor is a constant, dataclasses are containers."""

from __future__ import annotations

import dataclasses
from collections import namedtuple
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from export_models import EXPORTERS, Head, assert_as_before, input_names, run_file
from fingerprint import fingerprint
from torch import Tensor

from sn_export import ExportReport, export_onnx

_X, _Y = torch.randn(4, 3), torch.randn(4, 3) + 1


@dataclasses.dataclass
class Batch:
    """What data loaders give."""

    rows: Tensor
    masks: list[Tensor]
    scale: float = 2.0


@dataclasses.dataclass(frozen=True)
class Answer:
    """What models give."""

    score: Tensor
    parts: tuple[Tensor, ...]
    note: str = "fine"


Pair = namedtuple("Pair", "left right")


def output_names(path: Path) -> list[str]:
    return [entry.name for entry in onnx.load(path).graph.output]


class Records(Head):
    """Takes a dataclass and returns one."""

    def forward(self, batch: Batch, *, factor: int = 1) -> Answer:
        y: Tensor = self.layer(batch.rows) * batch.scale * factor
        return Answer(y.sum(), (y, y - batch.masks[0]))


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_dataclasses(tmp_path: Path, exporter: str) -> None:
    """Fields name the inputs and outputs; what is no tensor in them is a constant of the file."""
    path, model = tmp_path / "net.onnx", Records().train()
    before = fingerprint(model)
    report = export_onnx(
        model,
        (Batch(_X, [_Y]),),
        path,
        exporter=exporter,
        kwargs={"factor": 3},
        dynamic_shapes={"batch": {"rows": {0: "n"}, "masks": [{0: "n"}]}},
    )
    assert_as_before(before, model)
    assert input_names(path) == ["batch_rows", "batch_masks_0"]
    assert output_names(path) == ["score", "parts_0", "parts_1"]
    assert report.parity.samples == 7
    with torch.no_grad():
        expected = model.eval()(Batch(_X[:1], [_Y[:1]]), factor=3)
    found = run_file(path, _X[:1], _Y[:1])
    torch.testing.assert_close(torch.from_numpy(found[2].copy()), expected.parts[1])


class Various(Head):
    """Takes tensors among all else."""

    def forward(
        self, x: Tensor, mode: str, steps: int, *more: Tensor, flag: bool = False, **named: Any
    ) -> Any:
        y = self.layer(x) if mode == "norm" else x
        for tensor in more:
            y = y + steps * tensor
        if flag:
            y = -y
        return {"y": y, "sizes": [y.shape[0], None, "text"], "last": named["other"]["t"] * y}


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_constants_among_tensors(tmp_path: Path, exporter: str) -> None:
    """Texts, numbers and flags are constants; ``*args`` and ``**kwargs`` are inputs by name."""
    path = tmp_path / "net.onnx"
    export_onnx(
        Various(),
        (_X, "norm", 3, _Y, _Y - 1),
        path,
        exporter=exporter,
        kwargs={"other": {"t": _X * 2, "k": 5}, "flag": True},
        dynamic_shapes={
            "x": {0: "n"},
            "more": ({0: "n"}, {0: "n"}),
            "named": {"other": {"t": {0: "n"}, "k": None}},
        },
    )
    assert input_names(path) == ["x", "more_0", "more_1", "other_t"]
    assert output_names(path) == ["y", "last"]
    assert len(run_file(path, *[torch.randn(6, 3)] * 4)) == 2


class Returning(Head):
    """Returns what it is told to."""

    def forward(self, x: Tensor) -> Any:
        y = self.layer(x)
        return self.made(x, y)


_RESULTS: dict[str, tuple[Any, list[str]]] = {
    "a tensor": (lambda x, y: y, ["output"]),
    "a tuple": (lambda x, y: (y, y.sum()), ["output_0", "output_1"]),
    "nested": (lambda x, y: (y, [y + 1, (y + 2,)]), ["output_0", "output_1_0", "output_1_1_0"]),
    "a dict": (lambda x, y: {"b": y, "a": y + 1}, ["b", "a"]),
    "a dict with lists": (lambda x, y: {"boxes": [y, y + 1]}, ["boxes_0", "boxes_1"]),
    "a named tuple": (lambda x, y: Pair(y, y + 1), ["left", "right"]),
    "a dataclass": (lambda x, y: Answer(y, (y + 1,)), ["score", "parts_0"]),
    "None among them": (lambda x, y: (None, y), ["output_1"]),
    "views": (lambda x, y: (y, y[0], y.t()), ["output_0", "output_1", "output_2"]),
    "one tensor twice": (lambda x, y: (y, y), ["output_0", "output_1"]),
    "the input": (lambda x, y: (x, y), ["output_0", "output_1"]),
    "names of inputs": (lambda x, y: {"x": y, "y": y + 1}, ["output_x", "y"]),
    "a number": (lambda x, y: (y, 3, 2.5, "text"), ["output_0"]),
}


@pytest.mark.parametrize("form", _RESULTS)
@pytest.mark.parametrize("exporter", EXPORTERS)
def test_names_of_outputs(tmp_path: Path, exporter: str, form: str) -> None:
    """Outputs are named by the structure of the result, the same by both exporters."""
    made, names = _RESULTS[form]
    model = Returning()
    model.made = made
    path = tmp_path / "net.onnx"
    export_onnx(model, _X, path, exporter=exporter, samples=1)
    assert output_names(path) == names
    assert input_names(path) == ["x"]


class Clashing(Head):
    """Has values that are called like what its file is to be called."""

    def forward(self, linear: Tensor, output: Tensor) -> Tensor:
        y: Tensor = self.layer(linear)
        return torch.relu(y) + output


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_names_that_are_taken(tmp_path: Path, exporter: str) -> None:
    """Names inside the graph give way to those of inputs and outputs."""
    path = tmp_path / "net.onnx"
    export_onnx(
        Clashing(), (_X, _Y), path, exporter=exporter, output_names=["relu"], input_names=["add"]
    )
    assert input_names(path) == ["add", "output"]
    assert output_names(path) == ["relu"]
    export_onnx(Clashing(), (_X, _Y), path, exporter=exporter)
    assert output_names(path) == ["output_output"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input_names": ["a", "b"]}, "2 names for 1 tensor"),
        ({"output_names": ["a", "b"]}, "2 names for 1 tensor"),
        ({"output_names": ["x"]}, "the name of an input"),
        ({"input_names": "x"}, "sequence of names"),
        ({"input_names": [""]}, "sequence of names"),
        ({"output_names": [3]}, "sequence of names"),
    ],
)
def test_names_that_do_not_fit(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    """Too many names, names twice and what is no name are refused before anything is exported."""
    with pytest.raises((TypeError, ValueError), match=message):
        export_onnx(Head(), _X, tmp_path / "net.onnx", **options)
    assert list(tmp_path.iterdir()) == []


class Hooked(Head):
    """Has hooks of its own that see the arguments as the user gives them."""

    def prepare(self) -> None:
        self.register_forward_pre_hook(self._halve, with_kwargs=True)

    @staticmethod
    def _halve(module: Any, args: Any, kwargs: Any) -> Any:
        return (args[0] / 2,), {"extra": kwargs["extra"]["e"] * 3}

    def forward(self, x: Tensor, extra: Tensor) -> Tensor:
        result: Tensor = self.layer(x) + extra
        return result


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_own_hooks_see_the_real_call(tmp_path: Path, exporter: str) -> None:
    """A pre-hook that takes the call apart is given the call of the user."""
    report = export_onnx(
        Hooked(), (_X,), tmp_path / "net.onnx", exporter=exporter, kwargs={"extra": {"e": _Y}}
    )
    assert report.parity.passed
    assert input_names(tmp_path / "net.onnx") == ["x", "extra_e"]


@pytest.mark.parametrize("as_given", [[_X, _Y], (_X, _Y)], ids=["list", "tuple"])
@pytest.mark.parametrize("exporter", EXPORTERS)
def test_a_list_of_tensors_as_first_argument(tmp_path: Path, exporter: str, as_given: Any) -> None:
    """One argument that is a list or a tuple stays one argument, own inputs included."""

    class Joined(Head):
        def forward(self, tensors: Any) -> Tensor:
            result: Tensor = self.layer(tensors[0]) - tensors[1]
            return result

    report: ExportReport = export_onnx(
        Joined(), (as_given,), tmp_path / "net.onnx", exporter=exporter, inputs=(as_given,)
    )
    assert report.parity.samples == 5
    assert input_names(tmp_path / "net.onnx") == ["tensors_0", "tensors_1"]
