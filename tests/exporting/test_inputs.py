"""Inputs and outputs of every form: how many, how nested, of which dtype, by which name."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from export_models import (
    APPLY,
    EXPORTERS,
    Head,
    assert_as_before,
    input_names,
    rows,
    run_file,
    small_net,
)
from fingerprint import fingerprint
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sn_export import (
    ExportError,
    ParityError,
    RandomInputsLeftOutWarning,
    SnExportError,
    export_onnx,
)


class Two(Head):
    """Takes two tensors that cannot be exchanged."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        result: Tensor = self.layer(x) - 2 * y
        return result


class Optional(Head):
    """Takes an optional tensor between two others."""

    def forward(self, x: Tensor, y: Tensor | None = None, *, z: Tensor) -> Tensor:
        result: Tensor = self.layer(x) - 2 * z
        return result if y is None else result + 3 * y


class Batch(Head):
    """Takes a dict, as the only argument."""

    def forward(self, batch: dict[str, Any]) -> dict[str, Any]:
        y = self.layer(batch["x"])
        return {"y": y - batch["more"][0], "rest": (y + 1, [batch["more"][1] * 2])}


class DictLast(Head):
    """Takes a dict as its last positional argument."""

    def forward(self, x: Tensor, extra: dict[str, Tensor]) -> Tensor:
        result: Tensor = self.layer(x) - 2 * extra["b"] + 3 * extra["a"]
        return result


class Nested(Head):
    """Takes a tuple and a list that holds a tuple."""

    def forward(self, pair: tuple[Tensor, Tensor], rest: list[Any]) -> list[Any]:
        y = self.layer(pair[0]) - 2 * pair[1]
        return [y, (y + rest[0], {"z": rest[1][0] * 3})]


class Star(Head):
    """Takes any number of positional arguments."""

    def forward(self, *tensors: Tensor) -> Tensor:
        result: Tensor = self.layer(tensors[0]) - 2 * tensors[1]
        return result


class Unused(Head):
    """Does not look at its second input."""

    def forward(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        result: Tensor = self.layer(x) + z
        return result


class Aliased(Head):
    """Returns one tensor twice, views of it, its input as it is, and nothing."""

    def forward(self, x: Tensor) -> tuple[Any, ...]:
        y = self.layer(x)
        return y, y, y.t(), x, x.reshape(-1), None


class Weights(Head):
    """Returns its weight under spectral norm."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.layer(x), self.layer.weight


class Words(Head):
    """Looks rows up in an embedding under spectral norm."""

    def prepare(self) -> None:
        self.words = APPLY["hook"](nn.Embedding(7, 3))

    def forward(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        return self.layer(self.words(indices)), indices + 1


class Masked(Head):
    """Takes a mask and returns its opposite."""

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        return torch.where(mask, self.layer(x), 0.0), ~mask


class Scaled(Head):
    """Takes a tensor without dimensions and returns another."""

    def forward(self, x: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
        y = self.layer(x) * factor
        return y, y.sum()


@dataclass
class Case:
    """A network, an example call, and the inputs and outputs that the file then has."""

    network: type[Head]
    args: Any
    kwargs: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    outputs: int = 1


_A, _B, _C, _D = (rows(seed=seed) for seed in range(4))
_CASES: dict[str, Case] = {
    "a bare tensor": Case(Head, _A),
    "two": Case(Two, (_A, _B)),
    "two in a list": Case(Two, [_A, _B]),
    "the same twice": Case(Two, (_A, _A)),
    "second by keyword": Case(Two, (_A,), {"y": _B}),
    "keywords only": Case(Two, (), {"x": _A, "y": _B}),
    "keywords in another order": Case(Two, (), {"y": _B, "x": _A}),
    "optional absent": Case(Optional, (_A,), {"z": _B}),
    "optional None": Case(Optional, (_A, None), {"z": _B}),
    "optional given": Case(Optional, (_A, _C), {"z": _B}),
    "optional out of order": Case(Optional, (_A,), {"z": _B, "y": _C}),
    "a dict": Case(Batch, ({"x": _A, "more": [_B, _C]},), outputs=3),
    "a dict by keyword": Case(Batch, (), {"batch": {"x": _A, "more": [_B, _C]}}, outputs=3),
    "a dict last": Case(DictLast, (_A, {"a": _B, "b": _C})),
    "a dict last, keys in another order": Case(DictLast, (_A, {"b": _B, "a": _C})),
    "a dict last by keyword": Case(DictLast, (_A,), {"extra": {"b": _B, "a": _C}}),
    "nested": Case(Nested, ((_A, _B), [_C, (_D,)]), outputs=3),
    "star": Case(Star, (_A, _B)),
    "unused": Case(Unused, (_A, torch.ones(4), _B)),
    "aliased outputs": Case(Aliased, (_A,), outputs=5),
    "the weight as an output": Case(Weights, (_A,), outputs=2),
    "int64": Case(Words, (torch.tensor([[0, 6], [3, 2]]),), outputs=2),
    "bool": Case(Masked, (_A, torch.tensor([True, False, True])), outputs=2),
    "no dimensions": Case(Scaled, (_A, torch.tensor(1.5)), outputs=2),
    "float64": Case(Two, (_A.double(), _B.double()), dtype=torch.float64),
    "float16": Case(Two, (_A.half(), _B.half()), dtype=torch.float16),
    "not contiguous": Case(Head, (torch.randn(3, 4).t(),)),
    "broadcast": Case(Head, (torch.randn(1, 3).expand(4, 3),)),
}


@pytest.mark.parametrize("case", _CASES.values(), ids=_CASES)
@pytest.mark.parametrize("exporter", EXPORTERS)
def test_form(tmp_path: Path, exporter: str, case: Case) -> None:
    """The file takes the inputs in their order, gives every output, and says what torch says."""
    path = tmp_path / "net.onnx"
    model = case.network().to(case.dtype)
    before = fingerprint(model)
    report = export_onnx(model, case.args, path, exporter=exporter, kwargs=case.kwargs, samples=2)
    if exporter == "torchscript" and case.network is Unused:
        # Tracing leaves an unused input out of the file.
        assert input_names(path) == ["x", "z"]
        assert_as_before(before, model)
        return
    assert_as_before(before, model)
    assert report.parity.samples == 3
    assert len(report.parity.outputs) == case.outputs
    args = (case.args,) if isinstance(case.args, Tensor) else tuple(case.args)
    with torch.no_grad():
        expected = pytree.tree_leaves(model.eval()(*args, **case.kwargs))
    given = [t for t in pytree.tree_leaves((args, case.kwargs)) if isinstance(t, Tensor)]
    by_shape = dict(zip(input_names(path), given, strict=False))
    assert len(by_shape) == len(given), "an input is missing"
    if "order" not in _id(case) and "keyword" not in _id(case):
        for found, wanted in zip(
            run_file(path, *given), [t for t in expected if t is not None], strict=True
        ):
            torch.testing.assert_close(torch.from_numpy(found.copy()), wanted, rtol=1e-2, atol=1e-2)


def _id(case: Case) -> str:
    return next(name for name, other in _CASES.items() if other is case)


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_input_names_that_swap_the_parameters(tmp_path: Path, exporter: str) -> None:
    """``input_names`` go by position, even where they are the names of other parameters."""
    path = tmp_path / "net.onnx"
    report = export_onnx(
        Two(), (_A, _B), path, exporter=exporter, input_names=["y", "x"], samples=1
    )
    assert report.parity.passed
    assert input_names(path) == ["y", "x"]


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_empty_outputs_prove_nothing(tmp_path: Path, exporter: str) -> None:
    """A file whose outputs have no element for any input set is not published."""
    with pytest.raises(ParityError, match="no element was compared"):
        export_onnx(Head(), (_A[:0],), tmp_path / "net.onnx", exporter=exporter)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_input_names_and_keywords_in_another_order(tmp_path: Path, exporter: str) -> None:
    """Renamed inputs reach their tensors also where keywords are given in another order."""
    report = export_onnx(
        Two(),
        (),
        tmp_path / "net.onnx",
        exporter=exporter,
        kwargs={"y": _B, "x": _A},
        input_names=["first", "second"],
        samples=1,
    )
    assert report.parity.passed


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_input_names_where_one_is_unused(tmp_path: Path, exporter: str) -> None:
    """Renamed inputs are told apart also where the exporter drops one that is not used."""
    path = tmp_path / "net.onnx"
    report = export_onnx(
        Unused(),
        (_A, torch.ones(4), _B),
        path,
        exporter=exporter,
        input_names=["first", "second", "third"],
        samples=1,
    )
    assert report.parity.passed
    assert {"first", "third"} <= set(input_names(path))


def test_numbers_as_arguments(tmp_path: Path) -> None:
    """Numbers, booleans and None among the arguments are constants of the file."""

    class Numbers(Head):
        def forward(self, x: Tensor, factor: float, flag: bool, nothing: None) -> Tensor:
            y: Tensor = self.layer(x)
            return y * factor if flag else y

    path = tmp_path / "net.onnx"
    export_onnx(Numbers(), (_A, 1.5, True, None), path)
    assert input_names(path) == ["x"]


_FORMS: dict[str, tuple[Any, int]] = {
    "a tuple of arguments": ((_C, _D), 1),
    "a dict of keywords": ({"x": _C, "y": _D}, 1),
    "a dict in another order": ({"y": _D, "x": _C}, 1),
    "a list of tuples": ([(_C, _D), (_D, _C)], 2),
    "a list of dicts": ([{"x": _C, "y": _D}], 1),
    "a tuple of tuples": (((_C, _D), (_D, _C), (_C, _C)), 3),
    "a list of both": ([(_C, _D), {"x": _C, "y": _D}], 2),
    "an empty list": ([], 0),
    "nothing": (None, 0),
}


@pytest.mark.parametrize(("inputs", "count"), _FORMS.values(), ids=_FORMS)
def test_inputs_of_the_user(tmp_path: Path, inputs: Any, count: int) -> None:
    """Every accepted form of ``inputs`` adds its calls to the proof."""
    report = export_onnx(
        Two(), (_A, _B), tmp_path / "net.onnx", exporter="torchscript", samples=0, inputs=inputs
    )
    assert report.parity.samples == 1 + count


@pytest.mark.parametrize(
    ("inputs", "count"), [(_C, 1), ([_C, _D], 2), ((_C, _D), 2), ((_C,), 1)], ids=str
)
def test_inputs_of_a_model_of_one_argument(tmp_path: Path, inputs: Any, count: int) -> None:
    """Where the model takes one tensor, a tensor is a call and several are several calls."""
    report = export_onnx(
        Head(), _A, tmp_path / "net.onnx", exporter="torchscript", samples=0, inputs=inputs
    )
    assert report.parity.samples == 1 + count


def test_inputs_of_the_user_are_compared(tmp_path: Path) -> None:
    """A file that is right on the example and wrong on the user's input is not published."""

    class Branching(Head):
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.layer(x)
            return y if x.sum() < 100 else -y

    path = tmp_path / "net.onnx"
    export_onnx(Branching(), _A, path, exporter="torchscript")
    path.unlink()
    with pytest.raises(ParityError, match="inputs 1"):
        export_onnx(Branching(), _A, path, exporter="torchscript", inputs=[_A, _A + 1000])
    assert not path.exists()


def test_inputs_that_the_model_rejects(tmp_path: Path) -> None:
    """The error names the input of the user on which the model fails, and the module."""
    with pytest.raises(SnExportError) as caught:
        export_onnx(
            Words(),
            torch.tensor([0, 6]),
            tmp_path / "net.onnx",
            inputs=[torch.tensor([1, 2]), torch.tensor([7, 1])],
        )
    start = "the model fails on inputs 1: IndexError: index out of range in self; in '"
    assert str(caught.value).startswith(start)
    assert str(caught.value).endswith("' (Embedding)")


@pytest.mark.parametrize("kind", ["hook", "parametrization"])
def test_a_shape_that_the_model_rejects(tmp_path: Path, kind: str) -> None:
    """The error names the module that a wrong shape does not fit, by its path and class."""
    with pytest.raises(SnExportError, match=r"; in '4' \(Linear\)$"):
        export_onnx(small_net(kind), torch.randn(2, 1, 9, 9), tmp_path / "net.onnx")
    with pytest.raises(SnExportError, match=r"; in '0' \(Conv2d\)$"):
        export_onnx(small_net(kind), torch.randn(2, 3, 8, 8), tmp_path / "net.onnx")


def test_random_inputs_that_the_model_rejects(tmp_path: Path) -> None:
    """They are left out, which a warning says, with what to do."""

    class OnlyOnes(Head):
        def forward(self, x: Tensor) -> Tensor:
            if not bool((x == 1).all()):
                raise ValueError("want ones")
            y: Tensor = self.layer(x)
            return y

    ones = torch.ones(2, 3)
    with pytest.warns(RandomInputsLeftOutWarning) as caught:
        report = export_onnx(OnlyOnes(), ones, tmp_path / "net.onnx", exporter="torchscript")
    (note,) = report.parity.notes
    assert note == str(caught[0].message)
    assert note == (
        "3 of 3 random inputs were left out of the proof, also near the example: the model fails "
        "on random input 2, near the example: ValueError: want ones. Pass inputs=[...] that the "
        "model takes, or samples=0"
    )
    assert report.parity.samples == 1
    report = export_onnx(
        OnlyOnes(), ones, tmp_path / "net.onnx", exporter="torchscript", samples=0, inputs=[ones]
    )
    assert report.parity.samples == 2


def test_random_integers_stay_within_the_range_seen(tmp_path: Path) -> None:
    """Forty random inputs of an embedding stay among the words of the example."""
    report = export_onnx(
        Words(),
        torch.tensor([[2, 6], [3, 2]]),
        tmp_path / "net.onnx",
        exporter="torchscript",
        samples=40,
    )
    assert report.parity.samples == 41


def test_bfloat16(tmp_path: Path) -> None:
    """What onnxruntime cannot run is an ExportError that says so, not a published file."""
    path = tmp_path / "net.onnx"
    with pytest.raises(ExportError, match="CPUExecutionProvider has no Gemm for bfloat16"):
        export_onnx(Head().bfloat16(), _A.bfloat16(), path, exporter="torchscript")
    assert path.exists() is False
