"""Train an SN-GAN on real digits, export both nets in the middle, and train on as if nothing was.

    python scripts/demo.py

The same training runs a second time without the export, and both end states must be equal to
the last bit; the exit code is 1 if they are not. Files go to build/demo/.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from demo_gan import DIGITS, NOISE, Training, list_differing, load_real_digits
from demo_picture import save_rows
from onnxruntime import InferenceSession
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from sn_export import ExportReport, SpectralNormInfo, export_onnx

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "demo"
SEED = 0
STEPS = 400  # of each run; the first one exports in the middle
COLUMNS = 2 * DIGITS  # of the picture

console = Console()


def main() -> int:
    """Run the demo; return 0 if the export left no trace in the training."""
    torch.set_num_threads(1)  # fastest for nets this small, however busy the machine is
    torch.use_deterministic_algorithms(True)
    FOLDER.mkdir(parents=True, exist_ok=True)
    noise, digits = _make_picture_inputs()

    training = Training(SEED)
    _train(training, STEPS // 2, "training, first half")
    training.save(FOLDER)
    halfway = training.state()
    reports = {
        "critic": _export(training.critic, training.images[:2], digits[:2], "critic"),
        "generator": _export(training.generator, noise[:2], digits[:2], "generator-halfway"),
    }
    _print_frozen(reports)
    _print_parity(reports)
    resumed = training.state()
    _train(training, STEPS - STEPS // 2, "training, second half")
    exported = training.state()  # now: the next run draws from the same global generator

    uninterrupted = Training(SEED)
    _train(uninterrupted, STEPS, "training again, no export")
    equal = _print_comparison(halfway, resumed, exported, uninterrupted.state())

    final = _export(training.generator, noise[:2], digits[:2], "generator")
    _draw(training.generator, reports["generator"].path, final.path, noise, digits)
    return 0 if equal else 1


def _train(training: Training, steps: int, label: str) -> None:
    for _ in track(range(steps), f"{label:26}", console=console):
        training.step()


def _export(net: nn.Module, first: Tensor, digits: Tensor, name: str) -> ExportReport:
    """Export ``net`` as it is, in train mode, for batches of any size."""
    started = time.perf_counter()
    batch = torch.export.Dim("batch")
    report = export_onnx(
        net, (first, digits), FOLDER / f"{name}.onnx", dynamic_shapes=({0: batch}, {0: batch})
    )
    seconds = time.perf_counter() - started
    mode = "train" if net.training else "eval"
    console.print(f"exported {_shorten_path(report.path)} in {seconds:.1f} s, left in {mode} mode")
    return report


def _print_frozen(reports: Mapping[str, ExportReport]) -> None:
    table = Table("net", "tensor", "spectral norm", "shape", "dim", "sigma", title="Frozen")
    for net, report in reports.items():
        for site in report.frozen:
            assert isinstance(site, SpectralNormInfo)
            shape = "x".join(map(str, site.shape))
            name = f"{site.module}.{site.tensor}"
            table.add_row(net, name, site.kind, shape, str(site.dim), f"{site.sigma:.4f}")
    console.print(table)


def _print_parity(reports: Mapping[str, ExportReport]) -> None:
    table = Table("net", "inputs", "max abs", "max rel", "mean abs", "within", "")
    table.title = "onnxruntime against the unfrozen net"
    for net, report in reports.items():
        for output in report.parity.outputs:
            errors = (output.max_abs, output.max_rel, output.mean_abs, output.atol)
            verdict = "passed" if output.passed else "FAILED"
            table.add_row(net, str(output.samples), *(f"{e:.1e}" for e in errors), verdict)
    console.print(table)


def _print_comparison(
    halfway: Mapping[str, Any],
    resumed: Mapping[str, Any],
    exported: Mapping[str, Any],
    uninterrupted: Mapping[str, Any],
) -> bool:
    """Return whether the states around the export are equal, and the two end states too.

    The end states alone would not do: power iteration forgets small changes to u and v.
    """
    changed = list_differing(halfway, resumed)
    differs = list_differing(exported, uninterrupted)
    moved = list_differing(resumed, exported)
    table = Table("state", "entries", "export changed", "then moved", "end differs")
    table.title = "The run with the export against the run without"
    columns = [
        Counter(name.split(".")[0] for name in names)
        for names in (exported, changed, moved, differs)
    ]
    for part in columns[0]:
        table.add_row(part, *(str(column[part]) for column in columns))
    console.print(table)
    if changed or differs:
        console.print(f"[red]DIFFERENT[/] in {', '.join(sorted({*changed, *differs}))}")
        return False
    console.print(f"[green]equal to the last bit[/]: {STEPS} steps with and without the export")
    return True


def _make_picture_inputs() -> tuple[Tensor, Tensor]:
    """Return noise from a generator of its own, and every digit twice."""
    noise = torch.randn(COLUMNS, NOISE, generator=torch.Generator().manual_seed(SEED))
    return noise, torch.arange(COLUMNS) % DIGITS


def _draw(net: nn.Module, halfway: Path, final: Path, noise: Tensor, digits: Tensor) -> None:
    images, labels = load_real_digits()
    nth = torch.arange(COLUMNS) // DIGITS
    real = [images[labels == digit][n] for digit, n in zip(digits, nth, strict=True)]
    net.eval()
    with torch.no_grad():
        drawn = net(noise, digits)
    ran = _run(final, noise, digits)
    rows = {
        "real digits": torch.stack(real),
        "onnxruntime, halfway": _run(halfway, noise, digits),
        "torch, trained": drawn,
        "onnxruntime, trained": ran,
    }
    path = FOLDER / "digits.png"
    save_rows(rows, path)
    difference = (drawn - ran).abs().max().item()
    console.print(f"picture: {_shorten_path(path)}")
    console.print(f"its rows of torch and onnxruntime differ by {difference:.1e} at most")


def _run(path: Path, noise: Tensor, digits: Tensor) -> Tensor:
    session = InferenceSession(path, providers=["CPUExecutionProvider"])
    (images,) = session.run(None, {"noise": noise.numpy(), "digit": digits.numpy()})
    return torch.from_numpy(images)


def _shorten_path(path: Path) -> Path:
    return path.relative_to(ROOT)


if __name__ == "__main__":
    sys.exit(main())
