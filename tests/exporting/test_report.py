"""The report, its JSON, and what bad arguments are told."""

from __future__ import annotations

import dataclasses
import json
import math
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from export_models import EXPORTERS, Head, Raising, images, rows, small_net
from torch import nn

from sn_export import ExportReport, OutputParity, ParityReport, SnExportError, export_onnx


def _report(folder: Path, exporter: str = "torchscript") -> ExportReport:
    return export_onnx(small_net("hook"), images(), folder / "net.onnx", exporter=exporter)


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_json_says_what_the_report_says(tmp_path: Path, exporter: str) -> None:
    """Every field comes back from JSON, numbers to the last digit."""
    report = _report(tmp_path, exporter)
    content = json.loads(report.to_json())
    assert content["path"] == str(tmp_path / "net.onnx")
    assert content["exporter"] == exporter
    assert content["opset"] == report.opset
    assert content["versions"] == dict(report.versions)
    parity = content["parity"]
    assert (parity["passed"], parity["samples"], parity["providers"]) == (
        True,
        4,
        ["CPUExecutionProvider"],
    )
    for found, output in zip(parity["outputs"], report.parity.outputs, strict=True):
        wanted = dataclasses.asdict(output)
        assert {key: found[key] for key in wanted} == json.loads(json.dumps(wanted))
    for found, info in zip(content["frozen"], report.frozen, strict=True):
        wanted = dataclasses.asdict(info)
        assert {key: found[key] for key in wanted} == json.loads(json.dumps(wanted))
    assert [entry["module"] for entry in content["frozen"]] == ["0", "4"]


def test_json_is_standard(tmp_path: Path) -> None:
    """NaN becomes null and infinities become strings, so that any JSON reader takes it."""
    output = OutputParity(
        "y", (2, 3), "float32", math.nan, math.inf, -math.inf, (0, 1), "s", 1, 0.0, math.inf, False
    )
    report = dataclasses.replace(
        _report(tmp_path), parity=ParityReport((output,), 1, ("CPUExecutionProvider",))
    )

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    content = json.loads(report.to_json(), parse_constant=refuse)
    (found,) = content["parity"]["outputs"]
    assert (found["max_abs"], found["max_rel"], found["mean_abs"]) == (None, "inf", "-inf")
    assert (found["shape"], found["worst_index"]) == ([2, 3], [0, 1])
    assert content["parity"]["passed"] is False


def test_json_indentation(tmp_path: Path) -> None:
    """``indent=None`` gives one line."""
    report = _report(tmp_path)
    assert "\n" not in report.to_json(indent=None)
    assert json.loads(report.to_json(indent=None)) == json.loads(report.to_json())


def test_versions(tmp_path: Path) -> None:
    """The versions are those installed."""
    found = _report(tmp_path).versions
    for package in ("torch", "onnx", "onnxruntime", "onnxscript", "numpy"):
        assert found[package] == metadata.version(package)
    assert "sn-export" in found


def test_report_of_outputs(tmp_path: Path) -> None:
    """Each output is told with its shape, dtype, errors, place of the worst, and tolerances."""
    (output,) = _report(tmp_path).parity.outputs
    assert (output.shape, output.dtype, output.samples) == ((2, 3), "float32", 4)
    assert 0 <= output.mean_abs <= output.max_abs <= output.atol + output.rtol * 100
    assert len(output.worst_index) == 2
    assert output.worst_sample in {"the example input", *(f"random input {i}" for i in range(3))}
    assert output.passed
    assert output.reason == ""


_BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "exporter": (
        {"exporter": "tensorflow"},
        ValueError,
        "exporter must be 'auto', 'dynamo' or 'torchscript', got 'tensorflow'",
    ),
    "negative samples": (
        {"samples": -1},
        ValueError,
        "samples must be an integer of 0 or more, got -1",
    ),
    "samples not a number": (
        {"samples": "3"},
        ValueError,
        "samples must be an integer of 0 or more, got '3'",
    ),
    "samples a fraction": (
        {"samples": 1.5},
        ValueError,
        "samples must be an integer of 0 or more, got 1.5",
    ),
    "samples True": (
        {"samples": True},
        ValueError,
        "samples must be an integer of 0 or more, got True",
    ),
    "samples a truth value of numpy": (
        {"samples": np.True_},
        ValueError,
        f"samples must be an integer of 0 or more, got {np.True_!r}",
    ),
    "external_data": (
        {"external_data": "yes"},
        ValueError,
        "external_data must be 'auto', True or False, got 'yes'",
    ),
    "opset_version": (
        {"opset_version": "18"},
        TypeError,
        "opset_version must be an integer, got str",
    ),
    "rtol": ({"rtol": -1e-3}, ValueError, "rtol must be 0 or more, got -0.001"),
    "atol": ({"atol": -1.0}, ValueError, "atol must be 0 or more, got -1.0"),
    "rtol NaN": ({"rtol": math.nan}, ValueError, "rtol must be 0 or more, got nan"),
    "args a string": (
        {"args": "x"},
        TypeError,
        "args must be a tuple of arguments or a tensor, got str",
    ),
    "args a dict": (
        {"args": {"x": 1}},
        TypeError,
        "args must be a tuple of arguments or a tensor, got dict",
    ),
    "args None": (
        {"args": None},
        TypeError,
        "args must be a tuple of arguments or a tensor, got NoneType",
    ),
    "model a function": (
        {"model": torch.relu},
        TypeError,
        "model must be a torch.nn.Module, or a method of one such as net.decode, "
        "got builtin_function_or_method",
    ),
    "model a class": (
        {"model": nn.ReLU},
        TypeError,
        "model must be a torch.nn.Module, or a method of one such as net.decode, got type",
    ),
    "inputs": (
        {"inputs": 5},
        TypeError,
        "inputs must be a tensor, a tuple of arguments, a dict of keyword arguments or a list "
        "of these, got int",
    ),
    "inputs within a list": (
        {"inputs": [rows(), 5]},
        TypeError,
        "inputs must be a tensor, a tuple of arguments, a dict of keyword arguments or a list "
        "of these, got int",
    ),
    "inputs None within a list": (
        {"inputs": [None]},
        TypeError,
        "inputs must be a tensor, a tuple of arguments, a dict of keyword arguments or a list "
        "of these, got NoneType",
    ),
    "inputs not by name": (
        {"inputs": [{5: rows()}]},
        TypeError,
        "inputs must be by name of the argument, got the key 5",
    ),
    "kwargs a number": (
        {"kwargs": 5},
        TypeError,
        "kwargs must be a dict of keyword arguments, got int",
    ),
    "kwargs a list": (
        {"kwargs": [1]},
        TypeError,
        "kwargs must be a dict of keyword arguments, got list",
    ),
    "kwargs a tensor": (
        {"kwargs": rows()},
        TypeError,
        "kwargs must be a dict of keyword arguments, got Tensor",
    ),
    "kwargs not by name": (
        {"kwargs": {5: rows()}},
        TypeError,
        "kwargs must be by name of the argument, got the key 5",
    ),
    "path": ({"path": 5}, TypeError, "path must be the path of a file, got 5"),
    "path of bytes": (
        {"path": b"net.onnx"},
        TypeError,
        "path must be the path of a file, got b'net.onnx'",
    ),
    "source": ({"source": 5}, TypeError, "source must be the path of a file, got 5"),
    "save_case": ({"save_case": 5}, TypeError, "save_case must be the path of a file, got 5"),
    "providers None": (
        {"providers": None},
        TypeError,
        "providers must be a sequence of names, got None",
    ),
}


@pytest.mark.parametrize(("options", "error", "message"), _BAD.values(), ids=_BAD)
def test_bad_argument(
    tmp_path: Path, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    """A bad argument is told word for word what was wanted and given, before the model runs."""
    given: dict[str, Any] = {"model": Raising(), "args": rows(), "path": tmp_path / "net.onnx"}
    with pytest.raises(error) as caught:
        export_onnx(**(given | options))
    assert str(caught.value) == message
    assert list(tmp_path.iterdir()) == []


def test_unknown_provider(tmp_path: Path) -> None:
    """An execution provider that is not installed is named, beside those that are."""
    with pytest.raises(ValueError, match="unknown onnxruntime provider") as caught:
        export_onnx(Raising(), rows(), tmp_path / "net.onnx", providers=["NoSuchProvider"])
    assert str(caught.value).startswith(
        "unknown onnxruntime provider 'NoSuchProvider', installed are "
    )
    assert "CPUExecutionProvider" in str(caught.value)


def test_providers_given_as_text(tmp_path: Path) -> None:
    """One provider given as a string, not a list, is not taken for its letters."""
    with pytest.raises((TypeError, ValueError)) as caught:
        export_onnx(Raising(), rows(), tmp_path / "net.onnx", providers="CPUExecutionProvider")
    assert "'C'" not in str(caught.value)


def test_model_that_raises(tmp_path: Path) -> None:
    """The model's own error is quoted and chained."""
    with pytest.raises(SnExportError) as caught:
        export_onnx(Raising(), rows(), tmp_path / "net.onnx")
    assert str(caught.value) == (
        "the model fails on the example input: ArithmeticError: no input is good enough"
    )
    assert isinstance(caught.value.__cause__, ArithmeticError)


def test_model_that_returns_no_tensor(tmp_path: Path) -> None:
    """A model that returns no tensor is told so."""

    class Silent(Head):
        def forward(self, x: torch.Tensor) -> None:
            self.layer(x)

    with pytest.raises(SnExportError) as caught:
        export_onnx(Silent(), rows(), tmp_path / "net.onnx")
    assert str(caught.value) == ("the model returns no tensor for the example input: got NoneType")


def test_model_that_returns_an_object_alone(tmp_path: Path) -> None:
    """Where all tensors are within an object that no exporter looks into, that is named."""

    class Gaussian(Head):
        def forward(self, x: torch.Tensor) -> dict[str, torch.distributions.Normal]:
            return {"latent": torch.distributions.Normal(self.layer(x), 1.0)}

    with pytest.raises(SnExportError) as caught:
        export_onnx(Gaussian(), rows(), tmp_path / "net.onnx")
    assert str(caught.value) == (
        "the model returns no tensor for the example input: got dict, with tensors within "
        "Normal at 'output_latent': return these as tensors"
    )
