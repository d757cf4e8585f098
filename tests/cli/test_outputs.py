"""Places where a command cannot write: exit code 2, one message, and nothing is changed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_running import CRITIC, Run, names, runner

COMMANDS = {
    "onnx": (["onnx", "a.pt", *CRITIC, "-o"], ".onnx"),
    "report": (["onnx", "a.pt", *CRITIC, "-o", "o.onnx", "--report"], ".html"),
    "case": (["onnx", "a.pt", *CRITIC, "-o", "o.onnx", "--save-case"], ".npz"),
    "convert": (["convert", "a.pt", "--to", "plain", "-o"], ".safetensors"),
}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command line in a folder with a checkpoint."""
    return runner(tmp_path, monkeypatch, capsys)


ENDS: dict[str, tuple[Callable[[Path], object], str]] = {
    "pipe": (os.mkfifo, "it is no regular file"),
    "device": (lambda path: path.symlink_to("/dev/null"), "it is no regular file"),
    "loop": (lambda path: path.symlink_to(path.name), "Too many levels of symbolic links"),
    "folder": (Path.mkdir, "it is a folder"),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("end", ENDS)
def test_no_file_can_be_there(run: Run, command: str, end: str) -> None:
    """Every command refuses each kind of place with the same message, before the long work."""
    arguments, suffix = COMMANDS[command]
    make, reason = ENDS[end]
    target = Path(f"end{suffix}")
    make(target)
    before = names()
    ran = run(*arguments, target)
    assert (ran.code, ran.out) == (2, "")
    assert ran.err == f"sn-export: cannot write '{target}': {reason}\n"
    assert names() == before


@pytest.mark.parametrize("command", COMMANDS)
def test_name_that_is_too_long(run: Run, command: str) -> None:
    """A name that is too long is refused with the words of the disk."""
    arguments, suffix = COMMANDS[command]
    target = Path("x" * 256 + suffix)
    ran = run(*arguments, target)
    assert (ran.code, ran.out) == (2, "")
    assert ran.err == f"sn-export: cannot write '{target}': File name too long\n"
    assert names() == ["a.pt"]
