"""Thousands of rounds in one process: what grows, beside torch's own export."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from export_models import bare_export, images, small_net
from prove_common import Row

from sn_export import export_onnx, frozen_spectral_norm

_PAGE = 4096
_MOST = 64 * 1024  # bytes a round above torch's own: far below one weight of a real network


class _Growth(NamedTuple):
    """What one round adds, on average."""

    objects: float
    bytes: float

    def __str__(self) -> str:
        return f"{self.objects:.2f} objects, {self.bytes / 1024:.1f} KiB"


def rows(quick: bool) -> Iterator[Row]:
    """Yield a row for blocks, and one for exports."""
    model, x = small_net("hook").eval(), images()
    with torch.no_grad():
        model(x)

    def block() -> None:
        with frozen_spectral_norm(model), torch.no_grad():
            model(x)

    def forward() -> None:
        with torch.no_grad():
            model(x)

    yield _make_row("blocks", quick, 100 if quick else 3000, block, forward, "the forward alone")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.onnx"
        for exporter in ("torchscript", "dynamo"):

            def ours(exporter: str = exporter) -> None:
                export_onnx(model, x, path, exporter=exporter, keep_programs=False)  # type: ignore[arg-type]

            def bare(exporter: str = exporter) -> None:
                with frozen_spectral_norm(model):
                    bare_export(model, (x,), path, exporter)

            count = (10 if exporter == "torchscript" else 4) if quick else 150
            yield _make_row(
                f"exports by {exporter}", quick, count, ours, bare, "torch.onnx.export alone"
            )


def _make_row(
    what: str,
    quick: bool,
    count: int,
    ours: Callable[[], None],
    theirs: Callable[[], None],
    name: str,
) -> Row:
    bare, own = _measure_growth(theirs, count), _measure_growth(ours, count)
    # A few rounds say little of memory: the allocator takes it by the megabyte.
    is_level = own.objects <= max(bare.objects, 0) + 1
    is_level = is_level and (quick or own.bytes <= max(bare.bytes, 0) + _MOST)
    note = f"a round adds {own}; {name}: {bare}"
    failures = [] if is_level else [note]
    return Row(f"{count} {what} in one process", count, count if is_level else 0, note, failures)


def _measure_growth(work: Callable[[], None], count: int) -> _Growth:
    for _ in range(max(2, count // 5)):  # caches fill
        work()
    before = _measure_held()
    for _ in range(count):
        work()
    after = _measure_held()
    return _Growth((after[0] - before[0]) / count, (after[1] - before[1]) / count)


def _measure_held() -> tuple[int, int]:
    gc.collect()
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE
    return len(gc.get_objects()), resident
