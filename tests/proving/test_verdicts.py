"""A verdict knows the model's own rounding: right files are proved, wrong ones are not.

`InFloat64` is used inside, to hold what no verdict shows: that it is the same function.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from computed_networks import IteratingConv
from export_models import EXPORTERS, assert_as_before, product_in_float16
from fingerprint import fingerprint
from fresh_networks import Norm, Recurrent, generator
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.nn.utils.spectral_norm import spectral_norm as hooked_spectral_norm

from sn_export import (
    ParityError,
    PrecisionLostWarning,
    SpectralNormNotConvergedWarning,
    check_case,
    check_parity,
    export_onnx,
)
from sn_export.proving.precision import InFloat64
from sn_export.running import InputSet, draw_random_sets

lstm = partial(Recurrent, nn.LSTM, hooked_spectral_norm)


def latent() -> Tensor:
    """Return the input of `generator`."""
    return torch.randn(2, 16, 1, 1)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "generator": (partial(generator, hooked_spectral_norm), latent),
    "lstm": (lstm, lambda: torch.randn(2, 7, 16)),
    # Onnxruntime's tanh is less exact in it, and few gates decide: the hardest of 20 seeds.
    "gru": (partial(Recurrent, nn.GRU, hooked_spectral_norm), lambda: torch.randn(2, 7, 16)),
}


def changed(path: Path, name: str, change: Callable[[Any], Any]) -> Path:
    """Write a copy of a file with another value for one initializer, and return its path."""
    file = onnx.load(path)
    entry = next(i for i in file.graph.initializer if i.name == name)
    array = change(numpy_helper.to_array(entry).copy())
    entry.CopyFrom(numpy_helper.from_array(np.asarray(array, np.float32), name))
    target = path.with_name("changed.onnx")
    onnx.save(file, target)
    return target


def sets_of(x: Tensor) -> list[InputSet]:
    """Return the input sets of a proof of three samples."""
    example = InputSet((x,), label="the example input")
    return [example, *draw_random_sets(example, 3)]


@pytest.mark.parametrize("exporter", EXPORTERS)
@pytest.mark.parametrize("kind", NETWORKS)
def test_fresh_networks_are_proved(tmp_path: Path, kind: str, exporter: Any) -> None:
    """A fresh network is exported, replayed and told; ``scripts/test --fresh`` has 20 seeds."""
    build, draw = NETWORKS[kind]
    seeds = range(8) if exporter == "torchscript" else (1, 2, 4)
    seeds = (9, 14) if kind == "gru" else seeds
    asked = 0
    for seed in seeds:
        torch.manual_seed(seed)
        model, x = build(), draw()
        path, case = tmp_path / f"{seed}.onnx", tmp_path / f"{seed}.npz"
        before = fingerprint(model)
        with pytest.warns(SpectralNormNotConvergedWarning, match=r"stored .*, true .*: run some"):
            report = export_onnx(model, (x,), path, exporter=exporter, save_case=case)
        assert_as_before(before, model)
        (output,) = report.parity.outputs
        assert output.passed and not output.reason and output.verdict
        assert "load a trained checkpoint" in report.parity.notes[0]
        if output.fraction_outside:
            asked += 1
            assert output.rounding is not None and output.rounding.ratio <= 4
            assert "from the network in float64 the file is" in output.verdict
        assert check_case(path, case).passed
        checked = check_parity(model, path, sets_of(x))
        assert checked.passed and checked.notes == report.parity.notes[:1]
    assert asked  # a tolerance alone refuses some of them


@pytest.mark.parametrize("fault", ["scaled", "one weight", "swapped", "no bias", "float16"])
@pytest.mark.parametrize("seed", [0, 3])
def test_wrong_files_of_fresh_networks_are_refused(tmp_path: Path, seed: int, fault: str) -> None:
    """A weight that is off, a swapped channel, a lost bias or a rounded weight is refused."""
    torch.manual_seed(seed)
    model, x = lstm(), torch.randn(2, 7, 16)
    path = tmp_path / "net.onnx"
    export_onnx(model, (x,), path, exporter="torchscript")

    def one(weight: Any) -> Any:
        weight.flat[np.abs(weight).argmax()] *= 1.01
        return weight

    name, change = {
        "scaled": ("head.weight", lambda w: w * 1.01),
        "one weight": ("head.weight", one),
        "swapped": ("head.weight", lambda w: w[[1, 0, 2, 3]]),
        "no bias": ("head.bias", lambda b: b * 0),
        "float16": ("head.weight", lambda w: w.astype(np.float16)),
    }[fault]
    report = check_parity(model, changed(path, name, change), sets_of(x))
    (output,) = report.outputs
    assert not output.passed and output.rounding is not None
    assert output.rounding.ratio > 4
    assert "times as far as that" in output.reason and output.verdict == output.reason


def test_wrong_weights_before_a_saturated_output_are_refused(tmp_path: Path) -> None:
    """Nearly all elements are -1 or 1 whatever the weights are, and the few others tell."""
    torch.manual_seed(4)
    model, x = generator(hooked_spectral_norm), latent()
    path = tmp_path / "net.onnx"
    export_onnx(model, (x,), path, exporter="torchscript")
    report = check_parity(model, changed(path, "6.weight", lambda w: w * 1.01), sets_of(x))
    assert not report.passed


@pytest.mark.parametrize("seed", [0, 3])
@pytest.mark.parametrize("norm", [hooked_spectral_norm, spectral_norm])
def test_one_product_in_float16_is_refused(tmp_path: Path, norm: Norm, seed: int) -> None:
    """Fresh or converged, outside the tolerance or within it: it is no rounding of float32."""
    torch.manual_seed(seed)
    model, x = generator(norm), latent()
    path = tmp_path / "net.onnx"
    export_onnx(model, (x,), path, exporter="torchscript")
    file = onnx.load(path)
    product_in_float16(file)
    onnx.save(file, path)
    (output,) = check_parity(model, path, sets_of(x)).outputs
    assert not output.passed and output.rounding is not None and output.rounding.ratio > 4


@pytest.mark.parametrize("option", [{"rtol": 1e-6}, {"atol": 1e-6}])
def test_a_tolerance_that_was_given_is_binding(tmp_path: Path, option: dict[str, float]) -> None:
    """The truth is not asked then, and the file is refused as before."""
    torch.manual_seed(2)
    model, x = lstm(), torch.randn(2, 7, 16)
    with pytest.raises(ParityError) as caught:
        export_onnx(model, (x,), tmp_path / "net.onnx", exporter="torchscript", **option)  # type: ignore[arg-type]
    assert caught.value.report.outputs[0].rounding is None


@pytest.mark.parametrize(("shift", "passed"), [(1e-6, True), (5e-6, False)])
def test_errors_within_tolerance_and_far_above_rounding(
    tmp_path: Path, shift: float, passed: bool
) -> None:
    """A right network's file is refused at ten times its rounding, though within tolerance."""
    model, x = nn.Sequential(spectral_norm(nn.Linear(16, 16)), nn.Tanh()).eval(), torch.randn(4, 16)
    path = tmp_path / "net.onnx"
    export_onnx(model, (x,), path, exporter="torchscript")
    report = check_parity(model, changed(path, "0.bias", lambda b: b + shift), sets_of(x))
    (output,) = report.outputs
    assert output.passed == passed
    if not passed:
        assert output.rounding is not None and output.rounding.ratio > 10
        assert "though within the default tolerance (rtol=0.0001 accepts it)" in output.reason
        assert report.first_divergent == "0"
        assert output.verdict in str(report)


class Expm1(nn.Module):
    """Computes what the exporter writes as a difference."""

    def forward(self, x: Tensor) -> Tensor:
        """Return e^x - 1 of small x."""
        return torch.expm1(x * 4e-3)


def test_precision_that_the_exporter_loses_is_warned_of(tmp_path: Path) -> None:
    """The dynamo exporter's expm1 is within tolerance, and much farther than it need be."""
    with pytest.warns(PrecisionLostWarning, match="rtol=0.0001 as an argument accepts that"):
        export_onnx(Expm1(), (torch.randn(4, 16),), tmp_path / "net.onnx", exporter="dynamo")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        export_onnx(
            Expm1(), (torch.randn(4, 16),), tmp_path / "net.onnx", exporter="dynamo", rtol=1e-4
        )


@pytest.mark.parametrize("scale", [8.5, 0.1])
def test_a_function_that_the_file_writes_with_other_operators(tmp_path: Path, scale: float) -> None:
    """Onnxruntime's log(sigmoid(x)) loses digits that torch keeps: proved, and warned of."""
    x, path = torch.linspace(-1, 1, 64) * scale, tmp_path / "net.onnx"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", PrecisionLostWarning)
        (output,) = export_onnx(nn.LogSigmoid(), (x,), path, exporter="torchscript").parity.outputs
    assert bool(caught) == (scale > 1) and output.passed
    if scale > 1:
        assert output.rounding is not None and output.rounding.ratio > 100
        assert output.rounding.operators_ratio <= 4
        assert "Rounding in the file's own operators accounts for" in output.verdict
        file = onnx.load(path)
        shift = numpy_helper.from_array(np.float32(0.01), "shift")
        file.graph.initializer.append(shift)
        file.graph.node.insert(0, helper.make_node("Add", ["input", "shift"], ["shifted"]))
        file.graph.node[1].input[0] = "shifted"
        onnx.save(file, path)
        assert not check_parity(nn.LogSigmoid(), path, x).passed  # one per cent is no rounding


class Added(nn.Module):
    """LogSigmoid of one input, and another input."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Return their sum."""
        return nn.functional.logsigmoid(a) + b


def test_operators_are_asked_under_the_names_of_the_file(tmp_path: Path) -> None:
    """A file that calls each input as the model calls the other is judged by the right ones."""
    x, names = torch.linspace(-1, 1, 64) * 8.5, ["b", "a"]
    path = tmp_path / "net.onnx"
    with pytest.warns(PrecisionLostWarning):
        report = export_onnx(
            Added(), (x, torch.zeros(64)), path, exporter="torchscript", input_names=names
        )
    rounding = report.parity.outputs[0].rounding
    assert rounding is not None and rounding.ratio > 10 and rounding.operators_ratio <= 4


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_a_file_that_computes_float64_in_float32(tmp_path: Path, exporter: Any) -> None:
    """ONNX has no Celu in float64: what float32 can do is asked of the file, and it is said."""
    model = nn.Sequential(spectral_norm(nn.Linear(8, 8)), nn.CELU()).double()
    report = export_onnx(
        model, (torch.randn(2, 8, dtype=torch.float64),), tmp_path / "net.onnx", exporter=exporter
    )
    (output,) = report.parity.outputs
    assert output.rounding is not None and output.rounding.dtype == "float32"
    assert "(the file computes Celu in float32)" in output.verdict


class Autocast(nn.Module):
    """A network in float32 with a layer in float16."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = spectral_norm(nn.Linear(16, 16))
        self.outer = spectral_norm(nn.Linear(16, 4))

    def forward(self, x: Tensor) -> Tensor:
        """Return scores in float32."""
        with torch.autocast("cpu", torch.float16):
            y = self.inner(x)
        return self.outer(torch.tanh(y.float()))  # type: ignore[no-any-return]


def test_autocast_within_a_float32_network(tmp_path: Path) -> None:
    """Its outputs are held to the coarsest dtype on the way, which the verdict names."""
    report = export_onnx(
        Autocast().eval(), (torch.randn(4, 16),), tmp_path / "net.onnx", exporter="dynamo"
    )
    (output,) = report.parity.outputs
    assert output.rounding is not None
    assert "rounding in float16 accounts for" in output.verdict


class Silenced(nn.Module):
    """Draws noise, of a scale that is 0, before attention in one fused operator."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = hooked_spectral_norm(nn.Linear(8, 8))
        self.register_buffer("scale", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        """Return what is drawn to no effect."""
        y = self.layer(x) + torch.randn_like(x) * self.scale
        return nn.functional.scaled_dot_product_attention(y, y, y)


def test_draws_of_no_effect_leave_a_truth(tmp_path: Path) -> None:
    """Neither noise of scale 0 nor fused attention keeps float64 from telling."""
    model, x, path = Silenced(), torch.randn(2, 1, 5, 8), tmp_path / "net.onnx"
    export_onnx(model, (x,), path, exporter="torchscript", draws="zeros")
    wrong = changed(path, "layer.bias", lambda b: b * 1.0001)
    (output,) = check_parity(model, wrong, x).outputs
    assert not output.passed and output.rounding is not None


class Casting(nn.Module):
    """Casts to float32 and makes tensors of that dtype in its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.register_buffer("steps", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        """Return what is computed in float32 whatever comes in."""
        start = torch.zeros(len(x), 8, dtype=torch.float32)
        scale = torch.linspace(1, 2, 8).float()
        start[:, 0] = 1 / 3
        return (self.layer(x.float()) + start).to(torch.float32) * scale.exp()


def test_float64_reaches_past_the_casts_of_a_forward() -> None:
    """A forward that names its dtype is computed in float64 all the same, up to constants."""
    model, x = Casting(), torch.randn(4, 8)
    with torch.no_grad():
        wanted = model.layer.double()(x.double())
        wanted[:, 0] += 1 / 3
        wanted *= torch.linspace(1, 2, 8).double().exp()
        mode = InFloat64()
        with mode:
            found = model(x.double())
    assert found.dtype == torch.float64 and not mode.obstacle
    assert torch.allclose(found, wanted, rtol=1e-7, atol=0)


class Seeded(nn.Module):
    """Draws the same numbers in every forward, which float64 draws otherwise."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the input with noise that is always the same."""
        torch.manual_seed(0)
        return x + torch.randn(x.shape)


class ByDtype(nn.Module):
    """Does something else in float64."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the input, or its double in double."""
        return x * (2 if x.dtype == torch.float64 else 1)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Seeded(), "the forward draws random numbers"),
        (ByDtype(), "the forward does something else in float64"),
    ],
)
def test_a_float64_run_that_is_no_truth(tmp_path: Path, model: nn.Module, reason: str) -> None:
    """It excuses no file: the plain verdict stands, and says why float64 does not tell."""
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [4, 8])
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, [4, 8])
    half = numpy_helper.from_array(np.float32(1.5), "half")
    node = helper.make_node("Mul", ["x", "half"], ["y"])
    graph = helper.make_graph([node], "wrong", [value], [result], [half])
    path = tmp_path / "wrong.onnx"
    opsets = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)
    report = check_parity(model, path, torch.randn(4, 8))
    assert not report.passed
    assert reason in report.outputs[0].reason


class Twice(nn.Module):
    """Calls a layer twice, whose vectors move on at each call, in eval mode as well."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = IteratingConv(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.conv(x)) + self.conv(x + 1)


class RawReader(nn.Module):
    """Reads the raw weight of a layer beside the one in use, as class activation maps do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = hooked_spectral_norm(nn.Conv2d(3, 3, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) * (1 + 0.01 * next(p.mean() for p in self.conv.parameters()))


@pytest.mark.parametrize("network", [Twice, RawReader])
@pytest.mark.parametrize("exporter", EXPORTERS)
def test_what_freezing_changes_is_no_rounding(
    tmp_path: Path, exporter: str, network: Callable[[], nn.Module]
) -> None:
    """A network that no plain weights make gets no file, though its frozen twin is near float64."""
    torch.manual_seed(0)
    model, x = network(), torch.randn(2, 3, 6, 6)
    model.train()(x)
    with pytest.raises(ParityError, match=r"frozen, the model's own outputs move by up to"):
        export_onnx(model, (x,), tmp_path / "net.onnx", exporter=exporter)
    assert not list(tmp_path.iterdir())


def test_converged_layers_are_not_warned_of(tmp_path: Path) -> None:
    """After some forwards in train mode no layer is named, and no error is left."""
    torch.manual_seed(1)
    model, x = generator(hooked_spectral_norm), latent()
    for _ in range(20):
        model.train()(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error", SpectralNormNotConvergedWarning)
        report = export_onnx(model, (x,), tmp_path / "net.onnx", exporter="torchscript")
    assert report.parity.notes == check_parity(model, tmp_path / "net.onnx", (x,)).notes == ()
    assert report.parity.outputs[0].rounding is None
