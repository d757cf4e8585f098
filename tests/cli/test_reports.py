"""What ``sn-export onnx`` writes beside the file: reports, cases, metadata and notes.

`collect_warnings` is called inside, with warnings that no network gives on demand.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from cli_networks import Unknown, trained_critic
from cli_running import CRITIC, ONNX, Run, names, runner
from safetensors.torch import save_file

import sn_export
from sn_export.cli.console import collect_warnings

EXACT = ("--rtol", "0", "--atol", "0")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command line in an otherwise empty folder with the checkpoint ``a.pt``."""
    return runner(tmp_path, monkeypatch, capsys)


@pytest.mark.parametrize("suffix", ["html", "md", "json"])
@pytest.mark.parametrize("failed", [False, True], ids=["passed", "failed"])
def test_report(suffix: str, failed: bool, run: Run) -> None:
    """A report of each format is written with the command line, also if the proof failed."""
    ran = run(*ONNX, "--report", f"r.{suffix}", *(EXACT if failed else ()))
    assert ran.code == int(failed)
    assert names() == (["a.pt"] if failed else ["a.pt", "o.onnx"]) + [f"r.{suffix}"]
    text = Path(f"r.{suffix}").read_text("utf-8")
    if suffix == "json":
        content = json.loads(text)
        assert content["path"] == (None if failed else "o.onnx")
        assert content["parity"]["passed"] is not failed
        assert content["command"].startswith("sn-export onnx a.pt --model cli_networks:critic")
        assert failed or content["frozen"][0]["sigma_exact"] is None
    else:
        assert ("Not proved" if failed else "Proved") in text
        assert "sn-export onnx a.pt --model" in text
        assert "body.3" in text  # modules are compared for those who look


def test_pictured_reports_have_true_sigma(run: Run) -> None:
    """A report for people has the true sigma and compares the modules."""
    ran = run(*ONNX, "--report", "r.html", "--json")
    content = json.loads(ran.out)
    assert all(one["sigma_exact"] > 0 for one in content["frozen"])
    assert len(content["parity"]["modules"]) > 5


def test_per_module(run: Run) -> None:
    """--per-module shows the table of modules although all are equal."""
    ran = run(*ONNX, "--per-module")
    assert ran.code == 0
    assert "modules in network order" in ran.out
    assert "body.3" in ran.out.split("modules in network order")[1]


def test_a_report_that_cannot_be_written(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the report cannot be written, the proved file stays, and the message says so."""

    def full(*args: Any, **options: Any) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sn_export.reporting.save_report", full)
    ran = run(*ONNX, "--report", "r.md")
    assert (ran.code, ran.out) == (2, "")
    assert ran.err == (
        "sn-export: cannot write 'r.md': No space left on device; 'o.onnx' was proved and written "
        "all the same\n"
    )
    assert names() == ["a.pt", "o.onnx"]


def test_metadata_and_source(run: Run) -> None:
    """The file has the metadata asked for and the hash of the checkpoint."""
    ran = run(*ONNX, "--metadata", "run=42", "--metadata", "formula=a=b")
    assert ran.code == 0
    found = {entry.key: entry.value for entry in onnx.load("o.onnx").metadata_props}
    assert (found["run"], found["formula"]) == ("42", "a=b")
    assert found["sn_export.source_sha256"] == hashlib.sha256(Path("a.pt").read_bytes()).hexdigest()


def test_shards_have_no_single_source(run: Run) -> None:
    """The hash of an index says nothing about the weights, so the file has no hash."""
    shards = {"one.safetensors": ["head."], "two.safetensors": ["body."]}
    state = trained_critic().state_dict()
    index: dict[str, str] = {}
    for file, (start,) in shards.items():
        part = {name: value.contiguous() for name, value in state.items() if name.startswith(start)}
        save_file(part, file)
        index |= dict.fromkeys(part, file)
    Path("m.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    ran = run("onnx", "m.safetensors.index.json", *CRITIC, "-o", "o.onnx", "--samples", "0")
    assert ran.code == 0, ran.err
    keys = [entry.key for entry in onnx.load("o.onnx").metadata_props]
    assert "sn_export.frozen" in keys
    assert "sn_export.source_sha256" not in keys


BAD: dict[str, tuple[list[str], str]] = {
    "report suffix": (
        ["--report", "r.txt"],
        "the name of this report must end in one of .json, .html, .md, got 'r.txt'",
    ),
    "report is a folder": (["--report", "folder.md"], "cannot write 'folder.md': it is a folder"),
    "report is output": (
        ["-o", "o.md", "--report", "o.md"],
        "--report must be another file than -o, both are 'o.md'",
    ),
    "report is data": (
        ["-o", "o.onnx", "--report", "o.onnx.data"],
        "--report must be another file than the external data of -o, both are 'o.onnx.data'",
    ),
    "report is case": (
        ["--report", "r.md", "--save-case", "./r.md"],
        "--save-case must be another file than --report, both are 'r.md'",
    ),
    "report is checkpoint": (
        ["--report", "a.pt"],
        "--report must be another file than the checkpoint, both are 'a.pt'",
    ),
    "output is checkpoint": (
        ["-o", "a.pt"],
        "-o must be another file than the checkpoint, both are 'a.pt'",
    ),
    "output is input": (
        ["-o", "in.npz", "--input-file", "in.npz"],
        "-o must be another file than --input-file, both are 'in.npz'",
    ),
    "case is input": (
        ["--save-case", "in.npz", "--input-file", "in.npz"],
        "--save-case must be another file than --input-file, both are 'in.npz'",
    ),
    "metadata": (
        ["--metadata", "run"],
        "--metadata must be KEY=VALUE such as run=42, got 'run'",
    ),
    "metadata twice": (
        ["--metadata", "run=1", "--metadata", "run=2"],
        "--metadata gives 'run' twice: '1' and '2'",
    ),
    "metadata of ours": (
        ["--metadata", "sn_export.x=1"],
        "metadata needs keys that do not begin with 'sn_export.', got 'sn_export.x'",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_refused_before_anything_runs(name: str, run: Run) -> None:
    """Bad options have exit code 2 and one message before the model is imported."""
    np.savez("in.npz", np.zeros((2, 3, 8, 8), np.float32))
    Path("folder.md").mkdir()
    before = {path: path.read_bytes() for path in Path.cwd().iterdir() if path.is_file()}
    options, message = BAD[name]
    target = [] if "-o" in options else ["-o", "o.onnx"]
    ran = run("onnx", "a.pt", "--model", "absent:net", *CRITIC[2:], *options, *target)
    assert (ran.code, ran.out, ran.err) == (2, "", f"sn-export: {message}\n")
    assert {path: path.read_bytes() for path in Path.cwd().iterdir() if path.is_file()} == before


def test_suspects_and_folded_weights(run: Run) -> None:
    """Suspects and folded weights are in the JSON and in notes on stderr."""
    torch.save(Unknown().state_dict(), "u.pt")
    arguments = ["onnx", "u.pt", "--model", "cli_networks:Unknown", "--input", "2x3"]
    ran = run(*arguments, "-o", "u.onnx", "--json")
    content = json.loads(ran.out)
    assert ran.code == 0
    (suspect,) = content["suspects"]
    assert (suspect["module"], suspect["class_name"]) == ("", "Unknown")
    assert [one["name"] for one in content["folded"] if one["is_weight"]] == ["weight"]
    lines = ran.err.splitlines()
    assert len(lines) == len(content["notes"]) == 2
    assert lines[0].startswith("sn-export: note: the model itself (Unknown: ")
    assert "looks like a spectral norm that is not known" in lines[0]
    assert lines[1].startswith("sn-export: note: the model computes 'weight' by itself")
    assert [line.removeprefix("sn-export: note: ") for line in lines] == content["notes"]


_WARNINGS = [name for name in sn_export.__all__ if name.endswith("Warning")]


@pytest.mark.parametrize("name", _WARNINGS)
def test_every_warning_of_ours_is_a_note(name: str) -> None:
    """A warning of sn_export is kept once, also where warnings are errors; others are not kept."""
    with collect_warnings() as notes:
        for _ in range(2):
            warnings.warn("told", getattr(sn_export, name), stacklevel=1)
        with pytest.raises(UserWarning, match="of others"):
            warnings.warn("of others", UserWarning, stacklevel=1)
    assert notes == ["told"]


_WITH_AN_OBJECT = """
from types import SimpleNamespace
from torch import nn
class Layer(nn.Linear):
    def forward(self, x):
        y = super().forward(x)
        return y, SimpleNamespace(mean=y)
"""


def test_what_is_left_out_of_the_file_is_a_note(run: Run) -> None:
    """An output that no exporter sees is named in one note on stderr, and in the JSON."""
    Path("object_of_a_test.py").write_text(_WITH_AN_OBJECT)
    torch.save(torch.nn.Linear(3, 2).state_dict(), "l.pt")
    ran = run("onnx", "l.pt", "--model", "object_of_a_test:Layer", "--input", "2x3",
              "--model-kwargs", '{"in_features": 3, "out_features": 2}',
              "-o", "l.onnx", "--json")  # fmt: skip
    assert ran.code == 0
    (line,) = ran.err.splitlines()
    assert line.startswith("sn-export: note: the file lacks the tensors within ")
    assert json.loads(ran.out)["notes"] == [line.removeprefix("sn-export: note: ")]


def test_what_the_model_prints_is_no_answer(run: Run) -> None:
    """Prints of factory and forward go to stderr."""
    torch.save(Unknown().state_dict(), "u.pt")
    arguments = ["onnx", "u.pt", "--model", "cli_networks:chatty", "--input", "2x3"]
    ran = run(*arguments, "-o", "u.onnx", "--json")
    assert ran.code == 0
    assert json.loads(ran.out)["path"] == "u.onnx"
    assert "building a network" in ran.err


def test_exporters_tried_before(run: Run) -> None:
    """If the first exporter fails, a note gives its error."""
    torch.save(Unknown().state_dict(), "u.pt")
    arguments = ["onnx", "u.pt", "--model", "cli_networks:untraceable", "--input", "2x3"]
    ran = run(*arguments, "-o", "u.onnx", "--json")
    content = json.loads(ran.out)
    assert (ran.code, content["exporter"]) == (0, "torchscript")
    assert [attempt["exporter"] for attempt in content["attempts"]] == ["dynamo"]
    assert "sn-export: note: the dynamo exporter was tried first: " in ran.err
