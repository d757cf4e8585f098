"""The README: its examples run, its names and links are there, and it is short enough to read.

The command's `app` is taken from inside: it alone knows the options.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import typer

import sn_export
from sn_export.cli import main
from sn_export.cli.app import app

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
PAGES = sorted(
    page
    for page in ROOT.rglob("*.md")
    if not any(part == "build" or part.startswith(".") for part in page.relative_to(ROOT).parts)
)


def _environment(folder: Path) -> dict[str, str]:
    """Put ``pytest``, with the plugin of this checkout, on a PATH, installed or not."""
    folder.mkdir()
    installed = any(e.name == "sn_export" for e in metadata.entry_points(group="pytest11"))
    plugin = "" if installed else "-p sn_export.pytest_plugin"
    (folder / "pytest").write_text(f'#!/bin/sh\nexec {sys.executable} -m pytest {plugin} "$@"\n')
    (folder / "pytest").chmod(0o755)
    return {
        **os.environ,
        "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }


def _run(command: str, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> int:
    """Return the exit code; ``sn-export`` runs in this process, which spares importing torch."""
    program, *arguments = shlex.split(command)
    if program != "sn-export":
        return subprocess.run(command, shell=True, env=environment).returncode
    monkeypatch.setattr(sys, "argv", [program, *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    return int(caught.value.code or 0)


def test_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read from the top, each example runs: files are written, code and commands are executed."""
    environment = _environment(tmp_path / "bin")
    project = tmp_path / "project"
    project.mkdir()
    monkeypatch.chdir(project)
    monkeypatch.syspath_prepend(str(project))
    namespace: dict[str, Any] = {}
    ran = 0
    monkeypatch.delitem(sys.modules, "nets", raising=False)
    for language, content in BLOCKS:
        named = re.match(r"# (\w+\.py)\n", content)
        if named:
            (project / named[1]).write_text(content)
        elif language == "python":
            exec(compile(content, f"README.md, example {ran}", "exec"), namespace)
        commands = re.findall(r"^\$ (.*)$", content, re.MULTILINE) if language == "console" else []
        for command in commands:
            assert _run(command, monkeypatch, environment) == 0, command
        ran += language == "python" or bool(commands)
    assert ran >= 6
    made = {"critic.onnx", "report.html", "hook.pt", "parity"}
    assert made <= {path.name for path in project.iterdir()}


def test_length() -> None:
    """A person reads it to the end."""
    assert len(TEXT.splitlines()) <= 180


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_paths(page: Path) -> None:
    """What a page links to, or names as a path of this repository, is there."""
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?:)([^)#]+)", text)
    paths = re.findall(r"`((?:sn_export|tests|scripts)/[\w/.-]+)", text)
    missing = [link for link in links if not (page.parent / link).exists()]
    missing += [path for path in paths if not (ROOT / path).exists()]
    assert not missing


def test_options_and_names() -> None:
    """Every option and every public name of the pages is one."""
    group = typer.main.get_command(app)
    commands = group.commands.values()  # type: ignore[attr-defined]
    options = {
        name
        for command in (group, *commands)
        for p in command.params
        for name in (*p.opts, *p.secondary_opts)
    }
    elsewhere = "".join(
        (ROOT / path).read_text()
        for path in (
            "sn_export/pytest_plugin.py",
            "scripts/test",
            "scripts/bench.py",
            "scripts/prove.py",
        )
    )
    elsewhere += "--strict --help --write"  # of mypy, of every command, of golden_graphs.py
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for option in set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)):
            assert option in options or option in elsewhere, f"{page.name}: {option}"
    for _, content in BLOCKS:
        for names in re.findall(r"from sn_export import (.*)", content):
            assert {*names.split(", ")} <= {*sn_export.__all__}


def test_floors() -> None:
    """The picture of the floors is the one that import-linter holds."""
    layers = re.search(
        r"^layers = \[\n(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.M | re.S
    )
    picture = next(content for language, content in BLOCKS if language == "text")
    assert layers is not None
    wanted = [re.findall(r"\w+", line) for line in layers[1].splitlines()]
    drawn = [line.split("  ", 1)[1] for line in picture.splitlines()]
    for names, line in zip(wanted, drawn, strict=True):
        assert all(re.search(rf"\b{name}\b", line) for name in names), (names, line)
