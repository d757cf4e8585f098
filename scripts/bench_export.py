"""Benchmarks of the export: its own cost, and its file against an export with spectral norm."""

from __future__ import annotations

import contextlib
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import onnx
import onnxruntime
import torch
from bench_common import KINDS, Row, Step, make_critic, measure_ratio
from bench_networks import BUILDERS, build
from torch import nn

from sn_export import export_onnx, frozen_spectral_norm

Exporter = Literal["dynamo", "torchscript"]
EXPORTERS: tuple[Exporter, ...] = ("dynamo", "torchscript")
SAMPLES = 3
IMAGES = (1, 3, 64, 64)
_TWINS = {
    False: "bare torch.onnx.export",
    True: "that export and as many runs of network and file",
}
_FIRST = """
import sys, time, warnings
_, name, kind, exporter, path = sys.argv
from bench_networks import build
model, args = build(name, kind)
warnings.simplefilter("ignore")
start = time.process_time()
if kind == "plain":
    import torch.onnx
    torch.onnx.export(
        model, args, path, dynamo=exporter == "dynamo", external_data=False, verbose=False
    )
else:
    from sn_export import export_onnx
    export_onnx(model, args, path, exporter=exporter)
print(time.process_time() - start)
"""


def measure_exports(quick: bool) -> list[Row]:
    """Time export_onnx against torch.onnx.export of a plain twin and as many runs."""
    image = torch.randn(IMAGES)
    rows = []
    for exporter in EXPORTERS:
        for kind in KINDS:
            model = make_critic(kind)
            name = f"export_onnx, critic, {kind}, {exporter}, to the plain export + as many runs"
            with _make_folder() as folder:
                row = measure_ratio(
                    name,
                    _make_export(model, (image,), folder / "ours.onnx", exporter),
                    _make_twin_export(_make_twin(model), image, folder / "twin.onnx", exporter),
                    repeats=_choose_repeats(quick, exporter),
                    aim=1.10,
                )
            rows.append(row)
    return rows


def measure_networks(quick: bool) -> list[Row]:
    """Time export_onnx against bare torch.onnx.export of the plain network, processor time.

    Once more with the runs beside that export which any proof takes: no export that is proved with
    as many inputs costs less than those.
    """
    aims = {"dynamo": 1.00, "torchscript": 1.50}
    rows = []
    for exporter in EXPORTERS:
        for runs in (False, True):
            found = [_measure_network(name, exporter, runs, quick) for name in BUILDERS]
            middle = statistics.median(row.measured for row in found if row.measured is not None)
            title = f"export_onnx to {_TWINS[runs]}, {exporter}, median of {len(found)}"
            rows += [*found, Row(title, middle, None if runs else aims[exporter], "ratio")]
    return rows


def _measure_network(name: str, exporter: Exporter, runs: bool, quick: bool) -> Row:
    model, args = build(name, "parametrization")
    twin, _ = build(name, "plain")
    with frozen_spectral_norm(model):
        twin.load_state_dict(model.state_dict())
    with _make_folder() as folder:
        ours, bare = folder / "ours.onnx", folder / "bare.onnx"

        def run_bare() -> None:
            _run_torch_export(twin, args, bare, exporter)
            if runs:
                _run_both(model, args, bare)

        return measure_ratio(
            f"export_onnx to {_TWINS[runs]}, {exporter}, {name}",
            _make_export(model, args, ours, exporter),
            run_bare,
            repeats=3 if quick else 9,
            clock=time.process_time,
        )


def _run_both(model: nn.Module, args: tuple[torch.Tensor, ...], path: Path) -> None:
    """Run a network and its file on as many inputs as export_onnx does."""
    session = onnxruntime.InferenceSession(path)
    names = [entry.name for entry in session.get_inputs()]
    feed = {name: tensor.numpy() for name, tensor in zip(names, args, strict=True)}
    for _ in range(1 + SAMPLES):
        with torch.no_grad():
            model(*args)
        session.run(None, feed)


def measure_first_exports(quick: bool) -> list[Row]:
    """Time the first export of a process, with what it imports, in processes of their own."""
    rows = []
    for exporter in EXPORTERS:
        found = []
        for name in [*BUILDERS][: 3 if quick else None]:
            title = f"first export_onnx to first bare export, {exporter}, {name}"
            pairs = [
                (
                    _measure_first(name, "parametrization", exporter),
                    _measure_first(name, "plain", exporter),
                )
                for _ in range(1 if quick else 5)
            ]
            found.append(Row(title, statistics.median(a / b for a, b in pairs), None, "ratio"))
        middle = statistics.median(row.measured or 0.0 for row in found)
        title = f"first export_onnx to first bare export, {exporter}, median of {len(found)}"
        rows += [*found, Row(title, middle, None, "ratio")]
    return rows


def _measure_first(name: str, kind: str, exporter: Exporter) -> float:
    with _make_folder() as folder:
        command = [sys.executable, "-c", _FIRST, name, kind, exporter, str(folder / "net.onnx")]
        scripts = Path(__file__).parent
        done = subprocess.run(command, cwd=scripts, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def compare_files(quick: bool) -> list[Row]:
    """Compare the exported file with that of torch.onnx.export on the model as it is."""
    image = torch.randn(IMAGES)
    rows = []
    for exporter in EXPORTERS:
        for kind in KINDS:
            model = make_critic(kind)
            title = f"critic, {kind}, {exporter}, frozen file to raw file"
            with _make_folder() as folder:
                raw, frozen = folder / "raw.onnx", folder / "frozen.onnx"
                try:
                    _run_torch_export(model, (image,), raw, exporter)
                except Exception as error:  # whatever the exporter raises is the finding
                    reason = f"{type(error).__name__}: {error}".splitlines()[-1]
                    detail = {"raw export failed": reason}
                    rows.append(Row(f"nodes, {title}", None, None, "ratio", detail))
                    continue
                _make_export(model, (image,), frozen, exporter)()
                rows += _compare_files(title, frozen, raw, image, quick)
    return rows


def _compare_files(
    title: str, frozen: Path, raw: Path, image: torch.Tensor, quick: bool
) -> list[Row]:
    ours, theirs = (len(onnx.load(path).graph.node) for path in (frozen, raw))
    detail = {"nodes": ours, "reference_nodes": theirs}
    rows = [Row(f"nodes, {title}", ours / theirs, None, "ratio", detail)]
    for level, optimise in (("off", False), ("on", True)):
        repeats = 7 if quick else 31

        def load(path: Path, optimise: bool = optimise) -> Step:
            return lambda: _open_session(path, optimise)

        def infer(path: Path, optimise: bool = optimise) -> Step:
            session = _open_session(path, optimise)
            feed = {session.get_inputs()[0].name: image.numpy()}
            return lambda: [session.run(None, feed) for _ in range(5)]

        what = f"{title}, optimisations {level}"
        rows.append(measure_ratio(f"load time, {what}", load(frozen), load(raw), repeats=repeats))
        rows.append(measure_ratio(f"latency, {what}", infer(frozen), infer(raw), repeats=repeats))
    return rows


def _open_session(path: Path, optimise: bool) -> onnxruntime.InferenceSession:
    level = onnxruntime.GraphOptimizationLevel
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimise else level.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(path, options)


def _make_export(
    model: nn.Module, args: tuple[torch.Tensor, ...], path: Path, exporter: Exporter
) -> Step:
    def run() -> None:
        with _silence():
            export_onnx(model, args, path, exporter=exporter, samples=SAMPLES)

    return run


def _make_twin_export(twin: nn.Module, image: torch.Tensor, path: Path, exporter: Exporter) -> Step:
    inputs = [image, *(torch.randn(IMAGES) for _ in range(SAMPLES))]

    def run() -> None:
        _run_torch_export(twin, (image,), path, exporter)
        session = onnxruntime.InferenceSession(path)
        name = session.get_inputs()[0].name
        for tensor in inputs:
            session.run(None, {name: tensor.numpy()})

    return run


def _run_torch_export(
    model: nn.Module, args: tuple[torch.Tensor, ...], path: Path, exporter: Exporter
) -> None:
    with _silence():
        torch.onnx.export(
            model,
            args,
            path,
            dynamo=exporter == "dynamo",
            external_data=False,  # one file, as export_onnx writes it at this size
            verbose=False,
        )


def _make_twin(model: nn.Sequential) -> nn.Sequential:
    """Return a model without spectral norm, with the weights that ``model`` uses."""
    twin = make_critic("plain")
    with frozen_spectral_norm(model):
        twin.load_state_dict(model.state_dict())
    return twin


def _choose_repeats(quick: bool, exporter: Exporter) -> int:
    if exporter == "torchscript":
        return 5 if quick else 15
    return 2 if quick else 7


@contextlib.contextmanager
def _make_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keep the exporters' progress, warnings and graph dumps off the report."""
    level = logging.root.manager.disable
    sys.stdout.flush()
    sys.stderr.flush()
    terminal = [os.dup(1), os.dup(2)]
    nowhere = os.open(os.devnull, os.O_WRONLY)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        os.dup2(nowhere, 1)  # the graph of a failed export is printed from C++
        os.dup2(nowhere, 2)
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, saved in enumerate(terminal, start=1):
                os.dup2(saved, number)
                os.close(saved)
            os.close(nowhere)
            logging.disable(level)
