"""Freeze and export models of published packages, and print a Markdown table of what happened.

Run by ``scripts/test --wild``. Ends with 1 if a model cannot be built or was changed, if outputs
inside the block differ, or if a computed weight was folded without a warning. An export that is
refused, because it fails or cannot be proved, is told in the table.
"""

from __future__ import annotations

import copy
import sys
import tempfile
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import onnx
import torch
from export_models import EXPORTERS, bare_export
from fingerprint import changes_since, fingerprint
from sweeps import shorten_error, start_sweep
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from wild_models import MODELS

from sn_export import (
    ReparametrizationNotRecognisedWarning,
    SnExportError,
    export_onnx,
    find_spectral_norm,
    frozen_spectral_norm,
)

_HEADER = (
    "| package | model | frozen | block | dynamo: nodes | TorchScript: nodes |\n"
    "| --- | --- | --- | --- | --- | --- |"
)


def main() -> int:
    """Print the table."""
    start_sweep()
    print(_HEADER)
    failed = []
    for name, (package, build) in MODELS.items():
        torch.manual_seed(0)
        try:
            model, args = build()
            with torch.no_grad():
                model.train()(*args)
        except Exception as error:
            told = f"cannot be built: {shorten_error(error, 160)}"
            print(f"| {package} {version(package)} | {name} | | {told} | | |")
            failed.append(name)
            continue
        cells = [f"{package} {version(package)}", name, str(len(find_spectral_norm(model)))]
        cells.append(_block(model, args))
        for exporter in EXPORTERS:
            cells.append(" / ".join(dict.fromkeys(_exports(model, args, exporter))))
        print("| " + " | ".join(cells) + " |", flush=True)
        failed += [name for cell in cells if "CHANGED" in cell or "differ" in cell.split(";")[0]]
    print(f"\ntorch {torch.__version__}; changed or not built: {', '.join(failed) or 'none'}")
    return bool(failed)


def _block(model: nn.Module, args: tuple[Tensor, ...]) -> str:
    """Tell whether outputs inside the block are those of an eval forward, bit for bit."""
    if not find_spectral_norm(model):
        return "not recognised"
    told = []
    for training in (True, False):
        model.train(training)
        reference = copy.deepcopy(model).eval()
        with torch.no_grad():
            wanted = reference(*[arg.clone() for arg in args])
        before = fingerprint(model)
        with frozen_spectral_norm(model):
            inner = copy.deepcopy(model).eval()
            with torch.no_grad():
                got = inner(*[arg.clone() for arg in args])
        if changes_since(before, model):
            told.append("CHANGED")
        told.append("exact" if _equal(got, wanted) else "outputs differ")
    return " / ".join(dict.fromkeys(told))


def _equal(left: object, right: object) -> bool:
    pairs = zip(pytree.tree_leaves(left), pytree.tree_leaves(right), strict=True)
    return all(torch.equal(a, b) for a, b in pairs if isinstance(a, Tensor))


def _exports(model: nn.Module, args: tuple[Tensor, ...], exporter: str) -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:
        raw = _raw(model, args, exporter, Path(folder) / "raw.onnx")
        for training in (True, False):
            model.train(training)
            before = fingerprint(model)
            path = Path(folder) / "net.onnx"
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", ReparametrizationNotRecognisedWarning)
                try:
                    report = export_onnx(model, args, path, exporter=exporter)  # type: ignore[arg-type]
                    nodes = str(len(onnx.load(path).graph.node))
                    folded = f", {len(report.folded)} folded" if report.folded else ""
                    told = f"{raw} to {nodes}{folded}, proved"
                except SnExportError as error:
                    told = f"{raw}; {type(error).__name__}: {shorten_error(error, 160)}"
            if "folded" in told and not caught and any(entry.is_weight for entry in report.folded):
                told += ", CHANGED: no warning"
            if changes_since(before, model):
                told += ", CHANGED"
            yield told


def _raw(model: nn.Module, args: tuple[Tensor, ...], exporter: str, path: Path) -> str:
    try:
        bare_export(copy.deepcopy(model).eval(), args, path, exporter)
    except Exception:
        return "fails"
    return str(len(onnx.load(path).graph.node))


if __name__ == "__main__":
    sys.exit(main())
