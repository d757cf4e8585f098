"""Arguments and results of unusual types: taken, or refused by name, but no silent constants.

`list_entries` is called inside: which fields an object has shows in no file.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from export_models import APPLY, EXPORTERS, rows, run_file
from fingerprint import fingerprint
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sn_export import OutputNotExportedWarning, SnExportError, export_onnx
from sn_export.running import draw_random_like
from sn_export.running.nested import list_entries


class Dotted(dict[str, Any]):
    """A dict whose items are attributes."""

    __getattr__ = dict.__getitem__


@dataclass
class Result(OrderedDict[str, Any]):
    """Fields that are items, too."""

    h: Any = None

    def __post_init__(self) -> None:
        OrderedDict.__setitem__(self, "h", self.h)


@dataclass
class Cached:
    """Computes from its field when asked, and keeps it."""

    h: Tensor

    @cached_property
    def doubled(self) -> Tensor:
        return self.h * 2


class Opaque:
    """Holds a tensor where no exporter looks."""

    def __init__(self, h: Tensor) -> None:
        self.h = h


@dataclass
class Derived:
    """Holds a tensor that is no field."""

    h: Tensor

    def __post_init__(self) -> None:
        self.square = self.h**2


class Named(OrderedDict[str, Any]):
    """Registered without names, as transformers registers its outputs."""


pytree.register_pytree_node(
    Named,
    lambda one: (list(one.values()), list(one)),
    lambda values, keys: Named(zip(keys, values, strict=True)),
)


class Reads(nn.Module):
    """Reads its second argument by a function, and may return something else than a tensor."""

    def __init__(self, read: Callable[[Any], Tensor], result: Any = None) -> None:
        super().__init__()
        self.layer = APPLY["hook"](nn.Linear(3, 3))
        self.read, self.result = read, result

    def forward(self, x: Tensor, b: Any) -> Any:
        y: Tensor = self.layer(x) + self.read(b)
        return y if self.result is None else self.result(y)


def _used(h: Tensor) -> Cached:
    cached = Cached(h)
    assert cached.doubled.shape == h.shape  # from the example; stale for every other call
    return cached


_TAKEN: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]] = {
    "a subclass of dict": (lambda h: Dotted(h=h), lambda b: b.h),
    "fields and items": (lambda h: Result(h=h), lambda b: b["h"]),
    "registered without names": (lambda h: Named(h=h), lambda b: b["h"]),
    "a cached property": (_used, lambda b: b.doubled),
}


@pytest.mark.parametrize("exporter", EXPORTERS)
@pytest.mark.parametrize("kind", _TAKEN)
def test_containers_of_other_classes(tmp_path: Path, exporter: Any, kind: str) -> None:
    """The tensor within is an input of the file, and what was given is unchanged."""
    make, read = _TAKEN[kind]
    model, path = Reads(read), tmp_path / "net.onnx"
    given = make(rows(seed=1))
    attributes = dict(vars(given))
    export_onnx(model, (rows(), given), path, exporter=exporter)
    assert vars(given) == attributes or kind == "a cached property"
    other = rows(seed=9)
    wanted = model.eval()(rows(), make(other)).detach()
    torch.testing.assert_close(torch.from_numpy(run_file(path, rows(), other)[0]), wanted)


_REFUSED: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Tensor], str]] = {
    "object": (Opaque, lambda b: b.h, "'b' in the example input is of type Opaque"),
    "array": (lambda h: h.numpy(), torch.from_numpy, "is of type ndarray"),
    "no field": (Derived, lambda b: b.square, "is of type Derived"),
    "in a list": (lambda h: [Opaque(h)], lambda b: b[0].h, "'b_0' in the example input"),
    "a set": (lambda h: {h}, lambda b: next(iter(b)), "is of type set"),
    "sparse": (lambda h: h.to_sparse(), lambda b: b.to_dense(), "layout torch.sparse_coo"),
    "quantized": (
        lambda h: torch.quantize_per_tensor(h, 0.1, 0, torch.qint8),
        lambda b: b.dequantize(),
        "'b' in the example input is quantized",
    ),
    "nested": (
        lambda h: torch.nested.nested_tensor([*h]),
        lambda b: b.to_padded_tensor(0.0),
        "'b' in the example input is nested",
    ),
}


@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype:UserWarning")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
@pytest.mark.parametrize("kind", _REFUSED)
def test_tensors_that_no_exporter_sees(tmp_path: Path, kind: str) -> None:
    """They are not made constants of the file: the argument is named, and nothing is changed."""
    make, read, message = _REFUSED[kind]
    model = Reads(read)
    before = fingerprint(model)
    with pytest.raises(TypeError, match=message):
        export_onnx(model, (rows(), make(rows(seed=1))), tmp_path / "net.onnx")
    assert fingerprint(model) == before
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("exporter", EXPORTERS)
@pytest.mark.parametrize(
    ("result", "names"),
    [
        (lambda y: (y, Dotted(h=y * 2)), ["output_0", "output_1_h"]),
        (lambda y: Result(h=y), ["h"]),
        (lambda y: Named(y=y, z=y + 1), ["y", "z"]),
        (lambda y: {0: y, 1: y + 1}, ["output_0", "output_1"]),
        (lambda y: {"": y}, ["output"]),
    ],
    ids=["dict", "fields and items", "registered", "numbers", "empty"],
)
def test_results_of_other_classes(
    tmp_path: Path, exporter: Any, result: Any, names: list[str]
) -> None:
    """Every tensor of the result is an output of the file."""
    path = tmp_path / "net.onnx"
    model = Reads(lambda b: b, result)
    report = export_onnx(model, (rows(), rows(seed=1)), path, exporter=exporter)
    assert [output.name for output in report.parity.outputs] == names


def test_a_result_that_no_exporter_sees(tmp_path: Path) -> None:
    """Tensors within an object are left out of the file, and that is said."""
    model = Reads(lambda b: b, lambda y: (y, torch.distributions.Normal(y, y.exp())))
    with pytest.warns(OutputNotExportedWarning, match="Normal at 'output_1'"):
        report = export_onnx(model, (rows(), rows(seed=1)), tmp_path / "net.onnx")
    assert [output.name for output in report.parity.outputs] == ["output_0"]


def test_entries_of_fields_and_items() -> None:
    """What is both a field and an item stands there once."""
    tensor = rows()
    assert list_entries(Result(h=tensor)) == [("h", tensor)]
    assert [field.name for field in fields(Result)] == ["h"]
    assert list_entries(3) is None


class Hiding(nn.Module):
    """Runs modules that are not registered, which stay in train mode in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = APPLY["hook"](nn.Linear(3, 3))
        teacher = nn.Sequential(APPLY["hook"](nn.Linear(3, 3)), nn.BatchNorm1d(3))
        object.__setattr__(self, "teacher", teacher)
        self.more = [nn.BatchNorm1d(3)]

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layer(x) + self.teacher(x).detach() + self.more[0](x).detach()
        return result


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_modules_that_are_not_registered(tmp_path: Path, exporter: Any) -> None:
    """Their statistics, vectors and modes are as before, though the export may fail."""
    model = Hiding()
    hidden = [model.teacher, model.more[0]]
    states = copy.deepcopy([module.state_dict() for module in hidden])
    modes = [module.training for one in hidden for module in one.modules()]
    with pytest.raises(SnExportError):
        export_onnx(model, (rows(height=4),), tmp_path / "net.onnx", exporter=exporter)
    assert [module.training for one in hidden for module in one.modules()] == modes
    for module, state in zip(hidden, states, strict=True):
        torch.testing.assert_close(module.state_dict(), state, rtol=0, atol=0)


def test_parameters_made_in_inference_mode(tmp_path: Path) -> None:
    """They have no version to put back."""
    with torch.inference_mode():
        model = nn.Sequential(APPLY["hook"](nn.Linear(3, 3)))
    assert export_onnx(model, rows(), tmp_path / "net.onnx").parity.passed


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bool, torch.complex64])
def test_another_default_device(dtype: torch.dtype) -> None:
    """Random values are drawn on the CPU, wherever new tensors go."""
    tensor = rows().to(dtype)
    with torch.device("meta"):
        drawn = draw_random_like(tensor, torch.Generator("cpu").manual_seed(0))
    assert drawn.device == tensor.device


def test_own_inputs_with_a_tensor_more(tmp_path: Path) -> None:
    """A tensor that the file has no input for is named."""

    class Masked(nn.Module):
        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            return x if mask is None else x * mask

    with pytest.raises(ValueError, match="inputs 0 has the tensor 'mask'"):
        export_onnx(Masked(), rows(), tmp_path / "net.onnx", inputs=[(rows(), rows())])


def test_a_pipe_is_not_replaced(tmp_path: Path) -> None:
    """What is no regular file stays what it is."""
    import os

    path = tmp_path / "net.onnx"
    os.mkfifo(path)
    with pytest.raises(FileExistsError, match="no regular file"):
        export_onnx(nn.Linear(3, 3), rows(), path)
    assert path.is_fifo()
