"""The GitHub Actions recipe: its commands are run here as a runner runs them."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml
from export_models import Head, rows

from sn_export import export_onnx

RECIPE = Path(__file__).parent / "recipes" / "parity.yml"
ROOT = Path(__file__).resolve().parent.parent
_IS_INSTALLED = any(e.name == "sn_export" for e in metadata.entry_points(group="pytest11"))

TEST = """
import torch
from torch import nn
from torch.nn.utils.spectral_norm import spectral_norm

class Critic(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = spectral_norm(nn.Linear(3, 1))
    def forward(self, x):
        return self.head(x) + ({lie} if torch.jit.is_tracing() else 0)

def test_critic(assert_onnx_parity):
    assert_onnx_parity(Critic().eval(), (torch.randn(2, 3),), exporter="torchscript")
"""


def _steps() -> list[dict[str, Any]]:
    workflow = yaml.safe_load(RECIPE.read_text())
    assert workflow[True] == ["push", "pull_request"]  # YAML 1.1 reads the key "on" as true
    assert workflow["permissions"] == {"contents": "read"}
    (job,) = workflow["jobs"].values()
    assert job["runs-on"] == "ubuntu-latest"
    steps: list[dict[str, Any]] = job["steps"]
    return steps


def _run(project: Path, failed: bool) -> tuple[dict[str, int], str]:
    """Run the steps, and return their exit codes by name and the summary."""
    tools = project / "bin"
    tools.mkdir()
    plugin = "" if _IS_INSTALLED else "-p sn_export.pytest_plugin"
    (tools / "pytest").write_text(f'#!/bin/sh\nexec {sys.executable} -m pytest {plugin} "$@"\n')
    (tools / "pytest").chmod(0o755)
    (tools / "sn-export").write_text(f'#!/bin/sh\nexec {sys.executable} -m sn_export "$@"\n')
    (tools / "sn-export").chmod(0o755)
    cases = project / "tests" / "cases"
    cases.mkdir(parents=True)
    export_onnx(Head(), rows(), cases / "head.onnx", save_case=cases / "head.npz", samples=1)
    (project / "tests" / "test_onnx.py").write_text(TEST.format(lie=int(failed)))
    summary = project / "summary.md"
    environment = {
        **os.environ,
        "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "GITHUB_STEP_SUMMARY": str(summary),
    }
    codes: dict[str, int] = {}
    for step in _steps():
        if "run" not in step or step["name"] == "Install":  # what needs the network
            continue
        # A step runs while all went well, or says that it does so regardless.
        if any(codes.values()) and step.get("if") != "${{ !cancelled() }}":
            continue
        command = ["bash", "-eo", "pipefail", "-c", step["run"]]
        codes[step["name"]] = subprocess.run(
            command, cwd=project, env=environment, capture_output=True
        ).returncode
    return codes, summary.read_text(encoding="utf-8")


@pytest.mark.parametrize("failed", [False, True], ids=["passed", "failed"])
def test_commands(tmp_path: Path, failed: bool) -> None:
    """The job is red where parity fails, and the summary is written either way."""
    codes, summary = _run(tmp_path, failed)
    # A step that fails is the end of those that do not say otherwise.
    cases = {} if failed else {"Committed cases": 0}
    assert codes == {"Export, prove, restore": int(failed), **cases, "Summary": 0}
    assert ("❌ Not proved" if failed else "✅ Proved") in summary
    assert "`head.weight`" in summary or failed
    (upload,) = (s for s in _steps() if str(s.get("uses")).startswith("actions/upload-artifact@"))
    assert upload["if"] == "${{ !cancelled() }}"
    made = {path.suffix for path in (tmp_path / upload["with"]["path"]).iterdir()}
    assert made == {".html", ".json", ".md"}
