"""Models on several ranks of this machine; each case is a test."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import rank_cases
import torch
from filelock import FileLock

import sn_export

SUPPORT = Path(rank_cases.__file__)
# Four ranks on two cores are slow: what depends on their number, and one of each kind of torch's.
_ON_FOUR = (
    "block-hook-layers-resharded",
    "block-parametrization-root-kept",
    "block-weight-norm-layers-kept",
    "before-the-first-forward-hook",
    "resharded-to-two",
    "hsdp",
    "error-on-one-rank",
    "exception-in-the-block-on-one-rank",
    "gathered-state-dict",
    "export-refused",
    "tensor-parallel-and-sharded",
)
ON_FOUR = tuple(case for case in _ON_FOUR if case in rank_cases.CASES)
SECONDS = 480  # for all cases together; torch waits for a lost rank for 60


@pytest.fixture(scope="session")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, list[str]]]:
    """Return the failures by number of ranks and case; they run once in a run of the tests."""
    folder = tmp_path_factory.getbasetemp()
    if os.environ.get("PYTEST_XDIST_WORKER"):
        folder = folder.parent  # which the workers share
    file = folder / "ranks.json"
    with FileLock(folder / "ranks.lock"):
        if not file.exists():
            file.write_text("{}")
            on_four = ["4=" + ",".join(ON_FOUR)] if ON_FOUR else []
            done = _run_python(str(SUPPORT), str(file), "2", *on_four)
            assert not done.returncode, f"the ranks ended early:\n{done.stderr[-4000:]}"
    found: dict[str, dict[str, list[str]]] = json.loads(file.read_text())
    return found


def _run_python(*command: str) -> subprocess.CompletedProcess[str]:
    paths = [str(Path(sn_export.__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
    return subprocess.run(
        [sys.executable, *command],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )


@pytest.mark.parametrize(
    "case, ranks", [(case, 2) for case in rank_cases.CASES] + [(case, 4) for case in ON_FOUR]
)
def test_ranks(case: str, ranks: int, results: dict[str, dict[str, list[str]]]) -> None:
    """Each case of `rank_cases`, whose docstring says what it holds, passes on every rank."""
    found = results.get(str(ranks), {})
    assert case in found, f"the ranks ended before '{case}'"
    assert not found[case], "\n".join(found[case])


def test_recipe(tmp_path: Path) -> None:
    """The script of the page on sharded models exports, and a plain network loads what it saves."""
    script, model, state = SUPPORT.parent.parent / "recipes" / "sharded.py", "a.onnx", "plain.pt"
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    forks = ("--start-method=fork", "--run-path")  # which have torch already
    done = _run_python(*torchrun, *forks, str(script), str(tmp_path / model), str(tmp_path / state))
    assert done.returncode == 0, done.stderr[-4000:]
    assert f"proved: {tmp_path / model}" in done.stdout
    assert sorted(torch.load(tmp_path / state)) == ["0.bias", "0.weight", "2.bias", "2.weight"]
    assert sorted(file.name for file in tmp_path.iterdir()) == [model, state]
