"""Dynamic shapes in every notation, proved at other sizes than the example's."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from export_models import APPLY, EXPORTERS, KINDS, Head, rows, run_file
from torch import Tensor, nn
from torch.export import Dim

from sn_export import ExportError, ParityError, SnExportError, export_onnx
from sn_export.proving import run_resized
from sn_export.running import InputSet, Reference, find_dynamic_dims


class Filter(nn.Module):
    """Takes signals of any number and length, and one bias for each."""

    def __init__(self, kind: str = "parametrization") -> None:
        super().__init__()
        self.filter = APPLY[kind](nn.Conv1d(2, 3, 3, padding=1))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        result: Tensor = self.filter(x).mean(1) + y
        return result


_X, _Y = torch.randn(4, 2, 8), torch.randn(4, 8)
_B, _L = Dim("batch"), Dim("length")
_BOUND = Dim("batch", min=2, max=6)
_NOTATIONS: dict[str, Callable[[], Any]] = {  # torch 2.6 has not all of them
    "named": lambda: {"x": {0: _B, 2: _L}, "y": {0: _B, 1: _L}},
    "bounded": lambda: {"x": {0: _BOUND}, "y": {0: _BOUND}},
    "auto": lambda: {"x": {0: Dim.AUTO}, "y": {0: Dim.AUTO}},
    "dynamic": lambda: {"x": {0: Dim.DYNAMIC}, "y": {0: Dim.DYNAMIC}},
    "bounded auto": lambda: {"x": {0: Dim.AUTO(max=6)}, "y": {0: Dim.AUTO(max=6)}},
    "text": lambda: {"x": {0: "batch"}, "y": {0: "batch"}},
    "by position": lambda: ({0: _B}, {0: _B}),
    "by position in a list": lambda: [{0: _B}, {0: _B}],
    "tensors by position": lambda: {"x": (_B, None, _L), "y": (_B, _L)},
    "all by position": lambda: ((_B, None, None), (_B, None)),
    "static ones": lambda: {"x": {0: _B, 1: Dim.STATIC, 2: 8}, "y": {0: _B}},
}


def _shapes(path: Path) -> list[list[int | str]]:
    return [
        [
            d.dim_value if d.HasField("dim_value") else d.dim_param
            for d in entry.type.tensor_type.shape.dim
        ]
        for entry in onnx.load(path).graph.input
    ]


@pytest.mark.parametrize("notation", _NOTATIONS)
@pytest.mark.parametrize("exporter", EXPORTERS)
def test_notation(tmp_path: Path, exporter: str, notation: str) -> None:
    """Each notation makes the batch dynamic, the rest as said, and is proved at other sizes."""
    path = tmp_path / "net.onnx"
    model = Filter()
    report = export_onnx(
        model, (_X, _Y), path, exporter=exporter, dynamic_shapes=_NOTATIONS[notation](), samples=1
    )
    assert report.parity.samples == 5, "the example, one random input, three other sizes"
    x, y = _shapes(path)
    assert isinstance(x[0], str)
    assert isinstance(y[0], str)
    assert x[1] == 2
    with_length = notation in ("named", "tensors by position")
    assert isinstance(x[2], str) == isinstance(y[1], str) == with_length
    others = torch.randn(5, 2, 11 if with_length else 8), torch.randn(5, 11 if with_length else 8)
    found = run_file(path, *others)[0]
    torch.testing.assert_close(torch.from_numpy(found.copy()), model.eval()(*others).detach())


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_derived_dimension(tmp_path: Path, exporter: str) -> None:
    """A dimension that is twice another follows it at other sizes."""

    class Pairs(Head):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            result: Tensor = self.layer(x) + y.reshape(x.shape[0], 2, 3).sum(1)
            return result

    path = tmp_path / "net.onnx"
    report = export_onnx(
        Pairs(),
        (torch.randn(3, 3), torch.randn(6, 3)),
        path,
        exporter=exporter,
        dynamic_shapes={"x": {0: _B}, "y": {0: 2 * _B}},
        samples=0,
    )
    assert report.parity.samples == 4
    run_file(path, torch.randn(7, 3), torch.randn(14, 3))


@pytest.mark.parametrize("kind", KINDS)
def test_bounds_are_kept(tmp_path: Path, kind: str) -> None:
    """No size outside the bounds is tried, on either side."""
    sizes: list[int] = []

    class Watching(Head):
        def forward(self, x: Tensor) -> Tensor:
            if isinstance(x.shape[0], int):
                sizes.append(x.shape[0])
            y: Tensor = self.layer(x)
            return y

    export_onnx(
        Watching(kind),
        torch.randn(4, 3),
        tmp_path / "net.onnx",
        exporter="torchscript",
        dynamic_shapes={"x": {0: Dim("n", min=3, max=5)}},
    )
    assert {4, 5} <= set(sizes) <= {3, 4, 5}


def test_smaller_sizes_are_proved_too(tmp_path: Path) -> None:
    """Among the sizes proved is one below the example's: padding may hide in larger ones."""
    sizes: list[int] = []

    class Watching(Head):
        def forward(self, x: Tensor) -> Tensor:
            sizes.append(int(x.shape[0]))
            y: Tensor = self.layer(x)
            return y

    export_onnx(
        Watching(),
        torch.randn(4, 3),
        tmp_path / "net.onnx",
        exporter="torchscript",
        dynamic_shapes={"x": {0: "n"}},
    )
    assert min(sizes) < 4 < max(sizes)


class Baked(Head):
    """Uses the batch size as a number, which tracing bakes into the file."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y + torch.arange(int(x.shape[0])).sum()


def test_size_baked_in_by_tracing_is_found(tmp_path: Path) -> None:
    """A file that is right only at the example's size is not published."""
    with pytest.raises(ParityError, match="size"):
        export_onnx(
            Baked(),
            torch.randn(4, 3),
            tmp_path / "net.onnx",
            exporter="torchscript",
            dynamic_shapes={"x": {0: "batch"}},
        )
    assert list(tmp_path.iterdir()) == []
    report = export_onnx(
        Baked(),
        torch.randn(4, 3),
        tmp_path / "net.onnx",
        dynamic_shapes={"x": {0: "batch"}},
        samples=0,
    )
    assert report.parity.samples == 4


class OnlyFour(Head):
    """Takes batches of four alone."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] != 4:
            raise ValueError("only four")
        y: Tensor = self.layer(x)
        return y


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_named_dimension_that_is_fixed_in_truth(tmp_path: Path, exporter: str) -> None:
    """A dimension declared by name that the model takes at one size only is an error."""
    with pytest.raises(SnExportError):
        export_onnx(
            OnlyFour(),
            torch.randn(4, 3),
            tmp_path / "net.onnx",
            exporter=exporter,
            dynamic_shapes={"x": {0: _B}},
        )
    assert list(tmp_path.iterdir()) == []


def test_auto_dimension_that_is_fixed_in_truth(tmp_path: Path) -> None:
    """``Dim.AUTO`` promises nothing: what the model takes at one size only is proved at that."""
    path = tmp_path / "net.onnx"
    report = export_onnx(
        OnlyFour(), torch.randn(4, 3), path, dynamic_shapes={"x": {0: Dim.AUTO}}, samples=1
    )
    assert report.parity.samples == 2


class Two(Head):
    """Two tensors of one batch."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        result: Tensor = self.layer(x) - 2 * y
        return result


_ROWS = torch.randn(4, 3)


@pytest.mark.parametrize("exporter", EXPORTERS)
@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((_ROWS,), {"y": _ROWS + 1}),
        ((), {"y": _ROWS + 1, "x": _ROWS}),
        ((_ROWS, _ROWS), {}),
    ],
    ids=["one by keyword", "keywords in another order", "the same tensor twice"],
)
def test_ways_of_calling(
    tmp_path: Path, exporter: str, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]
) -> None:
    """Both inputs are dynamic and proved at other sizes, however the example is given."""
    path = tmp_path / "net.onnx"
    shapes = {name: {0: _B} for name in [*("x", "y")[: len(args)], *kwargs]}
    report = export_onnx(
        Two(), args, path, exporter=exporter, kwargs=kwargs, dynamic_shapes=shapes, samples=1
    )
    assert all(isinstance(shape[0], str) for shape in _shapes(path))
    assert report.parity.samples == 5


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_keywords_in_another_order_with_other_sizes(tmp_path: Path, exporter: str) -> None:
    """Inputs that the file has in another order than the forward are resized all the same."""
    report = export_onnx(
        Filter(),
        (),
        tmp_path / "net.onnx",
        exporter=exporter,
        kwargs={"y": _Y, "x": _X},
        dynamic_shapes={"y": {0: _B}, "x": {0: _B}},
        samples=1,
    )
    assert report.parity.samples == 5


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_any_number_of_arguments(tmp_path: Path, exporter: str) -> None:
    """``*args`` are declared as a tuple under the parameter's name, as torch.export has it."""

    class Star(Head):
        def forward(self, *tensors: Tensor) -> Tensor:
            result: Tensor = self.layer(tensors[0]) - 2 * tensors[1]
            return result

    path = tmp_path / "net.onnx"
    report = export_onnx(
        Star(),
        (_ROWS, _ROWS + 1),
        path,
        exporter=exporter,
        dynamic_shapes={"tensors": ({0: _B}, {0: _B})},
        samples=1,
    )
    assert all(isinstance(shape[0], str) for shape in _shapes(path))
    assert report.parity.samples == 5


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_nested_inputs(tmp_path: Path, exporter: str) -> None:
    """Shapes are nested like the inputs they describe."""

    class Nested(Head):
        def forward(self, pair: tuple[Tensor, list[Tensor]], extra: dict[str, Tensor]) -> Tensor:
            result: Tensor = self.layer(pair[0]) - 2 * pair[1][0] + extra["e"]
            return result

    path = tmp_path / "net.onnx"
    report = export_onnx(
        Nested(),
        ((_ROWS, [_ROWS + 1]),),
        path,
        exporter=exporter,
        kwargs={"extra": {"e": _ROWS + 2}},
        samples=1,
        dynamic_shapes={"pair": ({0: _B}, [{0: _B}]), "extra": {"e": {0: _B}}},
    )
    assert all(isinstance(shape[0], str) for shape in _shapes(path))
    assert report.parity.samples == 5


class Recurrent(nn.Module):
    """A GRU with a matrix under spectral norm."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.rnn = APPLY[kind](nn.GRU(4, 5, batch_first=True), "weight_hh_l0")

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.rnn(x)[0]
        return out


@pytest.mark.parametrize("kind", KINDS)
def test_recurrent_layers_of_any_length(tmp_path: Path, kind: str) -> None:
    """The output is declared as long as the input, at every call, by whichever exporter can."""
    model, files = Recurrent(kind), []
    for name in ("first", "second"):
        path = tmp_path / name
        export_onnx(model, (torch.randn(2, 6, 4),), path, dynamic_shapes={"x": {1: "t"}})
        files.append(path.read_bytes())
        (output,) = onnx.load(path).graph.output
        assert [d.dim_param or d.dim_value for d in output.type.tensor_type.shape.dim] == [
            2,
            "t",
            5,
        ]
        x = torch.randn(2, 11, 4)
        wanted = model.eval()(x).detach()
        torch.testing.assert_close(torch.from_numpy(run_file(path, x)[0]), wanted)
    assert files[0] == files[1]


class Alike(Head):
    """Takes a list, and an argument with the name that the list's first tensor has in a file."""

    def forward(self, a: list[Tensor], a_0: Tensor) -> Tensor:
        out: Tensor = self.layer(a[0]) + a_0
        return out


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_names_that_are_alike(tmp_path: Path, exporter: str) -> None:
    """Each of two tensors whose joined names are the same has its own dynamic dimensions."""
    model, path = Alike(), tmp_path / "net.onnx"
    shapes = {"a": [{0: "b"}], "a_0": {0: "b"}}
    export_onnx(model, ([rows()], rows()), path, exporter=exporter, dynamic_shapes=shapes)
    args = rows(height=5), rows(height=5, seed=8)
    wanted = model.eval()([args[0]], args[1]).detach()
    torch.testing.assert_close(torch.from_numpy(run_file(path, *args)[0]), wanted)


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_integer_inputs(tmp_path: Path, exporter: str) -> None:
    """Other sizes of integer inputs keep to the range seen."""

    class Words(Head):
        def prepare(self) -> None:
            self.words = APPLY["hook"](nn.Embedding(5, 3))

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.layer(self.words(x))
            return y

    report = export_onnx(
        Words(),
        torch.tensor([[0, 4], [1, 2], [2, 2]]),
        tmp_path / "net.onnx",
        exporter=exporter,
        dynamic_shapes={"x": {0: "batch", 1: "words"}},
        samples=1,
    )
    assert report.parity.samples == 5


def test_input_names_with_dynamic_shapes(tmp_path: Path) -> None:
    """Dynamic shapes go by the forward's parameters, also where the inputs are renamed."""
    path = tmp_path / "net.onnx"
    export_onnx(
        Two(),
        (_ROWS, _ROWS + 1),
        path,
        exporter="torchscript",
        input_names=["y", "z"],
        dynamic_shapes={"x": {0: "batch"}, "y": {0: "batch"}},
    )
    assert _shapes(path) == [["batch", 3], ["batch", 3]]


@pytest.mark.parametrize(
    "shapes",
    [
        {"absent": {0: "batch"}},
        {"x": {7: "batch"}},
        {"x": {0: 3.5}},
        {"x": 7},
        5,
        ({0: "batch"}, {0: "batch"}, {0: "batch"}),
    ],
    ids=str,
)
@pytest.mark.parametrize("exporter", EXPORTERS)
def test_shapes_that_do_not_fit(tmp_path: Path, exporter: str, shapes: Any) -> None:
    """Shapes for inputs or dimensions that do not exist are refused, never left out silently."""
    with pytest.raises((TypeError, ValueError, ExportError)) as caught:
        export_onnx(
            Head(),
            torch.randn(4, 3),
            tmp_path / "net.onnx",
            exporter=exporter,
            dynamic_shapes=shapes,
        )
    assert str(caught.value) != "'int' object is not iterable"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_negative_position(tmp_path: Path, exporter: str) -> None:
    """A dimension counted from the end is made dynamic, or refused, but not left fixed."""
    path = tmp_path / "net.onnx"
    with contextlib.suppress(SnExportError, ValueError):
        export_onnx(
            Filter(),
            (_X, _Y),
            path,
            exporter=exporter,
            dynamic_shapes={"x": {-1: "length"}, "y": {-1: "length"}},
        )
    if path.exists():
        assert all(isinstance(shape[-1], str) for shape in _shapes(path))


@pytest.mark.parametrize("shapes", [None, {}, {"x": None}, {"x": {}}], ids=str)
def test_no_dynamic_shapes(tmp_path: Path, shapes: Any) -> None:
    """Without dynamic dimensions the file is fixed, and only the example's size is proved."""
    path = tmp_path / "net.onnx"
    report = export_onnx(
        Head(), torch.randn(4, 3), path, exporter="torchscript", dynamic_shapes=shapes
    )
    assert report.parity.samples == 4
    assert _shapes(path) == [[4, 3]]


_TRIED: dict[str, tuple[dict[str, Any], Any, list[tuple[int, int]]]] = {
    "free": ({}, lambda a, b: True, [(1, 1), (5, 7), (8, 12)]),
    "each alone": (
        {},
        lambda a, b: (a, b) in [(1, 6), (4, 7), (8, 6), (4, 12)],
        [(1, 6), (4, 7), (8, 6), (4, 12)],
    ),
    "within a range": ({"min": 2, "max": 6}, lambda a, b: True, [(2, 2), (5, 5), (6, 3)]),
    "no larger one": ({"max": 6}, lambda a, b: b % 3 == 0, [(1, 6), (5, 6), (6, 3)]),
}


@pytest.mark.parametrize("case", _TRIED)
def test_sizes_that_are_tried(case: str) -> None:
    """The smallest, an odd and a larger size together; each alone where the model rejects them."""
    bounds, accepts, wanted = _TRIED[case]
    example = InputSet((torch.zeros(4, 6),)).bind(nn.Flatten())
    dims = find_dynamic_dims(example, {"input": {0: Dim("a", **bounds), 1: Dim("b", **bounds)}})

    def run(inputs: InputSet) -> Reference:
        if not accepts(*inputs.args[0].shape):
            raise SnExportError("rejected")
        return Reference(inputs, (inputs.args[0],))

    found = run_resized(example, dims, run)
    assert [tuple(reference.inputs.args[0].shape) for reference in found] == wanted


_AXES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "names": ({"x": {0: "batch"}, "y": {0: "batch"}, "output": {0: "batch"}}, {}),
    "lists": ({"x": [0], "y": [0]}, {}),
    "names of the file": (
        {"image": {0: "batch"}, "bias": {0: "batch"}},
        {"input_names": ["image", "bias"]},
    ),
}


@pytest.mark.parametrize("form", _AXES)
def test_dynamic_axes_are_translated(tmp_path: Path, form: str) -> None:
    """torch's older notation is refused by name, with the same in dynamic_shapes, which works."""
    axes, options = _AXES[form]
    if form == "lists":
        wanted: dict[str, Any] = {"x": {0: "x_0"}, "y": {0: "y_0"}}
    else:
        wanted = {"x": {0: "batch"}, "y": {0: "batch"}}
    with pytest.raises(TypeError, match="dynamic_axes") as caught:
        export_onnx(Filter(), (_X, _Y), tmp_path / "net.onnx", dynamic_axes=axes, **options)
    assert f"pass dynamic_shapes={wanted}, by" in str(caught.value)
    if form != "lists":
        path = tmp_path / "net.onnx"
        assert export_onnx(Filter(), (_X, _Y), path, dynamic_shapes=wanted, **options).parity.passed
