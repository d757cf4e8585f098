"""Models in wrappers, and what torch offers beside torch.onnx.export, inside the block."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from export_models import EXPORTERS, KINDS, assert_as_before, images, small_net
from fingerprint import fingerprint
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from sn_export import check_parity, export_onnx, frozen_spectral_norm
from sn_export.running import unwrap_model

PLAIN = ["0.weight", "0.bias", "4.weight", "4.bias"]


def eval_outputs(model: nn.Module, x: Tensor) -> Tensor:
    """What the model says in eval mode, told by a copy that no power iteration reaches."""
    with torch.no_grad():
        result: Tensor = copy.deepcopy(model).eval()(x)
    return result


def initializers(path: Path) -> set[str]:
    return {entry.name for entry in onnx.load(path).graph.initializer}


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


def _wrapped(name: str, model: nn.Module) -> Any:
    if name == "compile":
        return torch.compile(model, backend="eager")
    if name == "compile in data parallel":
        return DataParallel(torch.compile(model, backend="eager"))  # type: ignore[arg-type]
    if name == "distributed":
        # torch broadcasts buffers on each forward, and fails where the block has left none.
        sends = "broadcast_buffers" if torch.__version__ < "2.13" else "forward_sync_buffers"
        return DistributedDataParallel(model, **{sends: False})  # type: ignore[arg-type]
    return DataParallel(model)


WRAPPERS = ("compile", "data parallel", "compile in data parallel", "distributed")


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("exporter", EXPORTERS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("process_group")
def test_wrapped_model(tmp_path: Path, kind: str, exporter: str, wrapper: str) -> None:
    """The network inside is exported under its plain names, and all is as it was."""
    model = small_net(kind)
    around = _wrapped(wrapper, model)
    assert unwrap_model(around) is model
    before = fingerprint(model)
    path = tmp_path / "net.onnx"
    report = export_onnx(around, images(), path, exporter=exporter, samples=1)
    assert_as_before(before, model)
    assert [info.name for info in report.frozen] == ["0.weight", "4.weight"]
    assert initializers(path) >= {"0.weight", "4.weight"}
    assert check_parity(around, path, images()).passed
    assert_as_before(before, model)


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("process_group")
def test_block_on_a_wrapper(kind: str, wrapper: str) -> None:
    """The block freezes what is inside; called through the wrapper it says the same."""
    model = small_net(kind).eval()
    expected = eval_outputs(model, images())
    around = _wrapped(wrapper, model)
    before = fingerprint(model)
    with frozen_spectral_norm(around), torch.no_grad():
        assert list(model.state_dict()) == PLAIN
        assert torch.equal(around(images()), expected)
    assert_as_before(before, model)
    with torch.no_grad():
        assert torch.equal(around(images()), expected)


def _compiled(how: str, model: nn.Sequential) -> Any:
    if how == "whole":
        return torch.compile(model, backend="eager")
    if how == "in place":
        model.compile(backend="eager")
    elif how == "a submodule":
        model[0] = torch.compile(model[0], backend="eager")  # type: ignore[assignment]
    else:
        model[0].compile(backend="eager")
    return model


@pytest.mark.parametrize("how", ["whole", "in place", "a submodule", "a submodule in place"])
@pytest.mark.parametrize("exporter", EXPORTERS)
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_compiled_anew(tmp_path: Path, kind: str, exporter: str, how: str) -> None:
    """An export compiles nothing, and the code compiled before is used again afterwards."""
    torch._dynamo.reset()
    model = small_net(kind).eval()
    compiled = _compiled(how, model)
    with torch.no_grad():
        expected = compiled(images())
    counters.clear()
    export_onnx(compiled, images(), tmp_path / "net.onnx", exporter=exporter, samples=1)
    with torch.no_grad():
        assert torch.equal(compiled(images()), expected)
    assert not counters["frames"], "something was compiled"


@pytest.mark.parametrize("multi_avg_fn", [None, get_ema_multi_avg_fn(0.5)], ids=["mean", "EMA"])
@pytest.mark.parametrize("exporter", EXPORTERS)
@pytest.mark.parametrize("kind", KINDS)
def test_averaged_model(tmp_path: Path, kind: str, exporter: str, multi_avg_fn: Any) -> None:
    """The averaged network is the one exported; it and the one in training stay as they are."""
    model = small_net(kind)
    averaged = AveragedModel(model, multi_avg_fn=multi_avg_fn, use_buffers=True)
    for _ in range(3):
        with torch.no_grad():
            model(images())
            for parameter in model.parameters():
                parameter.add_(0.01)
        averaged.update_parameters(model)
    before = fingerprint(averaged, model)
    path = tmp_path / "net.onnx"
    report = export_onnx(averaged, images(), path, exporter=exporter)
    assert_as_before(before, averaged, model)
    assert [info.name for info in report.frozen] == ["module.0.weight", "module.4.weight"]
    assert not check_parity(model, path, images()).passed


class Lightning(nn.Module):
    """As much of a LightningModule as an export meets: an example, and ``to_onnx``."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.critic = small_net(kind)
        self.example_input_array = images()
        self._trainer = object()

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.critic(x)
        return result

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        return self(batch).mean()

    @torch.no_grad()
    def to_onnx(self, path: Path, **options: Any) -> None:
        mode = self.training
        self.eval()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(self, (self.example_input_array,), path, **options)
        self.train(mode)


@pytest.mark.parametrize("kind", KINDS)
def test_lightning_module(tmp_path: Path, kind: str) -> None:
    """``to_onnx`` inside the block writes the plain network; so does export_onnx."""
    model = Lightning(kind)
    with frozen_spectral_norm(model):
        model.to_onnx(tmp_path / "its.onnx", dynamo=True, verbose=False)
    assert check_parity(model, tmp_path / "its.onnx", images()).passed
    before = fingerprint(model)
    export_onnx(model, images(), tmp_path / "ours.onnx")
    assert_as_before(before, model)
    assert initializers(tmp_path / "its.onnx") == initializers(tmp_path / "ours.onnx")


@pytest.mark.parametrize("kind", KINDS)
def test_torch_export(kind: str) -> None:
    """`torch.export.export` inside the block gives a program without spectral norm."""
    model = small_net(kind).eval()
    expected, before = eval_outputs(model, images()), list(model.state_dict(keep_vars=True).items())
    with frozen_spectral_norm(model):
        program = torch.export.export(model, (images(),))
    # torch itself puts equal copies of attributes in their places, which export_onnx takes back.
    after = model.state_dict(keep_vars=True)
    assert [(name, id(t)) for name, t in before] == [(name, id(t)) for name, t in after.items()]
    assert sorted(program.state_dict) == sorted(PLAIN)
    with torch.no_grad():
        assert torch.equal(program.module()(images()), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_jit_trace(kind: str) -> None:
    """`torch.jit.trace` inside the block gives a module that lives on after it."""
    model = small_net(kind).eval()
    expected, before = eval_outputs(model, images()), fingerprint(model)
    with frozen_spectral_norm(model):
        traced = torch.jit.trace(model, images())
    assert_as_before(before, model)
    assert list(traced.state_dict()) == PLAIN
    with torch.no_grad():
        assert torch.equal(traced(images()), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_functional_call(kind: str) -> None:
    """`torch.func.functional_call` inside the block takes a state dict of plain names."""
    model = small_net(kind).eval()
    expected, before = eval_outputs(model, images()), fingerprint(model)
    with frozen_spectral_norm(model), torch.no_grad():
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        assert torch.equal(torch.func.functional_call(model, state, images()), expected)
        state["4.bias"] = state["4.bias"] + 1
        changed = torch.func.functional_call(model, state, images())
        torch.testing.assert_close(changed, expected + 1)
    assert_as_before(before, model)
