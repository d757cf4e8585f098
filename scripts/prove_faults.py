"""Raise at every line of the package, and send signals; the model and the disk are as before."""

from __future__ import annotations

import gc
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from faults import Fault, damage, fault_while_entering, fault_while_leaving
from fingerprint import fingerprint
from kills import contents, fill
from networks import KINDS, seed_torch
from prove_common import Row
from torch import nn
from torch.distributed.checkpoint.state_dict_saver import save as save_distributed
from torch.nn.utils import spectral_norm

from sn_export import export_onnx
from sn_export.checkpoints import convert_checkpoint

_ERRORS: tuple[type[BaseException], ...] = (RuntimeError, KeyboardInterrupt, MemoryError)


def rows(quick: bool) -> Iterator[Row]:
    """Yield a row for each way to raise."""
    for what, run in (("entering", fault_while_entering), ("leaving", fault_while_leaving)):
        yield _attack_blocks(what, run, stride=20 if quick else 1)
    with tempfile.TemporaryDirectory() as folder:
        earlier, tempfile.tempdir = tempfile.tempdir, folder  # other processes have theirs
        for name, prepare in _WRITERS.items():
            writer = _Writer(name, prepare, Path(folder) / name / "target")
            yield writer.raise_at_lines(stride=80 if quick else 1)
            if name == "an export":
                yield writer.send_signals(10 if quick else 200)
        tempfile.tempdir = earlier


def _attack_blocks(what: str, run: Callable[[nn.Module, Fault], object], stride: int) -> Row:
    tried, failures = 0, list[str]()
    for kind in KINDS:
        model = _make_layer(kind)
        run(model, Fault())  # what is read once for each class is read here
        dry = Fault()
        run(model, dry)
        before = fingerprint(model)
        for step in dry.steps()[::stride]:
            for error in _ERRORS:
                fault = Fault(error, step)
                run(model, fault)
                tried += 1
                if found := damage(fault, before, model):
                    failures.append(f"{kind}, {error.__name__}: {found[0]}")
                    model = _make_layer(kind)
                    before = fingerprint(model)
    errors = ", ".join(error.__name__ for error in _ERRORS)
    note = f"{len(KINDS)} kinds of layers; {errors}"
    return Row(f"raise at a line of {what} a block", tried, tried - len(failures), note, failures)


def _make_layer(kind: str) -> nn.Module:
    seed_torch(0)
    return nn.Sequential(KINDS[kind](nn.Linear(2, 2)))


Prepare = Callable[[Path], tuple[nn.Module, Callable[[], object]]]


def _prepare_export(folder: Path) -> tuple[nn.Module, Callable[[], object]]:
    """Return a model, and what exports it with a case."""
    model = nn.Sequential(spectral_norm(nn.Linear(2, 2)), nn.BatchNorm1d(2))
    return model, lambda: export_onnx(
        model,
        torch.zeros(1, 2),
        folder / "net.onnx",
        exporter="torchscript",
        samples=1,
        overwrite=True,
        per_module=True,
        save_case=folder / "net.npz",
    )


def _prepare_convert(name: str) -> Prepare:
    """Return what prepares the conversion of a checkpoint to ``name``, of a folder to a folder."""

    def prepare(folder: Path) -> tuple[nn.Module, Callable[[], object]]:
        model = nn.Sequential(*(spectral_norm(nn.Linear(8, 8)) for _ in range(2)))
        source = folder.parent.parent / ("source" if name == "folder" else "source.pt")
        if name == "folder":
            save_distributed(model.state_dict(), checkpoint_id=source, no_dist=True)
        else:
            torch.save(model.state_dict(), source)
        shards = None if name == "folder" else 400  # bytes each
        return model, lambda: convert_checkpoint(
            source, folder / name, "parametrization", max_shard_size=shards
        )

    return prepare


def _prepare_report(name: str) -> Prepare:
    """Return what prepares saving the report of an export as ``name``."""

    def prepare(folder: Path) -> tuple[nn.Module, Callable[[], object]]:
        model = nn.Sequential(spectral_norm(nn.Conv2d(1, 3, 3, padding=1)))
        onnx = folder / "net.onnx"
        report = export_onnx(model, torch.zeros(1, 1, 8, 8), onnx, exporter="torchscript")
        onnx.unlink()
        return model, lambda: report.save(folder / name)

    return prepare


# What writes files, by what it is called in the table.
_WRITERS: dict[str, Prepare] = {
    "an export": _prepare_export,
    "a conversion to shards": _prepare_convert("net.safetensors"),
    "a conversion to a folder": _prepare_convert("folder"),
    "saving a report as a page": _prepare_report("net.html"),
    "saving a report as JSON": _prepare_report("net.json"),
}


class _Writer:
    """Writes files over earlier ones, and says what is afterwards not as it was.

    Args:
        name: what it does, for the table.
        prepare: makes a model, and what writes files that belong to it into a folder.
        folder: where the files are written.
    """

    def __init__(self, name: str, prepare: Prepare, folder: Path) -> None:
        self.name = name
        self.prepare = prepare
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        earlier = self._prepare(1)
        # A folder is written as a new one.
        self.old = {name: content for name, content in earlier.items() if "/" not in name}
        self._begin()

    def _begin(self) -> None:
        """Make a model that is whole, and note what is to stay as it is."""
        self.new = self._prepare(0)
        gc.freeze()  # what is imported by now is not gone through after each fault
        self.before = fingerprint(self.model)
        self.output = _make_output()

    def _prepare(self, seed: int) -> dict[str, bytes]:
        """Make the model and what writes its files; return what it writes."""
        seed_torch(seed)
        fill(self.folder, {})
        self.model, self.run = self.prepare(self.folder)
        self.run()
        return self._read()

    def _read(self) -> dict[str, bytes]:
        """Return what is in the folder; torch gives metadata another number at each writing."""
        found = contents(self.folder)
        return {name: b"" if name.endswith(".metadata") else found[name] for name in found}

    def raise_at_lines(self, stride: int) -> Row:
        """Raise at each line, with one of the errors in turn."""
        dry = Fault()
        self._attack(dry.start, dry.stop)
        if self._read() != self.new:
            raise RuntimeError(f"{self.name} fails where nothing is raised")
        steps = dry.steps()[::stride]
        failures = []
        for number, step in enumerate(steps):
            fault = Fault(_ERRORS[number % len(_ERRORS)], step)
            found = self._attack(fault.start, fault.stop)
            if found:
                failures.append(f"{fault.error.__name__} at {fault.struck}: {found}")
        note = f"{len(set(dry.places))} different lines"
        survived = len(steps) - len(failures)
        return Row(f"raise at a line within {self.name}", len(steps), survived, note, failures)

    def send_signals(self, count: int) -> Row:
        """Interrupt by a real signal at random moments."""
        start = time.perf_counter()
        self.run()
        took = time.perf_counter() - start
        chance, hit, failures = random.Random(0), 0, []

        def interrupt(*_: object) -> None:
            nonlocal hit
            hit += 1
            raise KeyboardInterrupt

        earlier = signal.signal(signal.SIGALRM, interrupt)
        for _ in range(count):
            moment = chance.uniform(1e-4, took)
            found = self._attack(
                lambda moment=moment: signal.setitimer(signal.ITIMER_REAL, moment),  # type: ignore[misc]
                lambda: signal.setitimer(signal.ITIMER_REAL, 0),
            )
            if found:
                failures.append(f"after {moment:.4f} s: {found}")
        signal.signal(signal.SIGALRM, earlier)
        note = f"{hit} came within the export"
        survived = count - len(failures)
        return Row("signal at a random moment of an export", count, survived, note, failures)

    def _attack(self, start: Callable[[], object], stop: Callable[[], object]) -> str:
        """Write under attack; say what is damaged, then mend it."""
        fill(self.folder, self.old)
        found = []
        try:
            start()
            self.run()
        except BaseException:
            stop()
            found = [f"while caught, {line}" for line in self._list_damage()]
        finally:
            stop()
        gc.collect()
        found += self._list_damage()
        if found:
            self._begin()
        return "; ".join(found[:2])[:300]

    def _list_damage(self) -> list[str]:
        found = self.before.differences(fingerprint(self.model))
        found = [line for line in found if not line.startswith("next hook id")]
        if self.output != _make_output():
            found.append("standard output or error is still replaced")
        left = sorted(path.name for path in self.folder.iterdir())
        is_known = self._read() in (self.old, self.new)
        if not is_known or any(name.startswith(".") for name in left):
            found.append(f"the folder holds {left}")
        if more := [path.name for path in self.folder.parent.iterdir() if path != self.folder]:
            found.append(f"temporary files {sorted(more)}")
        return found


def _make_output() -> object:
    device = os.fstat(1)
    return sys.stdout, sys.stderr, device.st_dev, device.st_ino
