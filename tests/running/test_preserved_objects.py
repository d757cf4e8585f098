"""Numpy arrays and plain objects that a forward changes start each run anew, and are put back.

`get_attributes` is called inside: what it passes over leaves no trace outside.
"""

from __future__ import annotations

import enum
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Generic, TypeVar

import numpy as np
import pytest
import torch
from export_models import EXPORTERS, Head, assert_as_before, rows
from fingerprint import fingerprint
from torch import Tensor, nn

from sn_export import SnExportError, export_onnx, frozen_spectral_norm
from sn_export.running import Preserved, preserved
from sn_export.running.plain_objects import get_attributes

T = TypeVar("T")


@dataclass
class Counter(Generic[T]):
    """A plain object, as training code keeps them."""

    calls: int = 0
    log: list[Any] = field(default_factory=list)
    table: dict[str, Any] = field(default_factory=lambda: {"rows": [np.zeros(2)]})
    mean: Tensor = field(default_factory=lambda: torch.zeros(3))
    gone: str = "still here"


def _counts(counter: Counter[Any]) -> tuple[Any, ...]:
    row = counter.table["rows"][0].tolist()
    return counter.calls, list(counter.log), row, counter.mean.tolist(), list(vars(counter))


def _count(counter: Counter[Any]) -> None:
    counter.calls += 1
    counter.log.append(counter.calls)
    counter.table["rows"][0][:] += 1
    counter.mean.add_(1)
    counter.__dict__.pop("gone", None)
    counter.__dict__["new"] = 1


class Held(Head):
    """Counts in an object and an array that ``hold`` puts somewhere; the output tells."""

    def hold(self, counter: Counter[Any], array: Any) -> Any:
        self.counter, self.array = counter, array
        return self

    def held(self) -> tuple[Counter[Any], Any]:
        return self.counter, self.array

    def forward(self, x: Tensor) -> Tensor:
        counter, array = self.held()
        _count(counter)
        array += 1
        y: Tensor = self.layer(x) * counter.calls + float(array[0]) + counter.mean
        return y


class HeldInContainers(Held):
    def hold(self, counter: Counter[Any], array: Any) -> Any:
        self.things = {"deep": [deque([counter])], "arrays": [array, array[:1]]}
        return self

    def held(self) -> tuple[Counter[Any], Any]:
        return self.things["deep"][0][0], self.things["arrays"][0]


HOLDERS = (Held, HeldInContainers)


@pytest.mark.parametrize("holder", HOLDERS)
def test_every_run_is_the_first(holder: type[Held]) -> None:
    """Each run starts from the old attributes, containers and elements, and all are put back."""
    counter, array = Counter[int](), np.zeros(3)
    model = holder().hold(counter, array)
    old, mean, row = _counts(counter), counter.mean, counter.table["rows"][0]
    expected = nn.functional.linear(rows(), *_plain(model)) + 2
    with preserved(model) as state, torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(model(rows()), expected)
            state.reset()
            assert _counts(counter) == old
    assert _counts(counter) == old and array.tolist() == [0, 0, 0]
    assert counter.mean is mean and counter.table["rows"][0] is row
    assert model.held()[0] is counter and model.held()[1] is array


def _plain(model: Head) -> tuple[Tensor, Tensor]:
    with frozen_spectral_norm(model):
        return model.layer.weight.detach().clone(), model.layer.bias.detach().clone()


class CountingHook:
    """A forward hook that is an object."""

    calls = 0

    def __call__(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        self.calls += 1
        return output + self.calls


def test_a_hook_that_counts() -> None:
    """An object that stands among the hooks starts anew too."""
    model, hook = nn.Identity(), CountingHook()
    model.register_forward_hook(hook)
    with preserved(model) as state:
        for _ in range(2):
            assert model(torch.zeros(1)) == 1
            state.reset()
        model(torch.zeros(1))
    assert vars(hook) == {}


@pytest.mark.parametrize("holder", HOLDERS)
@pytest.mark.parametrize("exporter", EXPORTERS)
def test_export_leaves_no_trace(tmp_path: Path, exporter: str, holder: type[Held]) -> None:
    """An export, proved or not, has counted nothing."""
    counter, array = Counter[int](), np.zeros(3)
    model = holder().hold(counter, array)
    before, old = fingerprint(model), _counts(counter)
    try:
        export_onnx(model, rows(), tmp_path / "net.onnx", exporter=exporter)
    except SnExportError:
        assert not list(tmp_path.iterdir())
    assert _counts(counter) == old and array.tolist() == [0, 0, 0]
    assert_as_before(before, model)


def test_a_forward_that_raises_leaves_no_trace() -> None:
    """What was counted until an exception, or an interrupt, is put back."""
    counter, array = Counter[int](), np.zeros(3)
    model = Held().hold(counter, array)
    old = _counts(counter)
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), preserved(model):
            model(rows())
            raise error
        assert _counts(counter) == old and not array.any()


@pytest.mark.parametrize(
    "array",
    [
        np.array([np.nan, -0.0, 1.0]),
        np.arange(12.0).reshape(3, 4)[:, ::2],
        np.array([None, "a", {}], dtype=object),
        np.array([(1, 2.0)], dtype=[("a", "i4"), ("b", "f8")]),
        np.array(3),
    ],
    ids=["NaN", "strided", "objects", "records", "scalar"],
)
def test_arrays_of_any_sort(array: Any) -> None:
    """An array gets its old bytes, or objects, back in place."""
    model = nn.Identity()
    model.array, old = array, array.tobytes()
    with preserved(model) as state:
        for _ in range(2):
            array[...] = np.zeros((), array.dtype)
            assert array.tobytes() != old
            state.reset()
            assert array.tobytes() == old
        array[...] = np.zeros((), array.dtype)
    assert array.tobytes() == old and model.array is array


class Colour(enum.Enum):
    RED = 1


class Worker(threading.Thread):
    pass


class Guarded:
    """Its attributes are not to be asked for."""

    def __getattribute__(self, name: str) -> Any:
        raise AssertionError(name)


class Slotted:
    __slots__ = ("x",)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Colour.RED,
        lambda: Counter,
        lambda: _count,
        lambda: partial(_count),
        lambda: nn.Linear(1, 1),
        lambda: torch.optim.SGD([torch.zeros(1)]),
        lambda: torch.zeros(1),
        lambda: Worker(),
        lambda: threading.Lock(),
        lambda: np.random.default_rng(),
        lambda: Slotted(),
        lambda: ValueError(),
        lambda: 1,
    ],
)
def test_what_is_no_plain_object(make: Callable[[], Any]) -> None:
    """Modules, classes, functions, torch's objects and those of C are not looked into."""
    assert get_attributes(make()) is None


@pytest.mark.parametrize("make", [Counter, SimpleNamespace, Guarded])
def test_plain_objects(make: Callable[[], Any]) -> None:
    """Objects of classes of one's own are, without running their code."""
    thing = make()
    assert get_attributes(thing) is object.__getattribute__(thing, "__dict__")


def test_how_far_objects_are_looked_into() -> None:
    """Objects in plain objects, modules there, and long containers are left alone."""
    outer, inner, network = SimpleNamespace(), SimpleNamespace(), nn.Linear(1, 1)
    outer.inner, outer.network, outer.data = inner, network, [0] * 200_000
    model = nn.Identity()
    model.outer = outer
    remembered = {id(c) for c, _ in Preserved([model], with_objects=True).containers}
    assert id(vars(outer)) in remembered
    assert not remembered & {id(vars(inner)), id(vars(network)), id(outer.data)}
    model.inner = inner
    assert id(vars(inner)) in {id(c) for c, _ in Preserved([model], with_objects=True).containers}


def test_no_more_is_copied_than_512_megabytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Arrays, and tensors in objects, past the limit are left alone."""
    monkeypatch.setattr("sn_export.running.plain_objects._MOST", 100)
    model = nn.Identity()
    model.small, model.large = np.zeros(10), np.zeros(20)
    model.thing = SimpleNamespace(tensor=torch.zeros(20), little=torch.zeros(5))
    with preserved(model):
        for written in (model.small, model.large):
            written += 1
        for tensor in (model.thing.tensor, model.thing.little):
            tensor.add_(1)
    assert (model.small.sum(), model.large.sum()) == (0, 20)
    assert (model.thing.tensor.sum(), model.thing.little.sum()) == (20, 0)
