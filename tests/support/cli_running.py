"""Run the command line in the process of the test, as a shell would."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from cli_networks import trained_critic

from sn_export.cli import main

CRITIC = ["--model", "cli_networks:critic", "--input", "2x3x8x8"]
ONNX = ["onnx", "a.pt", *CRITIC, "-o", "o.onnx"]


@dataclass
class Ran:
    """What a command left behind."""

    code: int
    out: str
    err: str


Run = Callable[..., Ran]


def runner(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Run:
    """Return what runs a command line in ``folder``, which holds the checkpoint ``a.pt``."""
    monkeypatch.chdir(folder)
    torch.save(trained_critic().state_dict(), "a.pt")

    def call(*arguments: str | Path) -> Ran:
        monkeypatch.setattr(sys, "argv", ["sn-export", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
        shown = capsys.readouterr()
        return Ran(int(caught.value.code or 0), shown.out, shown.err)

    return call


def names() -> list[str]:
    """Return what is in the current folder."""
    return sorted(path.name for path in Path.cwd().iterdir())
