"""Methods exported in place of forward, and lazy modules that the export runs first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from export_models import EXPORTERS, KINDS, assert_as_before, input_names, run_file
from fingerprint import fingerprint
from networks import APPLY
from torch import Tensor, nn

from sn_export import (
    ExportError,
    ParityError,
    SnExportError,
    check_case,
    check_parity,
    export_onnx,
)

_X, _Z = torch.randn(2, 4), torch.randn(2, 3)


class Codec(nn.Module):
    """An encoder and a decoder; hooks of its own that only a call of it runs."""

    def __init__(self, kind: str = "parametrization") -> None:
        super().__init__()
        sn = APPLY[kind]
        self.encoder = sn(nn.Linear(4, 3))
        self.decoder = nn.Sequential(sn(nn.Linear(3, 3)), nn.Tanh(), sn(nn.Linear(3, 4)))
        self.gain = nn.Parameter(torch.ones(4))
        self.calls: list[str] = []
        self.register_forward_pre_hook(lambda module, args: (args[0] * 2,))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append("forward")
        out: Tensor = self.decode(self.encoder(x))["sound"]
        return out

    @torch.no_grad()
    def decode(
        self, z: Tensor, scale: float = 2.0, *, skips: list[Tensor] | None = None
    ) -> dict[str, Any]:
        """What follows the encoder."""
        y = self.decoder(z) * self.gain
        return {"sound": y if skips is None else y + skips[0], "loud": y * scale, "note": "fine"}

    def again(self, x: Tensor) -> Tensor:
        """It calls the module itself, with its hooks."""
        out: Tensor = self(x) + 1
        return out

    def decides(self, z: Tensor) -> Tensor:
        """By the values of a tensor."""
        out: Tensor = self.decoder(z) if z.sum() > 0 else z.new_zeros(2, 4)
        return out

    @staticmethod
    def scaled(x: Tensor) -> Tensor:
        """No method of an instance."""
        return x

    @classmethod
    def made(cls) -> Codec:
        """A method of the class."""
        return cls()


def weights(path: Path) -> set[str]:
    """The names of the initializers that the model has."""
    return {entry.name for entry in onnx.load(path).graph.initializer if "." in entry.name}


@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize("exporter", EXPORTERS)
@pytest.mark.parametrize("kind", KINDS)
def test_method(tmp_path: Path, kind: str, exporter: str, by_name: bool) -> None:
    """The file has the method's inputs, outputs and weights; the model is as before."""
    path, case, model = tmp_path / "net.onnx", tmp_path / "net.npz", Codec(kind).train()
    model(_X)
    skips = torch.randn(2, 4)
    before = fingerprint(model)
    report = export_onnx(
        model if by_name else model.decode,
        (_Z,),
        path,
        method="decode" if by_name else None,
        kwargs={"skips": [skips]},
        exporter=exporter,
        dynamic_shapes={"z": {0: "n"}, "skips": [{0: "n"}]},
        save_case=case,
        per_module=True,
    )
    assert_as_before(before, model)
    assert (report.model, report.parity.samples) == ("Codec.decode", 7)
    assert report.parity.divergence is not None
    last = report.parity.divergence.modules[-1]
    assert (last.module, last.type, last.passed) == ("", "Codec.decode", True)
    assert input_names(path) == ["z", "skips_0"]
    assert weights(path) == {f"decoder.{i}.{name}" for i in (0, 2) for name in ("weight", "bias")}
    assert check_case(path, case).passed
    assert check_parity(model, path, {"z": _Z, "skips": [skips]}, method="decode").passed
    assert check_parity(model.decode, path, [{"z": _Z[:1], "skips": [skips[:1]]}]).passed
    assert_as_before(before, model)


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_method_that_calls_the_module(tmp_path: Path, exporter: str) -> None:
    """Hooks of the module run where the method calls it, and nowhere else."""
    path, model = tmp_path / "net.onnx", Codec().eval()
    export_onnx(torch.compile(model).again, (_X,), path, exporter=exporter)
    with torch.no_grad():
        expected = model.again(_X)
    np.testing.assert_allclose(run_file(path, _X)[0], expected, rtol=1e-4, atol=1e-5)
    export_onnx(model.forward, (_X,), path, exporter=exporter)  # as the module itself
    np.testing.assert_allclose(run_file(path, _X)[0], expected - 1, rtol=1e-4, atol=1e-5)
    with pytest.raises((ExportError, ParityError)) as caught:
        export_onnx(model.decides, (_Z.abs(),), path, exporter=exporter, inputs=[-_Z.abs()])
    assert "Codec.decides" in str(caught.value)
    if exporter == "dynamo":
        assert "in 'decides' (Codec)" in str(caught.value)


def test_what_is_no_method(tmp_path: Path) -> None:
    """One error says what was given, and what there is."""
    net, compiled = Codec(), torch.jit.script(nn.Linear(4, 4))
    wrong: list[tuple[Any, Any, str]] = [
        (lambda x: x, None, "model must be a torch.nn.Module, or a method of one .* got function"),
        (Codec.made, None, "got one of Codec"),
        (compiled.forward, None, "got one of ScriptModule"),
        (net.decode, "again", "method='again' goes with a module, and model is the method 'decode"),
        (net, "decoder", "method='decoder' is a module within Codec, not a method: export that"),
        (net, "gain", "method='gain' is no method in Codec; it has again$"),
        (net, "nothing", "method='nothing' is not there in Codec; it has again, decides"),
        (net, 3, "method must be the name of a method, got int"),
        (compiled, "decode", "of a TorchScript module only forward can be exported"),
        (nn.DataParallel(net).gather, None, "'gather' is a method of DataParallel: pass one of"),
    ]
    for model, method, message in wrong:
        with pytest.raises((TypeError, ValueError), match=message):
            export_onnx(model, (_X,), tmp_path / "net.onnx", method=method)
    assert not list(tmp_path.iterdir())


def lazy_net() -> nn.Sequential:
    """Lazy modules beside others that a forward changes."""
    torch.manual_seed(3)
    return nn.Sequential(
        nn.LazyConv2d(4, 3),
        nn.LazyBatchNorm2d(),
        nn.BatchNorm2d(4),
        nn.Flatten(),
        nn.LazyLinear(3),
        nn.Dropout(),
        APPLY["hook"](nn.Linear(3, 2)),
    )


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_lazy_modules(tmp_path: Path, exporter: str) -> None:
    """They are as after an eval-mode forward; all else, and what is drawn next, is as it was."""
    images = torch.randn(2, 1, 8, 8)
    net, twin = lazy_net(), lazy_net().eval()
    with torch.no_grad():
        twin(images)
    drawn_next = torch.randn(3)
    torch.manual_seed(3)
    net = lazy_net()
    export_onnx(net, (images,), tmp_path / "net.onnx", exporter=exporter)
    assert torch.equal(torch.randn(3), drawn_next)
    for one, other in zip(net.modules(), twin.modules(), strict=True):
        assert type(one) is type(other)
        assert one.training
        assert list(one.__dict__) == list(other.__dict__)
    for key, value in twin.state_dict().items():
        assert torch.equal(net.state_dict()[key], value), key


def test_lazy_modules_and_errors(tmp_path: Path) -> None:
    """Options are refused before anything runs; a module that the example leaves out is named."""
    path, net = tmp_path / "net.onnx", lazy_net()
    with pytest.raises(ValueError, match="samples"):
        export_onnx(net, (torch.randn(2, 1, 8, 8),), path, samples=-1)
    assert isinstance(net[0], nn.LazyConv2d)
    with pytest.raises(SnExportError, match=r"fails on the example input.* in '0' \(Conv2d\)"):
        export_onnx(net, (torch.randn(2, 1, 1, 1),), path)
    assert all(module.training for module in net.modules())
    codec = Codec()
    codec.encoder = nn.LazyLinear(3)  # type: ignore[assignment]
    message = "'encoder.weight' has no shape yet, since the example input does not call its lazy"
    with pytest.raises(SnExportError, match=message):
        export_onnx(codec.decode, (_Z,), path)
    assert not list(tmp_path.iterdir())
