"""Quantiles, histograms, the worst element, and tolerances for each output.

It reaches inside: errors of a given size, shape and dtype come from arrays, not from files.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from export_models import EXPORTERS, Head, contents_of, file_of, rows
from hypothesis import given, settings, strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from onnx import helper
from torch import Tensor, nn

from sn_export import OutputParity, ParityError, check_case, check_parity, export_onnx
from sn_export.proving import output_errors
from sn_export.proving.output_errors import RunningErrors
from sn_export.proving.tolerances import require_tolerances


def _measure(pairs: list[tuple[Any, Any]], **tolerances: float) -> OutputParity:
    errors = RunningErrors("y", tolerances.get("rtol"), tolerances.get("atol"))
    for number, (says, file) in enumerate(pairs):
        errors.add(f"input {number}", torch.as_tensor(says), torch.as_tensor(file))
    return errors.make_result()


_errors = hnp.arrays(
    np.float64,
    st.integers(1, 60),
    elements=st.sampled_from([0.0, 1e-20, 1e-9, 1e-7, 3e-5, 0.001, 0.5, 1.0, 7.0, 1e9])
    | st.floats(0.0, 10.0),
)


@given(st.lists(_errors, min_size=1, max_size=3), st.sampled_from([0.0, 1e-7, 0.5]))
@settings(deadline=None, max_examples=100)
def test_spread_is_that_of_numpy(sets: list[NDArray[np.float64]], atol: float) -> None:
    """Quantiles, the fraction outside and the histogram agree with numpy over all sets."""
    output = _measure([(np.zeros_like(e), e) for e in sets], rtol=0.0, atol=atol)
    together = np.concatenate(sets)
    for found, q in ((output.median_abs, 0.5), (output.p999_abs, 0.999)):
        assert found == np.quantile(together, q, method="inverted_cdf")
    assert output.quantiles_are_exact
    assert output.fraction_outside == (together > atol).mean()
    histogram = output.histogram
    assert histogram is not None
    assert (histogram.zeros, histogram.not_finite) == ((together == 0).sum(), 0)
    edges = np.array(histogram.edges)
    assert len(edges) == len(histogram.counts) + 1
    inner = together[together > 0].clip(edges[0], np.nextafter(edges[-1], 0))
    np.testing.assert_array_equal(np.histogram(inner, edges)[0], histogram.counts)


@pytest.mark.parametrize(
    ("error", "edge"), [(1e-3, 1e-3), (0.00999, 1e-3), (1.0, 1.0), (5e-324, 1e-18), (1e300, 1e5)]
)
def test_buckets(error: float, edge: float) -> None:
    """A bucket holds its lower edge; what is beyond the edges is in the outermost ones."""
    histogram = _measure([(np.zeros(1), np.array([error]))]).histogram
    assert histogram is not None
    assert histogram.edges[histogram.counts.index(1)] == edge
    assert sum(histogram.counts) == 1


def test_an_edge_between_other_errors_is_in_the_bucket_above_it() -> None:
    """As it is where no error is smaller."""
    errors = np.array([1e-5, 1e-3, 0.1, 0.5])
    histogram = _measure([(np.zeros(4), errors)]).histogram
    assert histogram is not None
    held = dict(zip(histogram.edges, histogram.counts, strict=False))
    assert {edge: count for edge, count in held.items() if count} == {1e-5: 1, 1e-3: 1, 0.1: 2}


def test_quantiles_past_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Past the number of errors that are kept, quantiles are at most 2.4 % too large."""
    monkeypatch.setattr(output_errors, "_KEPT", 100)
    generator = np.random.default_rng(0)
    sets = [10.0 ** generator.uniform(-12, 2, 400) for _ in range(5)]
    output = _measure([(np.zeros_like(e), e) for e in sets])
    together = np.concatenate(sets)
    assert not output.quantiles_are_exact
    for found, q in ((output.median_abs, 0.5), (output.p999_abs, 0.999)):
        exact = np.quantile(together, q, method="inverted_cdf")
        assert exact <= found * (1 + 1e-12)
        assert found <= 1.024 * exact
    assert output.histogram is not None
    assert sum(output.histogram.counts) == len(together)


def test_not_finite_errors_are_the_largest() -> None:
    """Infinite errors come after all finite ones, NaN last, and both are counted apart."""
    says, file = np.zeros(4), np.array([0.0, 1.0, np.inf, np.nan])
    output = _measure([(says, file)])
    assert output.median_abs == 1.0
    assert math.isnan(output.p999_abs)
    assert output.histogram is not None
    assert (output.histogram.zeros, output.histogram.not_finite) == (1, 2)
    assert output.fraction_outside == 0.75
    assert _measure([(says, np.array([0.0, 1.0, np.inf, np.inf]))]).p999_abs == math.inf


def test_other_shapes_are_outside() -> None:
    """Where shapes differ, every element of the reference is outside tolerance."""
    output = _measure([(np.zeros(6), np.zeros(6)), (np.zeros(2), np.zeros(3))])
    assert output.fraction_outside == 0.25
    assert output.histogram is not None
    assert (output.histogram.zeros, output.histogram.not_finite) == (6, 2)
    assert (output.worst_expected, output.worst_got) == (None, None)


@pytest.mark.parametrize(
    ("says", "file", "values"),
    [
        ([1.0, 2.0, 4.0], [1.0, 2.5, 4.0], (2.0, 2.5)),
        ([5, 2**60], [5, 2**60 + 1], (2**60, 2**60 + 1)),
        ([True, False], [True, True], (0, 1)),
        ([1.0, math.inf], [2.0, 3.0], (math.inf, 3.0)),
    ],
)
def test_worst_values(says: Any, file: Any, values: tuple[float, float]) -> None:
    """Both values of the worst element are kept, integers exactly."""
    output = _measure([(torch.tensor(says), torch.tensor(file))])
    assert (output.worst_expected, output.worst_got) == values


def test_worst_values_are_of_the_worst_set() -> None:
    """Index, set and both values belong to the same element."""
    output = _measure([([0.0, 1.0], [0.5, 1.0]), ([3.0, 7.0], [3.0, 9.0]), ([0.0], [1.0])])
    assert (output.worst_sample, output.worst_index) == ("input 1", (1,))
    assert (output.worst_expected, output.worst_got) == (7.0, 9.0)


def test_nothing_compared() -> None:
    """An output without elements has no histogram and no worst values; no output proves nothing."""
    assert not _measure([]).passed
    output = _measure([(np.zeros((0, 3)), np.zeros((0, 3)))])
    assert output.passed
    assert output.histogram is None
    assert (output.median_abs, output.p999_abs, output.fraction_outside) == (0.0, 0.0, 0.0)


class SumAndDifference(nn.Module):
    """Off from the file's outputs by 0.5 and by 0.25."""

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Return two tensors of the shape of ``a``."""
        return a + b + 0.5, a - b + 0.25


def _two(folder: Path) -> Path:
    nodes = [helper.make_node("Add", ["a", "b"], ["s"]), helper.make_node("Sub", ["a", "b"], ["d"])]
    return file_of(folder / "two.onnx", nodes, ("a", "b"), ("s", "d"))


@pytest.mark.parametrize(
    ("tolerances", "passed"),
    [
        ({}, [False, False]),
        ({"atol": 1.0}, [True, True]),
        ({"atol": {"s": 1.0}}, [True, False]),
        ({"atol": {"d": 1.0}}, [False, True]),
        ({"atol": {0: 0.6, "d": 0.3}}, [True, True]),
        ({"atol": {0: 0.4, 1: 0.3}}, [False, True]),
        ({"atol": {"s": 0.0}, "rtol": {"d": 1e6}}, [False, True]),
    ],
)
def test_tolerances_of_each_output(
    tmp_path: Path, tolerances: dict[str, Any], passed: list[bool]
) -> None:
    """Tolerances by name or position hold for their output only; the rest keep the default."""
    report = check_parity(SumAndDifference(), _two(tmp_path), (rows(), rows(seed=1)), **tolerances)
    assert [output.passed for output in report.outputs] == passed


_BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"atol": {"x": 1.0}}, ValueError, "atol names the output 'x', the file has ['s', 'd']"),
    ({"rtol": {2: 1.0}}, ValueError, "rtol names the output 2, the file has ['s', 'd']"),
    ({"rtol": {-1: 1.0}}, ValueError, "rtol names the output -1, the file has ['s', 'd']"),
    ({"atol": {"s": 1.0, 0: 2.0}}, ValueError, "atol names the output 's' twice, also as 0"),
    ({"atol": {"s": -1.0}}, ValueError, "atol['s'] must be 0 or more, got -1.0"),
    ({"rtol": {0: math.nan}}, ValueError, "rtol[0] must be 0 or more, got nan"),
    ({"rtol": {0: "1"}}, ValueError, "rtol[0] must be 0 or more, got '1'"),
    (
        {"rtol": {None: 1.0}},
        TypeError,
        "rtol must be by name or position of an output, got the key None",
    ),
    (
        {"rtol": {True: 1.0}},
        TypeError,
        "rtol must be by name or position of an output, got the key True",
    ),
]


@pytest.mark.parametrize(("tolerances", "error", "message"), _BAD)
def test_bad_tolerances(
    tmp_path: Path, tolerances: dict[str, Any], error: type[Exception], message: str
) -> None:
    """A tolerance that fits no output, or is no number, is told word for word."""
    with pytest.raises(error) as caught:
        check_parity(SumAndDifference(), _two(tmp_path), (rows(), rows()), **tolerances)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("given", "number"),
    [
        (np.float32(0.5), 0.5),
        (np.float64(0.25), 0.25),
        (np.int64(2), 2),
        ({"d": np.float16(0.5), np.int64(0): 1}, {"d": 0.5, 0: 1}),
        ({"s": None}, {"s": None}),
    ],
)
def test_numbers_of_numpy(given: Any, number: Any) -> None:
    """They are tolerances as Python's own are, and become these: a case is kept as JSON."""
    found = require_tolerances(given, given, ["s", "d"])
    assert found == (number, number)
    json.dumps(found[0])


@pytest.mark.parametrize("value", [True, np.True_, 1j, "1", torch.tensor(0.5)], ids=repr)
def test_no_real_number(value: Any) -> None:
    """Truth values, complex numbers, text and tensors are no tolerance."""
    with pytest.raises(ValueError, match="atol must be 0 or more, got "):
        require_tolerances(None, value)


def test_numbers_of_numpy_in_an_export(tmp_path: Path) -> None:
    """Options that are computed with numpy are taken, also into a saved case."""
    path, case = tmp_path / "net.onnx", tmp_path / "net.npz"
    report = export_onnx(
        Head(),
        rows(),
        path,
        exporter="torchscript",
        rtol=np.float32(0.5),
        atol={np.int64(0): np.float32(0.25)},
        samples=np.int64(2),  # type: ignore[arg-type]
        opset_version=np.int64(19),  # type: ignore[arg-type]
        save_case=case,
    )
    assert (report.parity.samples, report.opset) == (3, 19)
    replayed = check_case(path, case).outputs[0]
    assert (replayed.rtol, replayed.atol) == (0.5, 0.25)
    assert json.loads(report.to_json())["parity"]["outputs"][0]["atol"] == 0.25


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_tolerances_of_an_export(tmp_path: Path, exporter: str) -> None:
    """An export takes tolerances for each output, and refuses those of outputs it lacks."""
    path = tmp_path / "net.onnx"
    report = export_onnx(
        Head(), rows(), path, exporter=exporter, output_names=["score"], atol={"score": 0.5}
    )
    assert report.parity.outputs[0].atol == 0.5
    before = contents_of(tmp_path)
    for names in (["score"], None):
        with pytest.raises(ValueError, match="rtol names the output 'other', the file has"):
            export_onnx(
                Head(), rows(), path, exporter=exporter, output_names=names, rtol={"other": 0.5}
            )
    assert contents_of(tmp_path) == before


def test_strict_tolerance_for_one_output(tmp_path: Path) -> None:
    """One output held to zero fails an export that passes otherwise."""

    class Deep(Head):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y: Tensor = torch.sigmoid(self.layer(x).exp().sin() @ x.T)
            return x + 0.0, y

    x = rows(seed=4)
    assert export_onnx(Deep(), x, tmp_path / "net.onnx").parity.passed
    with pytest.raises(ParityError) as caught:
        export_onnx(Deep(), x, tmp_path / "net.onnx", rtol={1: 0.0}, atol={1: 0.0}, samples=40)
    assert [output.passed for output in caught.value.report.outputs] == [True, False]
