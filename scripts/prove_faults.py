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
from torch.nn.utils import spectral_norm

from sn_export import export_onnx

_ERRORS: tuple[type[BaseException], ...] = (RuntimeError, KeyboardInterrupt, MemoryError)


def rows(quick: bool) -> Iterator[Row]:
    """Yield a row for each way to raise."""
    for what, run in (("entering", fault_while_entering), ("leaving", fault_while_leaving)):
        yield _block(what, run, stride=20 if quick else 1)
    with tempfile.TemporaryDirectory() as folder:
        earlier, tempfile.tempdir = tempfile.tempdir, folder  # other processes have theirs
        export = _Export(Path(folder) / "target")
        yield export.faults(stride=80 if quick else 1)
        yield export.signals(10 if quick else 200)
        tempfile.tempdir = earlier


def _block(what: str, run: Callable[[nn.Module, Fault], object], stride: int) -> Row:
    tried, failures = 0, list[str]()
    for kind in KINDS:
        model = _layer(kind)
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
                    model = _layer(kind)
                    before = fingerprint(model)
    errors = ", ".join(error.__name__ for error in _ERRORS)
    note = f"{len(KINDS)} kinds of layers; {errors}"
    return Row(f"raise at a line of {what} a block", tried, tried - len(failures), note, failures)


def _layer(kind: str) -> nn.Module:
    seed_torch(0)
    return nn.Sequential(KINDS[kind](nn.Linear(2, 2)))


class _Export:
    """A small export over an earlier file, and what is afterwards not as it was."""

    def __init__(self, folder: Path) -> None:
        seed_torch(0)
        folder.mkdir(exist_ok=True)
        self.folder = folder
        self.model = nn.Sequential(spectral_norm(nn.Linear(2, 2)), nn.BatchNorm1d(2))
        self.before = fingerprint(self.model)
        self.path = folder / "net.onnx"
        self.output = _output()
        self.run()
        self.new = contents(folder)
        self.old = {name: f"an earlier {name}".encode() for name in self.new}

    def run(self) -> None:
        """Export."""
        export_onnx(
            self.model,
            torch.zeros(1, 2),
            self.path,
            exporter="torchscript",
            samples=1,
            overwrite=True,
            per_module=True,
            save_case=self.folder / "net.npz",
        )

    def faults(self, stride: int) -> Row:
        """Raise at each line, with one of the errors in turn."""
        dry = Fault()
        self._attack(dry.start, dry.stop)
        steps = dry.steps()[::stride]
        failures = []
        for number, step in enumerate(steps):
            fault = Fault(_ERRORS[number % len(_ERRORS)], step)
            found = self._attack(fault.start, fault.stop)
            if found:
                failures.append(f"{fault.error.__name__} at {fault.struck}: {found}")
        note = f"{len(set(dry.places))} different lines"
        survived = len(steps) - len(failures)
        return Row("raise at a line within an export", len(steps), survived, note, failures)

    def signals(self, count: int) -> Row:
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
        """Export under attack; say what is damaged, then mend it."""
        fill(self.folder, self.old)
        found = []
        try:
            start()
            self.run()
        except BaseException:
            stop()
            found = [f"while caught, {line}" for line in self._damage()]
        finally:
            stop()
        gc.collect()
        found += self._damage()
        if found:
            fill(self.folder, {})
            self.__init__(self.folder)  # type: ignore[misc]
        return "; ".join(found[:2])[:300]

    def _damage(self) -> list[str]:
        found = self.before.differences(fingerprint(self.model))
        found = [line for line in found if not line.startswith("next hook id")]
        if self.output != _output():
            found.append("standard output or error is still replaced")
        left = sorted(path.name for path in self.folder.iterdir())
        if left != sorted(self.old) or contents(self.folder) not in (self.old, self.new):
            found.append(f"the folder holds {left}")
        if more := [path.name for path in self.folder.parent.iterdir() if path != self.folder]:
            found.append(f"temporary files {sorted(more)}")
        return found


def _output() -> object:
    device = os.fstat(1)
    return sys.stdout, sys.stderr, device.st_dev, device.st_ino
