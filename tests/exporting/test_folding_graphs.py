"""Which parts of a graph are folded, on graphs written in ONNX's text form.

`folding` is called inside: no exporter writes graphs like these on demand.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray

from sn_export.exporting.folding import fold_initializers
from sn_export.exporting.initializers import make_plain_path, name_folded
from sn_export.proving import find_using_modules

_HEAD = '<ir_version: 10, opset_import: ["" : 20]>'
_W = np.arange(1, 13, dtype=np.float32).reshape(3, 4) / 7
_STATE = {"m.weight": _W, "m.gain": np.float32([0.5])}


def _model(text: str, **initializers: NDArray[Any]) -> ir.Model:
    proto = onnx.parser.parse_model(f"{_HEAD} g {text}")
    arrays = {"w": _STATE["m.weight"], "gain": _STATE["m.gain"]} | initializers
    declared = [info.name for info in (*proto.graph.value_info, *proto.graph.input)]
    for name in arrays:
        if name in declared:
            proto.graph.initializer.append(ir.to_proto(ir.tensor(arrays[name], name=name)))
    model = ir.from_proto(proto)
    for name, value in list(model.graph.initializers.items()):
        value.name = {"w": "m.weight", "gain": "m.gain"}.get(name, name)
    return model


def _fold(model: ir.Model) -> list[str]:
    state = {name: torch.from_numpy(array.copy()) for name, array in _STATE.items()}
    return [entry.name for entry in fold_initializers(model, state)]


def _operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def _run(model: ir.Model, x: NDArray[Any]) -> list[NDArray[Any]]:
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString())
    return [np.asarray(value) for value in session.run(None, {"x": x})]


def _unchanged(text: str, **initializers: NDArray[Any]) -> None:
    model = _model(text, **initializers)
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    assert _fold(model) == []
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


_FOLDED = {
    "arithmetic": "(float[2,4] x) => (float[2,3] y) <float[3,4] w, float[1] gain>"
    "{ s = Mul(w, gain) t = Transpose(s) y = MatMul(x, t) }",
    "outputs of one node": "(float[2,2] x) => (float[2,3] y) <float[3,4] w>"
    "{ s = Exp(w) a, b = Split<axis = 1, num_outputs = 2>(s) c = Add(a, b) t = Transpose(c)"
    " y = MatMul(x, t) }",
    "constants between": "(float[2,4] x) => (float[2,3] y) <float[3,4] w>"
    "{ two = Constant<value_float = 2.0>() s = Div(w, two) t = Transpose(s) y = MatMul(x, t) }",
}


@pytest.mark.parametrize("name", _FOLDED)
def test_arithmetic_is_folded_to_the_same_result(name: str) -> None:
    """One node is left, whose weight has the module's name, and the outputs stay."""
    model = _model(_FOLDED[name])
    x = np.random.default_rng(0).normal(size=[int(s) for s in model.graph.inputs[0].shape])
    x = x.astype(np.float32)
    before = _run(model, x)
    assert _fold(model) == ["m.weight"]
    assert _operators(model) == ["MatMul"]
    assert list(model.graph.initializers) == ["m.weight"]
    np.testing.assert_allclose(_run(model, x)[0], before[0], rtol=1e-6)


_KEPT = {
    "layout": "{ t = Transpose(w) y = MatMul(x, t) }",
    "identity": "{ i = Identity(w) t = Transpose(i) y = MatMul(x, t) }",
    "random": "{ n = RandomNormalLike(w) s = Add(w, n) t = Transpose(s) y = MatMul(x, t) }",
    "input": "{ m = ReduceMean(x) s = Mul(w, m) t = Transpose(s) y = MatMul(x, t) }",
    "quantised": "<float scale = {0.1}, int8 zero = {0}>"
    "{ q = QuantizeLinear(w, scale, zero) d = DequantizeLinear(q, scale, zero)"
    " t = Transpose(d) y = MatMul(x, t) }",
    "only its shape": "{ s = Shape(w) d = Add(s, s) e = Cast<to = 1>(d) m = ReduceMean(e)"
    " t = Transpose(w) r = MatMul(x, t) y = Mul(r, m) }",
}


@pytest.mark.parametrize("name", _KEPT)
def test_graph_stays_byte_for_byte(name: str) -> None:
    """Layout, random and quantising operators, inputs and shapes alone are left as they are."""
    initializers, _, body = _KEPT[name].rpartition(">{") if ">{" in _KEPT[name] else ("", "", "")
    body = "{" + body if body else _KEPT[name]
    more = ", " + initializers[1:] if initializers else ""
    _unchanged(f"(float[2,4] x) => (float[2,3] y) <float[3,4] w{more}> {body}")


def test_constants_that_are_no_weights_stay() -> None:
    """Arithmetic on constants of the exporter's own is the exporter's business."""
    _unchanged(
        "(float[2,4] x) => (float[2,4] y) <float[4] c = {1.0, 2.0, 3.0, 4.0}>"
        "{ s = Exp(c) y = Mul(x, s) }"
    )


def test_initializer_that_is_an_input_stays() -> None:
    """A weight that the caller may feed is no constant."""
    model = _model(
        "(float[2,4] x, float[3,4] w) => (float[2,3] y) <float[3,4] w>"
        "{ s = Exp(w) t = Transpose(s) y = MatMul(x, t) }"
    )
    assert _fold(model) == []
    assert _operators(model) == ["Exp", "Transpose", "MatMul"]


def test_branches_stay_and_what_they_read_is_folded() -> None:
    """A node with graphs inside is not folded; a value that its branches read is."""
    model = _model(
        "(float[3,4] x) => (float[3,4] y) <float[3,4] w>"
        "{ s = Exp(w) m = ReduceMax<keepdims = 0>(x) c = Cast<to = 9>(m)"
        " y = If(c) <then_branch = a () => (float[3,4] p) { p = Add(x, s) },"
        " else_branch = b () => (float[3,4] q) { q = Sub(x, s) }> }"
    )
    x = np.ones((3, 4), dtype=np.float32)
    before = _run(model, x)
    assert _fold(model) == ["m.weight"]
    assert _operators(model) == ["ReduceMax", "Cast", "If"]
    np.testing.assert_allclose(_run(model, x)[0], before[0], rtol=1e-6)


def test_raw_weight_in_use_keeps_its_name() -> None:
    """Where the raw weight is used too, both are stored, under two names."""
    model = _model(
        "(float[2,4] x) => (float[2,3] y) <float[3,4] w>"
        "{ s = Exp(w) t = Transpose(s) a = MatMul(x, t) u = Transpose(w) b = MatMul(x, u)"
        " y = Add(a, b) }"
    )
    x = np.ones((2, 4), dtype=np.float32)
    before = _run(model, x)
    assert _fold(model) == ["m.weight_folded"]
    assert _operators(model) == ["MatMul", "Transpose", "MatMul", "Add"]
    np.testing.assert_allclose(_run(model, x)[0], before[0], rtol=1e-6)


def test_shared_cone_is_folded_once_for_each_result() -> None:
    """Two results of one cone have two names, and nothing of the cone is left."""
    model = _model(
        "(float[3,4] x) => (float[3,4] y) <float[3,4] w>"
        "{ s = Exp(w) t = Sqrt(s) a = Mul(x, s) y = Mul(a, t) }"
    )
    x = np.ones((3, 4), dtype=np.float32)
    before = _run(model, x)
    assert _fold(model) == ["m.weight", "m.weight_folded"]
    assert _operators(model) == ["Mul", "Mul"]
    assert list(model.graph.initializers) == ["m.weight", "m.weight_folded"]
    np.testing.assert_allclose(_run(model, x)[0], before[0], rtol=1e-6)


def test_output_of_the_model_keeps_its_name() -> None:
    """A result that is an output is stored once, and handed out under the output's name."""
    model = _model(
        "(float[3,4] x) => (float[3,4] y, float[3,4] s) <float[3,4] w>{ s = Exp(w) y = Mul(x, s) }"
    )
    x = np.ones((3, 4), dtype=np.float32)
    before = _run(model, x)
    assert _fold(model) == ["m.weight"]
    assert _operators(model) == ["Mul", "Identity"]
    assert [output.name for output in model.graph.outputs] == ["y", "s"]
    for left, right in zip(_run(model, x), before, strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-6)


def test_results_that_grow_are_folded_before_they_do() -> None:
    """What expands a result stays, so that the file does not hold a thousand copies."""
    model = _model(
        "(float[1000,3,4] x) => (float[1000,3,4] y) <float[3,4] w, int64[3] size = {1000, 3, 4}>"
        "{ s = Exp(w) e = Expand(s, size) y = Mul(x, e) }"
    )
    assert _fold(model) == ["m.weight"]
    assert _operators(model) == ["Expand", "Mul"]
    assert sum(v.const_value.nbytes for v in model.graph.initializers.values()) < 100


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ml_dtypes.bfloat16])
def test_dtype_is_kept(dtype: Any) -> None:
    """Every floating dtype is folded in its own precision, whether onnxruntime knows it or not."""
    code = ir.DataType.from_numpy(np.dtype(dtype))
    text = {"FLOAT": "float", "DOUBLE": "double"}.get(code.name, code.name.lower())
    model = _model(
        f"({text}[3,4] x) => ({text}[3,4] y) <{text}[3,4] w>{{ s = Exp(w) y = Mul(x, s) }}",
        w=_W.astype(dtype),
    )
    assert _fold(model) == ["m.weight"]
    tensor = model.graph.initializers["m.weight"].const_value
    assert tensor is not None and tensor.dtype == code
    wanted = np.exp(_W.astype(dtype).astype(np.float64))
    limit = 2 * float(ml_dtypes.finfo(dtype).eps)
    np.testing.assert_allclose(tensor.numpy().astype(np.float64), wanted, rtol=limit)


def test_cone_that_nobody_can_evaluate_stays(caplog: pytest.LogCaptureFixture) -> None:
    """An operator that fails leaves its nodes in the graph, and a line in the log."""
    model = _model(
        "(float[3,4] x) => (float[3,4] y) <float[3,4] w, int64[2] size = {5, 5}>"
        "{ s = Exp(w) e = Reshape(s, size) y = Mul(x, e) }"
    )
    with caplog.at_level("WARNING", "sn_export"):
        assert _fold(model) == []
    assert _operators(model) == ["Exp", "Reshape", "Mul"]
    assert "cannot fold 'e'" in caplog.text


@pytest.mark.parametrize(
    ("raw", "plain"),
    [
        ("a.weight", "a.weight"),
        ("a.weight_orig", "a.weight"),
        ("a.module.weight_bar", "a.module.weight"),
        ("weight_v", "weight"),
        ("a.parametrizations.weight.original", "a.weight"),
        ("parametrizations.weight_hh_l0.original0", "weight_hh_l0"),
        ("a._v", "a._v"),
    ],
)
def test_plain_names(raw: str, plain: str) -> None:
    """Suffixes of raw tensors and torch's parametrization names give the plain name."""
    assert make_plain_path(raw) == plain


@pytest.mark.parametrize(
    ("raw", "users", "taken", "name"),
    [
        ("a.weight", ["a"], [], "a.weight"),
        ("a.weight_orig", ["a", "b"], [], "a.weight"),
        ("a.weight", [""], [], "a.weight"),
        ("encoder.weight", ["decoder"], [], "decoder.weight"),
        ("a.kernel", ["a"], ["a.kernel"], "a.weight"),
        ("a.weight", ["a"], ["a.weight"], "a.weight_folded"),
        ("a.weight", ["a"], ["a.weight", "a.weight_folded"], "a.weight_1"),
        (None, ["a.b"], [], "a.b.weight"),
        (None, ["a", "b"], ["weight"], "weight_folded"),
    ],
)
def test_folded_names(raw: str | None, users: list[str], taken: list[str], name: str) -> None:
    """The name is that of the using module and the raw tensor, and is free."""
    assert name_folded(raw, users, taken) == name


_SCOPES = "pkg.torch.onnx.name_scopes"


@pytest.mark.parametrize(
    ("node_name", "metadata", "module"),
    [
        ("n", {_SCOPES: "['', 'body', 'body.0', 'conv2d']"}, "body.0"),
        ("n", {_SCOPES: "['', 'conv2d']"}, ""),
        ("/Conv", {}, ""),
        ("/body/conv/Conv", {}, "body.conv"),
        ("/body/body.0/conv/Conv_1", {}, "body.0.conv"),
        ("/a/b/b.1/b.1.0/Conv", {}, "a.b.1.0"),
        ("Conv_3", {}, ""),
    ],
)
def test_modules_of_nodes(node_name: str, metadata: dict[str, str], module: str) -> None:
    """The path is read from the dynamo exporter's scopes or the TorchScript exporter's names."""
    value = ir.Value(name="w")
    ir.node("Conv", [value], name=node_name, metadata_props=metadata)
    assert find_using_modules(value) == [module]
