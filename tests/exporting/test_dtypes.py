"""Half precision, bfloat16, float64 and mixed networks, and the proof in float32."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import onnx
import onnx.parser
import pytest
import torch
from export_models import (
    APPLY,
    EXPORTERS,
    KINDS,
    Head,
    assert_as_before,
    contents_of,
    images,
    small_net,
)
from fingerprint import fingerprint
from onnx import TensorProto
from torch import Tensor, nn

from sn_export import ExportError, ParityError, check_case, check_parity, export_onnx


def _element_types(path: Path) -> set[int]:
    file = onnx.load(path)
    return {t.data_type for t in file.graph.initializer} | {
        v.type.tensor_type.elem_type for v in (*file.graph.input, *file.graph.output)
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("exporter", EXPORTERS)
def test_half(tmp_path: Path, exporter: str, kind: str) -> None:
    """A float16 network is exported, and proved, in float16."""
    model = small_net(kind).half()
    before = fingerprint(model)
    report = export_onnx(model, images().half(), tmp_path / "net.onnx", exporter=exporter)
    assert_as_before(before, model)
    assert (report.parity.outputs[0].dtype, report.parity.proof_dtype) == ("float16", None)
    assert _element_types(tmp_path / "net.onnx") <= {TensorProto.FLOAT16, TensorProto.INT64}


_LACKING = {torch.bfloat16: "bfloat16", torch.float64: "float64"}


@pytest.mark.parametrize("dtype", _LACKING)
@pytest.mark.parametrize("exporter", ["auto", *EXPORTERS])
def test_missing_kernel_is_named(tmp_path: Path, exporter: str, dtype: torch.dtype) -> None:
    """Where onnxruntime has no kernel, operator and dtype are told, once, and the way out."""
    model = small_net("hook").to(dtype)
    with pytest.raises(ExportError) as caught:
        export_onnx(model, images().to(dtype), tmp_path / "net.onnx", exporter=exporter)
    assert str(caught.value) == (
        f"onnxruntime's CPUExecutionProvider has no Conv for {_LACKING[dtype]} to prove "
        "'net.onnx' with. proof_dtype='float32' proves a copy of the file in float32"
    )
    assert contents_of(tmp_path) == {}


def test_missing_kernel_of_a_dtype_that_no_value_states(tmp_path: Path) -> None:
    """A file need not say of which dtype the values between its nodes are; the error says so."""
    file = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> net (double[1,1,4] x) => (double[1,1,3] y)'
        "<double[1,1,2] w = {1.0, 2.0}>"
        "{ a = Neg(x) v = Neg(w) b = Conv(a, v) y = Neg(b) }"
    )
    file.graph.node[2].name = "conv"
    onnx.save(file, tmp_path / "net.onnx")
    with pytest.raises(ExportError, match="no Conv for its dtype, which the file does not state"):
        check_parity(nn.Conv1d(1, 1, 2).double(), tmp_path / "net.onnx", torch.ones(1, 1, 4))


@pytest.mark.parametrize("dtype", _LACKING)
@pytest.mark.parametrize("exporter", EXPORTERS)
def test_proof_in_float32(tmp_path: Path, exporter: str, dtype: torch.dtype) -> None:
    """The file stays in the network's dtype; a float32 copy of it is what proves it."""
    path, model, x = tmp_path / "net.onnx", small_net("hook").to(dtype), images().to(dtype)
    before = fingerprint(model)
    report = export_onnx(model, x, path, exporter=exporter, proof_dtype="float32")
    assert_as_before(before, model)
    assert report.parity.proof_dtype == "float32"
    assert json.loads(report.to_json())["parity"]["proof_dtype"] == "float32"
    wanted = {torch.bfloat16: TensorProto.BFLOAT16, torch.float64: TensorProto.DOUBLE}[dtype]
    assert _element_types(path) <= {wanted, TensorProto.INT64}
    assert sorted(contents_of(tmp_path)) == ["net.onnx"]
    assert check_parity(model, path, x, proof_dtype="float32").passed


@pytest.mark.parametrize("dtype", _LACKING)
def test_proof_in_float32_finds_a_wrong_weight(tmp_path: Path, dtype: torch.dtype) -> None:
    """The copy in float32 is a proof: another network's file does not pass."""
    path, x = tmp_path / "net.onnx", images().to(dtype)
    export_onnx(small_net("hook").to(dtype), x, path, proof_dtype="float32")
    other = small_net("hook").to(dtype)
    assert not check_parity(other, path, x, proof_dtype="float32").passed


@pytest.mark.parametrize("dtype", _LACKING)
def test_case_of_a_proof_in_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    """A saved case says in which dtype it was proved, and is replayed in that."""
    path, case, x = tmp_path / "net.onnx", tmp_path / "net.npz", images().to(dtype)
    model = small_net("hook").to(dtype)
    made = export_onnx(model, x, path, proof_dtype="float32", save_case=case)
    replayed = check_case(path, case)
    assert replayed.passed and replayed.proof_dtype == "float32"
    assert [o.max_abs for o in replayed.outputs] == [o.max_abs for o in made.parity.outputs]
    export_onnx(small_net("hook").to(dtype), x, path, proof_dtype="float32")
    assert not check_case(path, case).passed


def test_case_in_float32_on_request(tmp_path: Path) -> None:
    """A case of a proof in the file's own dtype can be replayed in float32 too."""
    path, case, x = tmp_path / "net.onnx", tmp_path / "net.npz", images().half()
    export_onnx(small_net("hook").half(), x, path, save_case=case)
    assert check_case(path, case).proof_dtype is None
    report = check_case(path, case, proof_dtype="float32")
    assert report.passed and report.proof_dtype == "float32"
    with pytest.raises(ValueError, match="proof_dtype must be None or 'float32'"):
        check_case(path, case, proof_dtype=cast(Any, "float16"))


class Casting(Head):
    """Casts inside, makes constants of its dtype, and returns several dtypes."""

    def forward(self, x: Tensor) -> Any:
        y = self.layer(x).to(torch.bfloat16)
        return y + torch.zeros_like(y), y.double() * 0.1, (y > 0), y.argmax(1)


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_float32_reaches_casts_and_constants(tmp_path: Path, exporter: str) -> None:
    """Casts, constants and other dtypes inside a file are converted for the proof too."""
    model, x = Casting().double(), torch.randn(3, 3, dtype=torch.float64)
    report = export_onnx(
        model, x, tmp_path / "net.onnx", exporter=exporter, proof_dtype="float32", rtol=0.05
    )
    assert report.parity.passed


class Mixed(nn.Module):
    """Ends in float16, and returns float32."""

    def __init__(self) -> None:
        super().__init__()
        self.first = APPLY["hook"](nn.Conv2d(1, 8, 3))
        self.last = APPLY["parametrization"](nn.Linear(8, 4)).half()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(20 * self.first(x).mean((2, 3)).half())
        return y.float()


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_mixed(tmp_path: Path, exporter: str) -> None:
    """The coarsest dtype of a network gives the default tolerance, of a saved case as well."""
    case = tmp_path / "net.npz"
    report = export_onnx(
        Mixed(), images(), tmp_path / "net.onnx", exporter=exporter, save_case=case
    )
    assert report.parity.outputs[0].dtype == "float32"
    assert report.parity.outputs[0].rtol == 1e-2
    again = check_case(tmp_path / "net.onnx", case)
    assert again.passed and again.outputs[0].rtol == 1e-2
    with pytest.raises(ParityError):
        export_onnx(
            Mixed(), images(), tmp_path / "net.onnx", exporter=exporter, rtol=1e-9, atol=1e-9
        )


@pytest.mark.parametrize("wanted", ["float64", "half", torch.float32, True])
def test_unknown_proof_dtype(tmp_path: Path, wanted: Any) -> None:
    """There is one dtype to prove in; others are refused before anything runs."""
    with pytest.raises(ValueError, match="proof_dtype must be None or 'float32'"):
        export_onnx(small_net("hook"), images(), tmp_path / "net.onnx", proof_dtype=wanted)
    with pytest.raises(ValueError, match="proof_dtype must be None or 'float32'"):
        check_parity(small_net("hook"), tmp_path / "net.onnx", images(), proof_dtype=wanted)


@pytest.mark.filterwarnings("ignore")  # torch deprecates its own quantisation
def test_quantised_layers(tmp_path: Path) -> None:
    """Layers whose packed weights are no tensors are exported as torch alone exports them."""
    quantization = pytest.importorskip("torch.ao.quantization")
    model = nn.Sequential(
        quantization.QuantStub(), nn.Linear(40, 30), quantization.DeQuantStub()
    ).eval()
    model.qconfig = quantization.get_default_qconfig("fbgemm")
    observed = quantization.prepare(model)
    observed(torch.randn(8, 40))
    quantised = quantization.convert(observed)
    report = export_onnx(
        quantised, torch.randn(2, 40), tmp_path / "net.onnx", exporter="torchscript"
    )
    assert report.parity.passed
