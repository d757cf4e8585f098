"""Weights of a large model are kept in a file while it is exported, and nobody can tell.

`Spill` is called inside: nothing outside says where a weight lies.
"""

from __future__ import annotations

import copy
import tempfile
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from export_models import APPLY, EXPORTERS, KINDS, assert_as_before, contents_of, images, small_net
from fingerprint import fingerprint
from golden_graphs import NETWORKS
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sn_export import export_onnx
from sn_export.exporting import references
from sn_export.exporting.references import Spill
from sn_export.freezing import freeze_into
from sn_export.running import InputSet, preserved, run_reference, tensor_memory

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.complex64, torch.int8)


@pytest.fixture(autouse=True)
def _everything_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_memory, "LARGE", 0)
    monkeypatch.setattr(references, "_SMALLEST", 1)


def _spill(folder: Path) -> Spill:
    return Spill(nn.Linear(1, 1), folder)


@pytest.mark.parametrize("exporter", EXPORTERS)
@pytest.mark.parametrize("network", NETWORKS)
def test_the_file_is_the_same(
    tmp_path: Path, network: str, exporter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its weights spilled a network gives the same bytes, and is left as it was."""
    build, inputs = NETWORKS[network]
    model, args = build(), inputs()
    for name in ("spilled", "held"):
        (tmp_path / name).mkdir()
    before = fingerprint(model)
    export_onnx(model, args, tmp_path / "spilled" / "net.onnx", exporter=exporter)
    assert_as_before(before, model)
    monkeypatch.setattr(tensor_memory, "LARGE", 2**29)
    export_onnx(model, args, tmp_path / "held" / "net.onnx", exporter=exporter)
    spilled, held = contents_of(tmp_path / "spilled"), contents_of(tmp_path / "held")
    assert list(spilled) == ["net.onnx"]
    assert spilled == held


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_survive(tmp_path: Path, dtype: torch.dtype) -> None:
    """Weights of any dtype, shape and order of memory come back bit for bit."""
    values = [
        torch.randn(3, 5).to(dtype),
        torch.randn(7).to(dtype),
        torch.randn(2, 3, 4).to(dtype).transpose(0, 2),
        torch.tensor(1.5).to(dtype),
    ]
    kept = _spill(tmp_path).keep(value for value in values)
    for value, tensor in zip(values, kept, strict=True):
        assert tensor.dtype == dtype and tensor.stride() == value.stride()
        assert torch.equal(tensor, value)
    in_memory = [tensor is value for value, tensor in zip(values, kept, strict=True)]
    assert in_memory == [False, False, True, False]  # the transposed one stays where it is
    assert contents_of(tmp_path) == {}


def test_small_weights_and_small_models_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No file is made for a small model, and none for a large one's small weights."""
    value = torch.ones(4)
    monkeypatch.setattr(references, "_SMALLEST", 17)
    assert _spill(tmp_path).keep([value])[0] is value
    monkeypatch.setattr(references, "_SMALLEST", 1)
    monkeypatch.setattr(tensor_memory, "LARGE", 8)  # the bytes of the model
    assert _spill(tmp_path).keep([value])[0] is value


def test_one_weight_at_a_time(tmp_path: Path) -> None:
    """When the next weight is made, the one before is gone from memory."""
    earlier: list[weakref.ref[Tensor]] = []

    def values() -> Iterator[Tensor]:
        for number in range(3):
            assert all(reference() is None for reference in earlier)
            value = torch.full((4,), float(number))
            earlier.append(weakref.ref(value))
            yield value
            del value

    kept = _spill(tmp_path).keep(values())
    assert [float(tensor[0]) for tensor in kept] == [0, 1, 2]


def test_released_weights_are_read_again(tmp_path: Path) -> None:
    """After `release` the weights have the bits that were kept, and are still in place."""
    kept_by = _spill(tmp_path)
    kept_by.release()  # nothing yet
    tensor = kept_by.keep([torch.arange(5000.0)])[0]
    address = tensor.data_ptr()
    kept_by.release()
    assert torch.equal(tensor, torch.arange(5000.0))
    assert tensor.data_ptr() == address


def test_writes_stay_with_the_writer(tmp_path: Path) -> None:
    """A weight can be written like any other, and its neighbours do not change."""
    first, second = _spill(tmp_path).keep([torch.ones(10), torch.ones(10)])
    first.zero_()
    assert not first.any() and second.all()


def _fail(error: type[Exception]) -> Callable[..., NoReturn]:
    def fail(*args: object, **options: object) -> NoReturn:
        raise error("not here")

    return fail


@pytest.mark.parametrize(
    ("holder", "name", "error"),
    [(tempfile, "NamedTemporaryFile", PermissionError), (torch, "from_file", RuntimeError)],
    ids=["takes no file", "maps nothing"],
)
def test_a_folder_that(
    tmp_path: Path, holder: Any, name: str, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no file can be made or mapped, the weights stay in memory and the export succeeds."""
    monkeypatch.setattr(holder, name, _fail(error))
    value = torch.ones(3)
    assert _spill(tmp_path).keep([value])[0] is value
    assert export_onnx(small_net("hook"), (images(),), tmp_path / "net.onnx").parity.passed


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has a disk that is always full")
def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the disk has no room for stays in memory."""

    def full(*args: object, **options: object) -> Any:
        return open("/dev/full", "wb", buffering=0)

    monkeypatch.setattr(tempfile, "NamedTemporaryFile", full)
    value = torch.ones(3)
    assert _spill(tmp_path).keep([value])[0] is value


class Calls(nn.Module):
    """Calls a function and hands on its input."""

    def __init__(self, function: Callable[[], None]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        self.function()
        return x


def test_weights_of_hooks_are_dropped_once_used() -> None:
    """In a large model's reference each layer loses its computed weight when it has run."""
    layers = [APPLY["hook"](nn.Linear(3, 3)) for _ in range(2)]
    seen: list[list[bool]] = []

    def note() -> None:
        seen.append(["weight" in vars(layer) for layer in layers])

    model = nn.Sequential(layers[0], Calls(note), layers[1], Calls(note))
    given = InputSet((torch.randn(2, 3),), {}, "the example input")
    before = fingerprint(model)
    with preserved(model) as state:
        run_reference(model, state, given)
        run_reference(model, state, given)
    assert_as_before(before, model)
    assert seen == [[False, True], [False, False]] * 2


class ReadsLater(nn.Module):
    """Uses the weight of a layer after the layer has run, as tied embeddings do."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.layer = APPLY[kind](nn.Linear(3, 3))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = nn.functional.linear(torch.relu(self.layer(x)), self.layer.weight)
        return out


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_that_is_read_later(tmp_path: Path, kind: str) -> None:
    """Where the forward needs the weight once more, the reference is that of the model."""
    model, x = ReadsLater(kind), torch.randn(2, 3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # the weight of the last forward is old
        wanted = copy.deepcopy(model).eval()(x)
    before = fingerprint(model)
    with preserved(model) as state:
        found = run_reference(model, state, InputSet((x,), {}, "the example input"))
    assert torch.equal(found.outputs[0], wanted)
    assert export_onnx(model, (x,), tmp_path / "net.onnx", exporter="dynamo").parity.passed
    assert_as_before(before, model)


def test_a_random_parametrization_is_asked_once(tmp_path: Path) -> None:
    """A value that is drawn at random is the same wherever it is kept."""

    class Noisy(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight + torch.randn_like(weight)

    model = nn.Linear(3, 3)
    parametrize.register_parametrization(model, "weight", Noisy())
    kept_by = _spill(tmp_path)
    with freeze_into(model, None, kept_by.keep) as plain:
        first = plain.weight.clone()
        kept_by.release()
        assert torch.equal(plain.weight, first)
