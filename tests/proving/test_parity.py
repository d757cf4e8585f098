"""check_parity on its own: every element counts, and every measure is numpy's.

The default tolerances are taken from inside, to stand right before and beyond them.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from export_models import Head, Raising, file_of, rows
from hypothesis import given, settings, strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from sn_export import (
    ExportError,
    OutputParity,
    ParityReport,
    SnExportError,
    check_parity,
    export_onnx,
)
from sn_export.proving.tolerances import DEFAULT_TOLERANCES

_ONNX_TYPES = {
    torch.float32: TensorProto.FLOAT,
    torch.float64: TensorProto.DOUBLE,
    torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16,
    torch.int64: TensorProto.INT64,
    torch.int32: TensorProto.INT32,
    torch.uint8: TensorProto.UINT8,
    torch.bool: TensorProto.BOOL,
}


class Recalling(nn.Module):
    """Answers its inputs with tensors given beforehand, in turn."""

    def __init__(self, *answers: Tensor) -> None:
        super().__init__()
        self._answers = iter(answers)

    def forward(self, x: Tensor) -> Tensor:
        return next(self._answers)


@pytest.fixture(scope="module")
def identity(tmp_path_factory: pytest.TempPathFactory) -> Callable[[torch.dtype], Path]:
    """Files that return their input, one for each dtype."""
    folder = tmp_path_factory.mktemp("identity")

    @functools.cache
    def make(dtype: torch.dtype) -> Path:
        node = helper.make_node("Identity", ["x"], ["y"])
        return file_of(folder / f"{dtype}.onnx", [node], dtype=_ONNX_TYPES[dtype])

    return make


Identity = Callable[[torch.dtype], Path]


def _compare(identity: Identity, pairs: list[tuple[Any, Any]], **options: Any) -> OutputParity:
    """Compare what a model says (left) with what a file says (right)."""
    says = [torch.as_tensor(left) for left, _ in pairs]
    file = [torch.as_tensor(right) for _, right in pairs]
    report = check_parity(Recalling(*says), identity(file[0].dtype), list(file), **options)
    (output,) = report.outputs
    assert report.passed == output.passed
    assert report.samples == output.samples == len(pairs)
    return output


def test_equal(identity: Identity) -> None:
    """Equal outputs pass, with errors of zero."""
    output = _compare(identity, [(rows(), rows())], rtol=0, atol=0)
    assert output.passed
    assert (output.max_abs, output.max_rel, output.mean_abs, output.reason) == (0, 0, 0, "")
    assert (output.name, output.shape, output.dtype) == ("y", (2, 3), "float32")


def test_measures_by_hand(identity: Identity) -> None:
    """The measures of two samples are those computed by hand."""
    output = _compare(
        identity,
        [
            ([[1.0, 2.0], [0.0, -4.0]], [[1.0, 2.5], [0.25, -4.0]]),
            ([[10.0, 1.0], [1.0, 1.0]], [[8.0, 1.0], [1.0, 1.0]]),
        ],
    )
    assert output.max_abs == 2.0
    assert output.max_rel == 0.25  # 0.5 of 2.0; the zero has no relative error
    assert output.mean_abs == (0.5 + 0.25 + 2.0) / 8
    assert output.worst_index == (0, 0)
    assert output.worst_sample == "input 1"
    assert not output.passed


_pairs = st.integers(1, 4).flatmap(
    lambda n: hnp.arrays(
        np.float64, (2, n, 3), elements=st.floats(-1e6, 1e6).map(lambda v: round(v, 6))
    )
)


@given(_pairs, st.sampled_from([0.0, 1e-6, 0.1, 1.0]), st.sampled_from([0.0, 1e-6, 0.1, 1.0]))
@settings(deadline=None, max_examples=150)
def test_measures_are_those_of_numpy(
    identity: Identity, pair: NDArray[np.float64], rtol: float, atol: float
) -> None:
    """Errors, the worst place and the verdict agree with numpy on any finite arrays."""
    says, file = pair
    output = _compare(identity, [(says, file)], rtol=rtol, atol=atol)
    error = np.abs(says - file)
    assert output.max_abs == error.max()
    assert error[output.worst_index] == error.max()
    assert output.mean_abs == pytest.approx(error.mean(), rel=1e-12)
    nonzero = says != 0
    wanted = (error[nonzero] / np.abs(says[nonzero])).max() if nonzero.any() else 0.0
    assert output.max_rel == pytest.approx(wanted, rel=1e-12)
    assert output.passed == bool((error <= atol + rtol * np.abs(says)).all())
    assert output.passed == (output.reason == "")


@given(
    hnp.arrays(
        np.float32,
        (2, 4),
        elements=st.sampled_from([0.0, 1.0, -1.0, np.inf, -np.inf, np.nan]),
    ),
    st.sampled_from([None, 0.0, 1e-3, 10.0]),
    st.sampled_from([None, 0.0, 1e-3, 10.0]),
)
@settings(deadline=None, max_examples=200)
def test_not_finite(
    identity: Identity, pair: NDArray[np.float32], rtol: float | None, atol: float | None
) -> None:
    """NaN on either side fails, an infinity passes only beside an equal one, at any tolerance."""
    says, file = pair
    output = _compare(identity, [(says, file)], rtol=rtol, atol=atol)
    nan = np.isnan(says) | np.isnan(file)
    infinite = ~nan & (np.isinf(says) | np.isinf(file))
    if bool(nan.any() or (says[infinite] != file[infinite]).any()):
        assert not output.passed
        assert output.reason
    elif bool((says == file).all()):
        assert output.passed
        assert (output.max_abs, output.max_rel, output.mean_abs) == (0, 0, 0)


@pytest.mark.parametrize("rtol", [None, 0.0, 1e-3])
@pytest.mark.parametrize(
    ("says", "file", "passes"),
    [
        ([math.inf, 1.0], [math.inf, 1.0], True),
        ([-math.inf, 1.0], [-math.inf, 1.0], True),
        ([math.inf, 1.0], [-math.inf, 1.0], False),
        ([math.inf, 1.0], [3.0, 1.0], False),
        ([3.0, 1.0], [math.inf, 1.0], False),
        ([math.nan, 1.0], [math.nan, 1.0], False),
        ([math.nan, 1.0], [3.0, 1.0], False),
        ([3.0, 1.0], [math.nan, 1.0], False),
        ([math.inf, 1.0], [math.inf, 2.0], False),
    ],
)
def test_infinities_and_nan(
    identity: Identity, says: list[float], file: list[float], passes: bool, rtol: float | None
) -> None:
    """What is not finite is compared exactly, and does not loosen the rest."""
    output = _compare(identity, [(says, file)], rtol=rtol)
    assert output.passed == passes


def test_what_is_not_finite_is_counted_over_all_sets(identity: Identity) -> None:
    """Infinite errors and NaN of every input set are in the counts, and at the end of quantiles."""
    says, file = [1.0, 2.0, 3.0], [math.inf, math.nan, 3.0]
    histogram = _compare(identity, [(says, file)] * 3).histogram
    assert histogram is not None
    assert (histogram.not_finite, histogram.zeros, sum(histogram.counts)) == (6, 3, 0)


@pytest.mark.parametrize("first", [1.0, math.inf])
def test_nan_is_counted(identity: Identity, first: float) -> None:
    """The reason says how many elements are NaN, and on which input; max_abs is NaN.

    So it is behind an infinite error.
    """
    output = _compare(
        identity, [([1.0, 2.0, 3.0], [1.0] * 3), ([1.0, 2.0, 3.0], [first, math.nan, 3.0])]
    )
    assert output.reason == "1 of 3 elements are NaN on input 1"
    assert math.isnan(output.max_abs)
    assert (output.worst_index, output.worst_sample) == ((1,), "input 1")


def test_nan_of_the_model_itself_is_told(identity: Identity) -> None:
    """Where the model says NaN, the export is not the one to blame."""
    output = _compare(identity, [([math.nan, 2.0, math.nan], [math.nan, 2.0, math.nan])])
    assert output.reason == "2 of 3 elements are NaN on input 0, 2 of them in the model itself"


def test_reason_in_words(identity: Identity) -> None:
    """A failure is told word for word: how many, the bound, where, and both values."""
    output = _compare(identity, [([[1.0, 2.0, 4.0]], [[1.0, 2.5, 4.0]])], rtol=0.0, atol=0.25)
    assert output.reason == (
        "1 of 3 elements are outside atol 0.25 + rtol 0 on input 0; "
        "worst at [0, 1]: the model says 2, the file 2.5"
    )


def test_reason_of_the_worst_sample(identity: Identity) -> None:
    """Where several inputs fail, the reason is about the worst one, as worst_sample is."""
    output = _compare(identity, [([0.0], [9.0]), ([0.0], [1.0])], atol=0.5)
    assert output.worst_sample == "input 0"
    assert "input 0" in output.reason


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_default_tolerances(identity: Identity, dtype: torch.dtype) -> None:
    """By default atol is scaled by the output's largest magnitude, per dtype as documented."""
    rtol, scaled = DEFAULT_TOLERANCES[str(dtype).removeprefix("torch.")]
    says = torch.tensor([64.0, 0.0], dtype=dtype)
    inside = says + torch.tensor([0.0, 0.5 * 64 * scaled], dtype=dtype)
    outside = says + torch.tensor([0.0, 2.0 * 64 * scaled], dtype=dtype)
    output = _compare(identity, [(says, inside)])
    assert output.passed
    assert (output.rtol, output.atol) == (rtol, 64 * scaled)
    assert not _compare(identity, [(says, outside)]).passed


@pytest.mark.parametrize("place", ["parameter", "buffer"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_coarsest_dtype_of_the_network_decides(
    identity: Identity, dtype: torch.dtype, place: str
) -> None:
    """Outputs in float32 of a network that computes in half precision have no more than that."""
    says, model = torch.tensor([64.0, 0.0]), Recalling()
    value = torch.ones(1, dtype=dtype)
    if place == "parameter":
        model.register_parameter(place, nn.Parameter(value))
    else:
        model.register_buffer(place, value)
    model._answers = iter([says])
    (output,) = check_parity(model, identity(torch.float32), says).outputs
    name = "float32" if dtype == torch.float64 else str(dtype).removeprefix("torch.")
    rtol, scaled = DEFAULT_TOLERANCES[name]
    assert (output.rtol, output.atol) == (rtol, 64 * scaled)


def test_scale_is_each_inputs_own(identity: Identity) -> None:
    """A large output of one input does not loosen the bound of another."""
    assert not _compare(identity, [([1e6, 0.0], [1e6, 0.0]), ([1.0, 0.0], [1.0, 0.5])]).passed


def test_tolerance_of_zero(identity: Identity) -> None:
    """With rtol and atol 0 the smallest difference fails."""
    assert not _compare(identity, [([1.0], [1.0 + 2**-23])], rtol=0, atol=0).passed
    assert _compare(identity, [([1.0], [1.0 + 2**-23])], rtol=2**-23, atol=0).passed
    assert _compare(identity, [([1.0], [1.0 + 2**-23])], rtol=0, atol=2**-23).passed


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool])
def test_integers_and_booleans_are_exact(identity: Identity, dtype: torch.dtype) -> None:
    """Integers and booleans pass only if equal, and tell where they are not."""
    says = torch.tensor([[1, 0, 1]], dtype=dtype)
    assert _compare(identity, [(says, says)]).passed
    output = _compare(identity, [(says, torch.tensor([[1, 0, 0]], dtype=dtype))])
    assert not output.passed
    assert (output.max_abs, output.worst_index, output.dtype) == (
        1.0,
        (0, 2),
        str(dtype).removeprefix("torch."),
    )


@pytest.mark.parametrize("shape", [(3, 2), ()])
def test_bfloat16(identity: Identity, shape: tuple[int, ...]) -> None:
    """bfloat16, which numpy lacks, goes to onnxruntime and comes back bit for bit."""
    says = torch.randn(shape).to(torch.bfloat16)
    output = _compare(identity, [(says, says)], rtol=0, atol=0)
    assert (output.passed, output.shape, output.dtype) == (True, shape, "bfloat16")
    assert not _compare(identity, [(says, says * 1.25)]).passed


@pytest.mark.parametrize("large", [2**53, 2**62, -(2**63)])
def test_large_integers_are_exact(identity: Identity, large: int) -> None:
    """A difference of one is found in integers that no float64 can hold."""
    says, file = torch.tensor([5, large]), torch.tensor([5, large + 1])
    assert _compare(identity, [(says, says)]).passed
    output = _compare(identity, [(says, file)])
    assert not output.passed
    assert output.worst_index == (1,)


@pytest.mark.parametrize(
    ("says", "file", "reason"),
    [
        (
            torch.ones(2, 3),
            torch.ones(3, 2),
            "the file gives float32[3, 2], the model float32[2, 3]",
        ),
        (torch.ones(3), torch.ones(1), "the file gives float32[1], the model float32[3]"),
        (torch.ones(()), torch.ones(1), "the file gives float32[1], the model float32[]"),
        (torch.ones(2).double(), torch.ones(2), "the file gives float32[2], the model float64[2]"),
        (torch.ones(2).long(), torch.ones(2), "the file gives float32[2], the model int64[2]"),
    ],
)
def test_shape_and_dtype(identity: Identity, says: Tensor, file: Tensor, reason: str) -> None:
    """Another shape or dtype fails, even where it would broadcast to equal values."""
    output = _compare(identity, [(says, file)], atol=1e9)
    assert not output.passed
    assert output.reason == f"{reason} on input 0"
    assert output.max_abs == math.inf


def test_one_wrong_shape_among_right_ones(identity: Identity) -> None:
    """A wrong shape on one input is not forgotten over later inputs that are right."""
    right = torch.ones(2)
    output = _compare(identity, [(right, right), (torch.ones(3), right), (right, right)])
    assert not output.passed


def test_no_elements_and_no_dimensions(identity: Identity) -> None:
    """Outputs without elements prove nothing alone, outputs without dimensions have a value."""
    empty, full = torch.ones(0, 3), torch.ones(2, 3)
    alone = _compare(identity, [(empty, empty)])
    assert (alone.passed, alone.max_abs) == (False, 0.0)
    assert alone.reason == alone.verdict
    assert alone.reason.startswith("no element was compared")
    assert _compare(identity, [(empty, empty), (full, full)]).passed
    other = _compare(identity, [(torch.ones(0, 3), torch.ones(0, 2))])
    assert (other.passed, other.reason) == (False, other.verdict)
    assert other.reason.startswith("the file gives float32[0, 2]")
    output = _compare(identity, [(torch.tensor(1.0), torch.tensor(2.0))])
    assert (output.passed, output.worst_index, output.max_abs) == (False, (), 1.0)


def _two(folder: Path, outputs: tuple[str, ...] = ("s", "d")) -> Path:
    nodes = [helper.make_node("Add", ["a", "b"], ["s"]), helper.make_node("Sub", ["a", "b"], ["d"])]
    return file_of(folder / "two.onnx", nodes, ("a", "b"), outputs)


class SumAndDifference(nn.Module):
    """What the file of `_two` computes; the names of the inputs differ."""

    def forward(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        return left + right, left - right


class SameNames(SumAndDifference):
    """The names of the inputs are the file's."""

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return a + b, a - b


@pytest.mark.parametrize("model", [SumAndDifference(), SameNames()])
def test_several_inputs_and_outputs(tmp_path: Path, model: nn.Module) -> None:
    """Inputs go by name where the names agree, else by position; outputs are told apart."""
    a, b = rows(seed=1), rows(seed=2)
    report = check_parity(model, _two(tmp_path), (a, b))
    assert report.passed
    assert [output.name for output in report.outputs] == ["s", "d"]
    assert str(report).count("passed") == 2


def test_inputs_by_keyword(tmp_path: Path) -> None:
    """A dict of keyword arguments goes to the right inputs in any order."""
    inputs = {"b": rows(seed=2), "a": rows(seed=1)}
    assert check_parity(SameNames(), _two(tmp_path), inputs).passed
    swapped = {"right": rows(seed=2), "left": rows(seed=1)}
    assert check_parity(SumAndDifference(), _two(tmp_path), swapped).passed


def test_one_output_of_two_is_wrong(tmp_path: Path) -> None:
    """Only the output that differs fails, and the whole with it."""

    class Half(SumAndDifference):
        def forward(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
            return left + right, right - left

    report = check_parity(Half(), _two(tmp_path), (rows(seed=1), rows(seed=2)))
    assert not report.passed
    assert [output.passed for output in report.outputs] == [True, False]
    assert str(report).splitlines()[0].startswith("s: passed, max_abs")
    assert str(report).splitlines()[1].startswith("d: FAILED, max_abs")


def test_wrong_number_of_inputs(tmp_path: Path) -> None:
    """Other inputs than the file's are an ExportError that lists both."""
    with pytest.raises(ExportError) as caught:
        check_parity(Head(), _two(tmp_path), [rows()])
    assert str(caught.value) == "the file takes the inputs ['a', 'b'], input 0 has ['x']"


def test_wrong_number_of_outputs(tmp_path: Path) -> None:
    """Another number of outputs is an ExportError that says both."""
    with pytest.raises(ExportError) as caught:
        check_parity(SumAndDifference(), _two(tmp_path, ("s",)), (rows(), rows()))
    assert str(caught.value) == "the file has 1 output, the model 2"


def test_input_of_another_dtype(tmp_path: Path) -> None:
    """An input that the file does not take is an ExportError naming the input set."""
    with pytest.raises(ExportError, match="onnxruntime fails on input"):
        check_parity(SumAndDifference(), _two(tmp_path), (rows().double(), rows().double()))


def test_lazy_modules_are_initialised_by_the_inputs(tmp_path: Path) -> None:
    """A network that never ran is compared, and differs: its weights are drawn now."""
    model = nn.Sequential(nn.LazyLinear(3))
    path = tmp_path / "net.onnx"
    export_onnx(nn.Sequential(nn.Linear(3, 3)), (rows(),), path, exporter="torchscript", samples=0)
    assert not check_parity(model, path, rows()).passed
    assert type(model[0]) is nn.Linear


def test_missing_file(tmp_path: Path) -> None:
    """A file that is not there is named."""
    path = tmp_path / "absent.onnx"
    with pytest.raises(FileNotFoundError) as caught:
        check_parity(Head(), path, rows())
    assert str(caught.value) == f"no ONNX file at '{path}'"


@pytest.mark.parametrize("content", [b"", b"this is no ONNX file", bytes(range(256)) * 20])
def test_garbage_file(tmp_path: Path, content: bytes) -> None:
    """A file that is not ONNX is an ExportError that names it."""
    path = tmp_path / "bad.onnx"
    path.write_bytes(content)
    with pytest.raises(ExportError, match=r"cannot load 'bad\.onnx': "):
        check_parity(Head(), path, rows())


def test_truncated_file(tmp_path: Path) -> None:
    """Half a file is an ExportError."""
    path = _two(tmp_path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(
        ExportError, match=r"^cannot load '\w+.onnx': it is no ONNX file, or damaged"
    ):
        check_parity(SumAndDifference(), path, (rows(), rows()))


@pytest.mark.parametrize("inputs", [[], None])
def test_no_inputs(tmp_path: Path, inputs: Any) -> None:
    """A comparison on nothing proves nothing and is refused."""
    with pytest.raises(ValueError, match="inputs must hold at least one input, got none"):
        check_parity(SumAndDifference(), _two(tmp_path), inputs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rtol": -1.0}, "rtol must be 0 or more, got -1.0"),
        ({"atol": -0.5}, "atol must be 0 or more, got -0.5"),
        ({"atol": math.nan}, "atol must be 0 or more, got nan"),
    ],
)
def test_bad_tolerance(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    """A tolerance out of range is told word for word."""
    with pytest.raises(ValueError, match="must be 0 or more") as caught:
        check_parity(SumAndDifference(), _two(tmp_path), (rows(), rows()), **options)
    assert str(caught.value) == message


def test_bad_model_provider_and_inputs(tmp_path: Path) -> None:
    """What is no module, no provider or no input is refused."""
    path = _two(tmp_path)
    with pytest.raises(TypeError) as no_module:
        check_parity(len, path, rows())  # type: ignore[arg-type]
    assert str(no_module.value) == (
        "model must be a torch.nn.Module, or a method of one such as net.decode, "
        "got builtin_function_or_method"
    )
    with pytest.raises(ValueError, match="unknown onnxruntime provider 'None such'"):
        check_parity(Head(), path, rows(), providers=["None such"])
    with pytest.raises(TypeError, match="providers must be a sequence of names, got None"):
        check_parity(Head(), path, rows(), providers=None)  # type: ignore[arg-type]
    for inputs in (3, [None]):
        with pytest.raises(TypeError, match="inputs must be a tensor, a tuple of arguments"):
            check_parity(Head(), path, inputs)
    with pytest.raises(TypeError, match="onnx_path must be the path of a file, got 5"):
        check_parity(Head(), 5, rows())  # type: ignore[arg-type]


def test_model_that_raises(tmp_path: Path) -> None:
    """The model's own error is chained and the input named."""
    node = helper.make_node("Identity", ["x"], ["y"])
    with pytest.raises(SnExportError, match="the model fails on input: ArithmeticError") as caught:
        check_parity(Raising(), file_of(tmp_path / "one.onnx", [node]), rows())
    assert isinstance(caught.value.__cause__, ArithmeticError)


def test_file_with_one_other_weight(tmp_path: Path) -> None:
    """One weight of a file changed by a thousandth is found, and where."""
    model = Head().eval()
    weight = model.layer.weight.detach().numpy().T.copy()
    bias = model.layer.bias.detach().numpy()
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["m"]),
        helper.make_node("Add", ["m", "b"], ["y"]),
    ]

    def write(weight: NDArray[Any]) -> Path:
        initializers = [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(bias, "b")]
        return file_of(tmp_path / "net.onnx", nodes, initializers=initializers)

    assert check_parity(model, write(weight), rows()).passed
    weight[0, 2] += 1e-3
    report = check_parity(model, write(weight), rows())
    assert not report.passed
    assert report.outputs[0].worst_index[1] == 2


def test_inputs_and_file_are_left_alone(tmp_path: Path) -> None:
    """Neither the inputs nor the file are written to."""
    path, a, b = _two(tmp_path), rows(seed=1), rows(seed=2)
    content, versions = path.read_bytes(), (a._version, b._version)
    check_parity(SumAndDifference(), path, [(a, b), (b, a)])
    assert path.read_bytes() == content
    assert (a._version, b._version) == versions
    assert sorted(p.name for p in tmp_path.iterdir()) == ["two.onnx"]


def test_report_without_outputs_proves_nothing() -> None:
    """A report on no outputs has not passed."""
    assert not ParityReport((), 0, ()).passed


def test_file_with_external_data(tmp_path: Path) -> None:
    """A file whose weights lie beside it is read together with them."""
    value = np.arange(3, dtype=np.float32)
    node = helper.make_node("Add", ["x", "c"], ["y"])
    path = file_of(
        tmp_path / "net.onnx", [node], initializers=[numpy_helper.from_array(value, "c")]
    )
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="side", size_threshold=0)

    class Adding(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.arange(3.0)

    assert check_parity(Adding(), path, rows()).passed
    (tmp_path / "side").unlink()
    with pytest.raises(ExportError, match=r"onnxruntime cannot load 'net\.onnx'"):
        check_parity(Adding(), path, rows())


@pytest.mark.parametrize("way", ["path", "link"])
def test_data_outside_the_folder_are_not_read(way: str, tmp_path: Path) -> None:
    """A file that names data outside of its folder, by a path or a link, is refused by name."""
    model, folder = nn.Linear(32, 32), tmp_path / "folder"
    folder.mkdir()
    export_onnx(model, rows(32), folder / "a.onnx", external_data=True, exporter="torchscript")
    (folder / "a.onnx.data").rename(tmp_path / "outside.bin")
    if way == "link":
        (folder / "a.onnx.data").symlink_to("../outside.bin")
    else:
        content = onnx.load(folder / "a.onnx", load_external_data=False)
        for entry in content.graph.initializer:
            for pair in entry.external_data:
                if pair.key == "location":
                    pair.value = "../outside.bin"
        onnx.save(content, folder / "a.onnx")
    with pytest.raises(ExportError, match=r"^cannot load 'a\.onnx': its data '.*' lie outside"):
        check_parity(model, folder / "a.onnx", rows(32))


def _tensor_outside(location: str) -> onnx.TensorProto:
    tensor = onnx.TensorProto(name="w", data_type=onnx.TensorProto.FLOAT, dims=[2], data_location=1)
    tensor.external_data.add(key="location", value=location)
    return tensor


def _function(*nodes: onnx.NodeProto) -> onnx.FunctionProto:
    return helper.make_function("own", "F", ["x"], ["y"], nodes, [helper.make_opsetid("", 18)])


def _with_default(tensor: onnx.TensorProto) -> onnx.FunctionProto:
    made = _function()
    made.attribute_proto.append(helper.make_attribute("value", tensor))
    return made


# Where a model can hold a tensor; each is put into a model that is otherwise empty.
_HOLDERS: dict[str, Callable[[onnx.ModelProto, onnx.TensorProto], object]] = {
    "initializer": lambda model, w: model.graph.initializer.append(w),
    "sparse": lambda model, w: model.graph.sparse_initializer.add(values=w),
    "constant": lambda model, w: model.graph.node.append(
        helper.make_node("Constant", [], ["w"], value=w)
    ),
    "sparse constant": lambda model, w: model.graph.node.append(
        helper.make_node("Constant", [], ["w"], sparse_value=onnx.SparseTensorProto(values=w))
    ),
    "branch": lambda model, w: model.graph.node.append(
        helper.make_node("If", ["c"], ["y"], then_branch=helper.make_graph([], "g", [], [], [w]))
    ),
    "function": lambda model, w: model.functions.append(
        _function(helper.make_node("Constant", [], ["w"], value=w))
    ),
    "default of a function": lambda model, w: model.functions.append(_with_default(w)),
    "training": lambda model, w: model.training_info.add().initialization.initializer.append(w),
}


@pytest.mark.parametrize("name", ["net.onnx", "net.json", "net.pbtxt"])
@pytest.mark.parametrize("holder", _HOLDERS)
def test_data_outside_are_found_wherever_a_tensor_is(
    holder: str, name: str, tmp_path: Path
) -> None:
    """Every tensor of a file is looked at, also in functions, and whatever its suffix is.

    onnxruntime 1.23 reads them in most of these places, and takes every file for protobuf.
    """
    model = onnx.ModelProto(ir_version=9)
    _HOLDERS[holder](model, _tensor_outside("../outside.bin"))
    (tmp_path / name).write_bytes(model.SerializeToString())
    with pytest.raises(
        ExportError, match=r"its data '\.\./outside\.bin' lie outside of its folder"
    ):
        check_parity(Head(), tmp_path / name, rows())


@pytest.mark.parametrize(
    ("location", "message"),
    [
        (b"pipe", r"its data 'pipe' are no regular file"),
        (b"folder", r"its data 'folder' are no regular file"),
        (b"a\0b", r"its data 'a\\x00b' have a name that no file can have"),
        (b"../a\xff", r"its data '\.\./a\\udcff' lie outside of its folder"),
    ],
)
def test_data_that_are_no_file(location: bytes, message: str, tmp_path: Path) -> None:
    """Data that are a pipe or a folder, or have a name in no encoding, are refused by name."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    stand_in = b"*" * len(location)
    model = onnx.ModelProto(ir_version=9)
    model.graph.initializer.append(_tensor_outside(stand_in.decode()))
    content = model.SerializeToString().replace(stand_in, location)
    (tmp_path / "net.onnx").write_bytes(content)
    with pytest.raises(ExportError, match=rf"^cannot load 'net\.onnx': {message}$"):
        check_parity(Head(), tmp_path / "net.onnx", rows())


def test_default_tolerances_are_those_of_the_documentation() -> None:
    """rtol, and atol in units of the largest value; looser ones would let a wrong file pass."""
    assert DEFAULT_TOLERANCES == {
        "float64": (1e-9, 1e-9),
        "float32": (1e-4, 1e-4),
        "float16": (1e-2, 1e-2),
        "bfloat16": (5e-2, 5e-2),
    }
