"""No exported graph keeps arithmetic on initializers alone, though the block cannot see it."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import torch.nn.functional as F
from computed_networks import (
    DemodulatedConv,
    EqualisedConv,
    InlineLinear,
    IteratingConv,
    MixinConv,
    StandardisedConv,
    Tied,
    stack,
)
from export_models import EXPORTERS, assert_as_before, bare_export, rows, small_net
from fingerprint import fingerprint
from onnx import numpy_helper
from torch import Tensor, nn
from torch.nn.utils import spectral_norm

from sn_export import (
    ExportReport,
    ReparametrizationNotRecognisedWarning,
    check_parity,
    export_onnx,
)

# The block is kept from knowing them, for it knows more families than these tests are about.
pytestmark = [
    pytest.mark.usefixtures("_nothing_handwritten_is_known"),
    pytest.mark.filterwarnings("ignore::sn_export.SpectralNormNotRecognisedWarning"),
]
_LAYERS = (MixinConv, IteratingConv, StandardisedConv, EqualisedConv)
_SMALL, _REAL = (4, 6), (64, 256)


@pytest.fixture
def _nothing_handwritten_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sn_export.freezing.kinds.read_code", lambda cls: None)


def _picture(channels: int) -> Tensor:
    return torch.randn(1, channels, 5, 5, generator=torch.Generator().manual_seed(7))


def _export(model: nn.Module, x: Tensor, path: Path, exporter: str) -> ExportReport:
    with pytest.warns(ReparametrizationNotRecognisedWarning):
        return export_onnx(model, (x,), path, exporter=exporter)


def _graph(path: Path) -> onnx.GraphProto:
    return onnx.load(path).graph


def _operators(path: Path) -> list[str]:
    return [node.op_type for node in _graph(path).node]


def _arrays(path: Path) -> dict[str, Any]:
    return {i.name: numpy_helper.to_array(i) for i in _graph(path).initializer}


@pytest.mark.parametrize("size", [_SMALL, _REAL], ids=["small", "real"])
@pytest.mark.parametrize("layer", _LAYERS)
@pytest.mark.parametrize("exporter", EXPORTERS)
def test_graph_is_that_of_the_plain_network(
    tmp_path: Path, exporter: str, layer: type[nn.Conv2d], size: tuple[int, int]
) -> None:
    """Operators, initializer names and their order are those of plain convolutions."""
    model = stack(layer, *size)
    _export(model, _picture(size[0]), tmp_path / "net.onnx", exporter)
    bare_export(stack(nn.Conv2d, *size).eval(), (_picture(size[0]),), tmp_path / "b.onnx", exporter)
    assert _operators(tmp_path / "net.onnx") == _operators(tmp_path / "b.onnx")
    assert _operators(tmp_path / "net.onnx") == ["Conv", "Relu", "Conv"]
    assert list(_arrays(tmp_path / "net.onnx")) == list(_arrays(tmp_path / "b.onnx"))


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_without_the_net_the_arithmetic_stays(tmp_path: Path, exporter: str) -> None:
    """A plain export keeps dozens of nodes, so the tests here test something."""
    model = stack(MixinConv, *_REAL).eval()
    bare_export(model, (_picture(64),), tmp_path / "b.onnx", exporter)
    assert len(_operators(tmp_path / "b.onnx")) >= 35


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("layer", _LAYERS)
@pytest.mark.parametrize("exporter", EXPORTERS)
def test_model_is_as_before(
    tmp_path: Path, exporter: str, layer: type[nn.Conv2d], training: bool
) -> None:
    """Mode, parameters and buffers are the same objects and bits after folding."""
    model = stack(layer, *_SMALL).train(training)
    before = fingerprint(model)
    _export(model, _picture(4), tmp_path / "net.onnx", exporter)
    assert_as_before(before, model)


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_value_is_the_one_of_an_eval_forward(tmp_path: Path, exporter: str) -> None:
    """The initializer holds the weight of an eval forward, to rounding."""
    model = stack(MixinConv, *_REAL).train()
    model(_picture(64))
    _export(model, _picture(64), tmp_path / "net.onnx", exporter)
    wanted = model.eval()[0].W_().detach()
    found = torch.from_numpy(_arrays(tmp_path / "net.onnx")["0.weight"].copy())
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_report_and_warning_say_what_was_folded(tmp_path: Path, exporter: str) -> None:
    """Name, module, sources, operators and number of nodes are told, in the JSON too."""
    with pytest.warns(ReparametrizationNotRecognisedWarning) as caught:
        report = export_onnx(
            stack(MixinConv, *_REAL), (_picture(64),), tmp_path / "net.onnx", exporter=exporter
        )
    (told,) = [w for w in caught if w.category is ReparametrizationNotRecognisedWarning]
    message = str(told.message)
    assert "'0.weight', '2.weight'" in message and "register_spectral_norm" in message
    assert told.filename == __file__
    first, second = report.folded
    assert (first.name, first.module, first.shape) == ("0.weight", "0", (256, 64, 3, 3))
    assert (second.name, second.module) == ("2.weight", "2")
    assert set(first.sources) == {"0.weight", "0.u0"}
    assert {"MatMul", "Div"} <= set(first.op_types) and first.nodes == 16
    assert first.is_weight
    entry = json.loads(report.to_json())["folded"][0]
    assert (entry["name"], entry["nodes"]) == ("0.weight", 16)


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_proof_stands_for_the_published_file(tmp_path: Path, exporter: str) -> None:
    """The published file passes the full check and a comparison of its own."""
    model = stack(IteratingConv, *_REAL).eval()
    path = tmp_path / "net.onnx"
    assert _export(model, _picture(64), path, exporter).parity.passed
    onnx.checker.check_model(str(path), full_check=True)
    assert check_parity(model, path, [_picture(64)]).passed


@pytest.mark.parametrize("wide", [8, 128])
@pytest.mark.parametrize("rows", [(2,), (2, 3)], ids=["2d", "3d"])
@pytest.mark.parametrize("exporter", EXPORTERS)
def test_names_come_from_the_raw_tensor(
    tmp_path: Path, exporter: str, rows: tuple[int, ...], wide: int
) -> None:
    """A weight of another name keeps it; the transposition goes with the arithmetic."""
    model = nn.Sequential(InlineLinear(wide, wide))
    with torch.no_grad():
        model[0].offset.normal_()
    path = tmp_path / "net.onnx"
    report = _export(model, torch.randn(*rows, wide), path, exporter)
    assert [entry.name for entry in report.folded] == ["0.kernel"]
    assert list(_arrays(path)) == ["0.kernel", "0.offset"]
    assert "Transpose" not in _operators(path)


@pytest.mark.parametrize("channels", [4, 64])
@pytest.mark.parametrize("exporter", EXPORTERS)
def test_tied_weights_are_stored_once(tmp_path: Path, exporter: str, channels: int) -> None:
    """A weight used in three places is one initializer, named after the module that holds it."""
    path = tmp_path / "net.onnx"
    report = _export(Tied(channels), _picture(channels), path, exporter)
    arrays = _arrays(path)
    assert list(arrays) == ["conv.weight", "conv.bias"]
    assert {entry.module for entry in report.folded} == {"conv"}


class _Wrapper(nn.Module):
    """The SAGAN lineage: the layer's weight is moved to ``weight_bar``, and set at each call."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        weight = module._parameters.pop("weight")
        module.register_parameter("weight_bar", weight)
        module.register_buffer("weight_u", F.normalize(torch.randn(weight.shape[0]), dim=0))

    def forward(self, x: Tensor) -> Tensor:
        raw = self.module.weight_bar
        matrix = raw.reshape(raw.shape[0], -1)
        v = F.normalize(self.module.weight_u @ matrix, dim=0)
        self.module.weight = raw / (self.module.weight_u @ (matrix @ v))
        y: Tensor = self.module(x)
        return y


@pytest.mark.parametrize("size", [_SMALL, _REAL], ids=["small", "real"])
@pytest.mark.parametrize("exporter", EXPORTERS)
def test_wrapped_layer_has_the_plain_name(
    tmp_path: Path, exporter: str, size: tuple[int, int]
) -> None:
    """``weight_bar`` becomes ``weight``; the raw tensor and u are no initializers."""
    model = nn.Sequential(_Wrapper(nn.Conv2d(*size, 3)), nn.ReLU())
    path = tmp_path / "net.onnx"
    report = _export(model, _picture(size[0]), path, exporter)
    assert set(_arrays(path)) == {"0.module.weight", "0.module.bias"}
    assert report.folded[0].module == "0.module"


@pytest.mark.parametrize("size", [_SMALL, _REAL], ids=["small", "real"])
@pytest.mark.parametrize("exporter", EXPORTERS)
def test_weights_that_depend_on_the_input_stay(
    tmp_path: Path, exporter: str, size: tuple[int, int]
) -> None:
    """Demodulation is not folded: the file is byte for byte the exporter's own."""
    model = stack(DemodulatedConv, *size).eval()
    x = _picture(size[0])
    report = export_onnx(model, (x,), tmp_path / "net.onnx", exporter=exporter)
    bare_export(model, (x,), tmp_path / "b.onnx", exporter)
    assert report.folded == ()
    assert _operators(tmp_path / "net.onnx") == _operators(tmp_path / "b.onnx")
    assert {"ReduceSum", "Mul"} <= set(_operators(tmp_path / "net.onnx"))


def _batch_norm() -> nn.Sequential:
    norm = nn.BatchNorm2d(4)
    with torch.no_grad():
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    return nn.Sequential(nn.Conv2d(4, 4, 3), norm, nn.ReLU())


class _Token(nn.Module):
    """A class token and positions, as vision transformers have them."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.positions = nn.Parameter(torch.randn(1, 4, 8))
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.positions
        y: Tensor = self.head(x)
        return y


class _Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(128, 128, bidirectional=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.lstm(x)[0]
        return y


_PLAIN = {
    "batch norm": (_batch_norm, (2, 4, 5, 5)),
    "token": (_Token, (2, 3, 8)),
    "lstm": (_Recurrent, (3, 1, 128)),
    "linear": (lambda: nn.Linear(128, 128), (2, 3, 128)),
    "spectral norm": (lambda: small_net("plain"), (2, 1, 8, 8)),
}


@pytest.mark.parametrize("name", _PLAIN)
@pytest.mark.parametrize("exporter", EXPORTERS)
def test_plain_networks_are_not_touched(tmp_path: Path, exporter: str, name: str) -> None:
    """Nothing is folded, renamed or warned of where the exporter merely moves values."""
    build, shape = _PLAIN[name]
    model, x = build().eval(), torch.randn(shape)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ReparametrizationNotRecognisedWarning)
        report = export_onnx(model, (x,), tmp_path / "net.onnx", exporter=exporter)
    bare_export(model, (x,), tmp_path / "b.onnx", exporter)
    assert report.folded == ()
    ours, bare = _graph(tmp_path / "net.onnx"), _graph(tmp_path / "b.onnx")
    # Inputs and outputs alone are named otherwise, as without the net.
    outputs = {o.name: b.name for o, b in zip(ours.output, bare.output, strict=True)}
    assert [(n.op_type, [outputs.get(o, o) for o in n.output]) for n in ours.node] == [
        (n.op_type, list(n.output)) for n in bare.node
    ]
    assert [(i.name, i.raw_data) for i in ours.initializer] == [
        (i.name, i.raw_data) for i in bare.initializer
    ]


def test_warning_as_an_error_publishes_nothing(tmp_path: Path) -> None:
    """Whoever turns the warning into an error has no file, and the model as before."""
    model = stack(MixinConv, *_SMALL)
    before = fingerprint(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ReparametrizationNotRecognisedWarning)
        with pytest.raises(ReparametrizationNotRecognisedWarning):
            export_onnx(model, (_picture(4),), tmp_path / "net.onnx")
    assert list(tmp_path.iterdir()) == []
    assert_as_before(before, model)


def test_external_data_holds_the_folded_weight(tmp_path: Path) -> None:
    """The folded weight goes to the side file, and the raw one does not."""
    model = nn.Sequential(MixinConv(64, 256, 3))
    path = tmp_path / "net.onnx"
    with pytest.warns(ReparametrizationNotRecognisedWarning):
        export_onnx(model, (_picture(64),), path, external_data=True)
    size = (tmp_path / "net.onnx.data").stat().st_size
    weight = 4 * 256 * 64 * 9
    assert weight <= size < weight + 65536 + 4 * 256 * 2


@pytest.mark.parametrize("exporter", EXPORTERS)
@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm])
def test_a_known_reparametrization_is_left_on_request(
    tmp_path: Path, exporter: str, norm: Callable[[nn.Module], nn.Module]
) -> None:
    """Weight norm is frozen, or left and told how to be frozen; no adapter is advised."""
    model = nn.Sequential(
        norm(nn.Linear(3, 4)), norm(nn.Linear(4, 4)), spectral_norm(nn.Linear(4, 2))
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)  # fresh weight norm gives the raw weight
    for _ in range(20):
        model(rows())
    with pytest.warns(ReparametrizationNotRecognisedWarning) as caught:
        export_onnx(
            model, (rows(),), tmp_path / "net.onnx", exporter=exporter, freeze="spectral_norm"
        )
    (text,) = (str(w.message) for w in caught if "reparametrization" in str(w.message))
    assert "'0.weight'" in text and "'1.weight'" in text and "freeze='all'" in text
    assert "' are under a reparametrization" in text
    assert "register_spectral_norm" not in text and caught[0].filename == __file__
    export_onnx(model, (rows(),), tmp_path / "all.onnx", exporter=exporter)


class Twice(nn.Module):
    """One layer under weight norm, called on two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.utils.weight_norm(nn.Conv1d(40, 40, 3))
        nn.init.ones_(self.conv.weight_g)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x) + self.conv(-x)
        return y


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_a_layer_that_is_called_twice_is_folded_once(tmp_path: Path, exporter: str) -> None:
    """Where the exporter folds its weight at every call, the file has it once, and so the lists."""
    model, path = Twice(), tmp_path / "net.onnx"
    with pytest.warns(ReparametrizationNotRecognisedWarning) as caught:
        report = export_onnx(
            model, (torch.randn(1, 40, 9),), path, exporter=exporter, freeze="spectral_norm"
        )
    assert [entry.name for entry in report.folded] == ["conv.weight"]
    assert not any("register_spectral_norm" in str(warning.message) for warning in caught)
    names = [entry.name for entry in onnx.load(path).graph.initializer]
    assert sorted(names) == ["conv.bias", "conv.weight"]


class Scaled(nn.Module):
    """Scales its weight and its bias, as a layer with equalised learning rate (StyleGAN)."""

    def __init__(self, is_conv: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 4, 1) if is_conv else torch.randn(6, 4))
        self.bias = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        apply = F.linear if self.weight.ndim == 2 else F.conv1d
        x = x if self.weight.ndim == 2 else x[..., None]
        return apply(x, self.weight * 0.1, self.bias * 0.1)


@pytest.mark.parametrize("is_conv", [False, True])
@pytest.mark.parametrize("exporter", EXPORTERS)
def test_a_weight_beside_a_computed_bias_is_named(
    tmp_path: Path, exporter: str, is_conv: bool
) -> None:
    """The bias is renamed, too; that is no batch norm, which the exporter would have fused."""
    model = nn.Sequential(Scaled(is_conv))
    report = _export(model, rows(4), tmp_path / "net.onnx", exporter)
    assert [folded.name for folded in report.folded if folded.is_weight] == ["0.weight"]
    assert "0.weight" in _arrays(tmp_path / "net.onnx")


class Reader(nn.Module):
    """Scales the weights of its children and reads them in their place; one of them transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.layer = nn.Embedding(5, 4), nn.Linear(4, 5)
        self.other = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(x, self.layer.weight * 0.1) + self.other(x)
        return x @ (self.embedding.weight * 4**-0.5)


@pytest.mark.parametrize("path", ["", "0."])
@pytest.mark.parametrize("exporter", EXPORTERS)
def test_a_weight_that_another_module_scales_is_named(
    tmp_path: Path, exporter: str, path: str
) -> None:
    """It is found by its elements, though the module that reads it holds no weight at all."""
    model = nn.Sequential(Reader()) if path else Reader()
    report = _export(model, rows(4), tmp_path / "net.onnx", exporter)
    wanted = {f"{path}layer.weight", f"{path}embedding.weight"}
    assert {folded.name for folded in report.folded} == wanted
    assert wanted <= set(_arrays(tmp_path / "net.onnx"))


class Raised(nn.Module):
    """A linear layer with a power of a weight that others may raise to another one."""

    def __init__(self, weight: nn.Parameter, exponent: float) -> None:
        super().__init__()
        self.weight, self.exponent = weight, exponent

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.abs() ** self.exponent)


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_each_result_of_a_tied_weight_is_named_plainly(tmp_path: Path, exporter: str) -> None:
    """The raw weight is in the way of no name, since nothing reads it in the end."""
    tied = nn.Parameter(torch.rand(4, 4))
    model = nn.Sequential(Raised(tied, 0.5), Raised(tied, 0.25))
    report = _export(model, rows(4), tmp_path / "net.onnx", exporter)
    assert [folded.name for folded in report.folded] == ["0.weight", "1.weight"]


class Product(nn.Module):
    """The product of two weights under spectral norm is the weight in use."""

    def __init__(self) -> None:
        super().__init__()
        norm = nn.utils.parametrizations.spectral_norm
        self.first, self.second = norm(nn.Linear(3, 4)), norm(nn.Linear(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.second.weight @ self.first.weight)


def test_a_product_of_frozen_weights_is_not_said_to_be_left(tmp_path: Path) -> None:
    """Neither freeze='all' nor an adapter is advised where all is frozen and then computed with."""
    with pytest.warns(ReparametrizationNotRecognisedWarning, match="from the frozen") as caught:
        report = export_onnx(Product(), (rows(),), tmp_path / "net.onnx")
    assert len(report.frozen) == 2 and len(report.folded) == 1
    text = " ".join(str(warning.message) for warning in caught)
    assert "freeze='all'" not in text and "register_spectral_norm" not in text
