"""Interrupts within an export: the block ends before the state around it is put back."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

import faults
import pytest
import torch
from faults import Fault, in_own_thread
from fingerprint import fingerprint
from networks import seed_torch
from torch import nn
from torch.nn.utils import spectral_norm

from sn_export import export_onnx
from sn_export.files import Drafts, publish

OFTEN = (
    "contextlib.py",
    "export.py",
    "publishing.py",
    "quiet.py",
    "torch_exporters.py",
    "undo.py",
)  # each line, of the rest every fifth
SELDOM = ("block.py", "edits.py", "preservation.py")


def interrupted_export(model: nn.Module, path: Path, fault: Fault) -> None:
    """Export under a fault, and look at the model where a user would catch the interrupt."""
    try:
        fault.start()
        export_onnx(model, torch.zeros(1, 2), path, exporter="torchscript", samples=0)
    except KeyboardInterrupt:
        fault.stop()
        fault.while_caught = fingerprint(model)
        fault.while_caught.facts |= _output()
    finally:
        fault.stop()


def _output() -> dict[str, object]:
    device = os.fstat(1)
    return {"stdout": (id(sys.stdout), device.st_dev, device.st_ino), "stderr": id(sys.stderr)}


# Where a with statement ends and has not closed its file yet, Python closes it and prints that.
@pytest.mark.filterwarnings("ignore:.*FileIO:pytest.PytestUnraisableExceptionWarning")
@in_own_thread
def test_interrupt_within_an_export_finds_the_model_restored(tmp_path: Path) -> None:
    """At whichever line of the export and its block an interrupt strikes, the model is whole.

    It stays so when the traceback is dropped, and with it what the interrupt had left suspended:
    torch's exporter puts the model's mode back in a generator of `contextlib`. Nor does any of
    them keep another thread from exporting.
    """
    seed_torch(0)
    model = nn.Sequential(spectral_norm(nn.Linear(2, 2)), nn.BatchNorm1d(2))
    path = tmp_path / "model.onnx"
    interrupted_export(model, path, Fault())  # what is read once is read here
    dry = Fault()
    interrupted_export(model, path, dry)
    steps = [s for s in dry.steps() if Path(dry.places[s - 1][0]).name in OFTEN]
    steps += [s for s in dry.steps() if Path(dry.places[s - 1][0]).name in SELDOM][::5]
    before = fingerprint(model)
    before.facts |= _output()
    failures = []
    for step in steps:
        fault = Fault(KeyboardInterrupt, step)
        interrupted_export(model, path, fault)
        assert fault.struck
        if fault.while_caught is not None:  # not where it was part of a destructor
            failures += [f"{fault.struck}: {d}" for d in before.differences(fault.while_caught)]
        after = fingerprint(model)
        after.facts |= _output()
        failures += [f"afterwards, {fault.struck}: {d}" for d in before.differences(after)]
        assert [entry.name for entry in tmp_path.iterdir()] == ["model.onnx"]
    assert len(steps) > 150
    assert failures == []
    other = threading.Thread(target=interrupted_export, args=(model, path, Fault()), daemon=True)
    other.start()
    other.join(60)
    assert not other.is_alive()


# Where it strikes between a scan of the folder and its with statement, Python 3.13 says so.
@pytest.mark.filterwarnings("ignore:unclosed scandir iterator:ResourceWarning")
@in_own_thread
def test_interrupt_within_drafts_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interrupt at any line, the caller's with statement too, leaves no folder while caught.

    It reaches inside: a folder that the process takes for its own shows nowhere else.
    """
    from sn_export.files import drafts as module

    path = tmp_path / "a"

    def write() -> None:
        with Drafts() as drafts:
            draft = drafts.open(path)
            draft.write_text("a")
            publish([(draft, path)])

    monkeypatch.setattr(faults, "USERS", (*faults.USERS, write.__code__))
    dry = Fault()
    dry.start()
    write()
    dry.stop()
    for step in dry.steps():
        fault = Fault(KeyboardInterrupt, step)
        fault.start()
        try:
            write()
        except KeyboardInterrupt:
            fault.stop()
            left = {entry.name for entry in tmp_path.iterdir()}
            assert left <= {"a"} and not module._own_folders, fault.struck
        finally:
            fault.stop()
    assert len(dry.steps()) > 80
