"""Exporting is silent unless asked to speak, and hands back what it muted."""

from __future__ import annotations

import contextlib
import gc
import inspect
import logging
import os
import sys
import threading
import warnings
from pathlib import Path

import pytest
import torch
from export_models import EXPORTERS, KINDS, Head, Liar, Unsupported, images, rows, small_net
from onnxscript.values import TracedOnnxFunction
from torch import Tensor, nn

from sn_export import SnExportError, export_onnx


class Suspicious(Head):
    """Makes the TorchScript tracer warn."""

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * int(x.shape[0]) + len(x) + float(torch.tensor(2.0))


class Averaging(Head):
    """Uses operators that opset 18 has changed."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return torch.linalg.svdvals(y).mean(0)


def _attempt(network: type[Head], folder: Path, exporter: str, verbose: bool = False) -> None:
    with contextlib.suppress(SnExportError):
        export_onnx(
            network("hook"), rows(), folder / "net.onnx", exporter=exporter, verbose=verbose
        )


def _state_of_the_process() -> tuple[object, ...]:
    loggers = {
        name: (logger.level, logger.disabled, logger.propagate, tuple(logger.handlers))
        for name, logger in logging.root.manager.loggerDict.items()
        if isinstance(logger, logging.Logger)
    }
    filters = tuple(warnings.filters)
    streams = (id(sys.stdout), id(sys.stderr))
    return (
        loggers,
        filters,
        streams,
        warnings.showwarning,
        logging.root.level,
        logging.root.disabled,
        torch.backends.mha.get_fastpath_enabled(),
        torch.is_grad_enabled(),
        torch._C._jit_is_onnx_log_enabled(),  # type: ignore[attr-defined]
    )


@pytest.mark.parametrize("network", [Head, Suspicious, Unsupported, Liar])
@pytest.mark.parametrize("exporter", EXPORTERS)
def test_nothing_is_printed(
    tmp_path: Path, exporter: str, network: type[Head], capfd: pytest.CaptureFixture[str]
) -> None:
    """Neither Python nor C++ prints anything, with and without failure."""
    _attempt(network, tmp_path, exporter)
    assert tuple(capfd.readouterr()) == ("", "")


@pytest.mark.parametrize("network", [Head, Suspicious, Unsupported, Liar])
@pytest.mark.parametrize("exporter", EXPORTERS)
def test_no_warning_escapes(tmp_path: Path, exporter: str, network: type[Head]) -> None:
    """Warnings that the caller cannot act on stay inside, even if all warnings are errors."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        _attempt(network, tmp_path, exporter)
    assert [str(warning.message) for warning in seen] == []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _attempt(network, tmp_path, exporter)


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_bad_opset_is_said_once(
    tmp_path: Path, exporter: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """An opset that an exporter cannot make of a network raises, and dumps no graph."""
    with contextlib.suppress(SnExportError):
        export_onnx(Averaging(), rows(), tmp_path / "net.onnx", exporter=exporter, opset_version=17)
    assert tuple(capfd.readouterr()) == ("", "")


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_verbose_speaks(tmp_path: Path, exporter: str, capfd: pytest.CaptureFixture[str]) -> None:
    """``verbose=True`` lets the exporter print."""
    _attempt(Head, tmp_path, exporter, verbose=True)
    captured = capfd.readouterr()
    assert captured.out + captured.err


@pytest.mark.filterwarnings("ignore:The feature will be removed:DeprecationWarning")
def test_verbose_warns(tmp_path: Path) -> None:
    """``verbose=True`` lets warnings through."""
    with pytest.warns(torch.jit.TracerWarning):
        _attempt(Suspicious, tmp_path, "torchscript", verbose=True)


@pytest.mark.parametrize("kind", KINDS)
def test_logger_tells_the_steps(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The logger ``sn_export`` tells the steps at INFO, and others say nothing."""
    caplog.set_level(logging.INFO)
    export_onnx(small_net(kind), images(), tmp_path / "net.onnx")
    steps = [record.getMessage() for record in caplog.records]
    assert {record.name.split(".")[0] for record in caplog.records} == {"sn_export"}
    for part in ("reference", "exporting with dynamo", "2 tensors", "comparing", "wrote"):
        assert any(part in step for step in steps), part


@pytest.mark.parametrize("verbose", [False, True])
@pytest.mark.parametrize("network", [Head, Unsupported, Liar])
@pytest.mark.parametrize("exporter", EXPORTERS)
def test_the_process_is_as_before(
    tmp_path: Path, exporter: str, network: type[Head], verbose: bool
) -> None:
    """Logger levels, warning filters, streams and torch's switches are put back."""
    _attempt(Head, tmp_path, exporter)  # imports are done now
    logging.getLogger("torch.onnx").setLevel(logging.INFO)
    try:
        before = _state_of_the_process()
        _attempt(network, tmp_path, exporter, verbose)
        assert _state_of_the_process() == before
    finally:
        logging.getLogger("torch.onnx").setLevel(logging.NOTSET)


def test_exports_in_threads(tmp_path: Path) -> None:
    """Exports of several models at once all succeed, and leave the process as it was."""
    passed: list[bool] = []

    def export(number: int) -> None:
        for exporter in ("torchscript", "dynamo"):
            path = tmp_path / f"{number}.onnx"
            passed.append(export_onnx(Head(), rows(), path, exporter=exporter).parity.passed)

    def process() -> tuple[object, ...]:
        levels = [logging.getLogger(name).level for name in ("torch", "torch.onnx", "onnxscript")]
        place = os.fstat(1)
        return sys.stdout, sys.stderr, place.st_dev, place.st_ino, levels, list(warnings.filters)

    before = process()
    threads = [threading.Thread(target=export, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert passed == [True] * 6
    assert process() == before


def test_operators_are_parsed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second export reads the source of no operator; onnxscript keeps the property that this
    leans on, and has it back afterwards. Inside, since nothing but time tells otherwise."""
    parse = vars(TracedOnnxFunction)["function_ir"]
    assert isinstance(parse, property)
    export_onnx(nn.Linear(3, 2), rows(), tmp_path / "first.onnx", exporter="dynamo")
    monkeypatch.setattr(inspect, "getsource", lambda *_: pytest.fail("an operator was read"))
    export_onnx(nn.Linear(3, 2), rows(), tmp_path / "second.onnx", exporter="dynamo")
    assert vars(TracedOnnxFunction)["function_ir"] is parse


@pytest.mark.parametrize("is_enabled", [True, False])
def test_the_collector_waits_for_dynamo(tmp_path: Path, is_enabled: bool) -> None:
    """It does not run while torch traces, and afterwards runs if it did before."""
    seen: list[bool] = []

    class Asking(Head):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(gc.isenabled())
            y: Tensor = self.layer(x)
            return y

    (gc.enable if is_enabled else gc.disable)()
    try:
        export_onnx(Asking(), rows(), tmp_path / "net.onnx", exporter="dynamo")
        assert gc.isenabled() is is_enabled
    finally:
        gc.enable()
    assert set(seen) == {False, is_enabled}
