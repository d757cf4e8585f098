"""A file says what made it, the same way every time, and nothing of the machine.

Two functions are called inside: the metadata and hash of files that no export makes.
"""

from __future__ import annotations

import datetime
import getpass
import hashlib
import json
import os
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from export_models import EXPORTERS, Head, Raising, contents_of, images, rows, small_net

from sn_export import SpectralNormInfo, export_onnx, find_spectral_norm
from sn_export.exporting.onnx_file import compute_sha256, make_metadata


def _metadata(path: Path) -> dict[str, str]:
    entries = onnx.load(path, load_external_data=False).metadata_props
    found = {entry.key: entry.value for entry in entries}
    assert len(found) == len(entries)
    return found


@pytest.mark.parametrize("exporter", EXPORTERS)
@pytest.mark.parametrize("external", [True, False])
def test_what_made_the_file(tmp_path: Path, exporter: str, external: bool) -> None:
    """The file names the exporter, the packages, and each frozen tensor with its sigma."""
    model, path = small_net("hook"), tmp_path / "net.onnx"
    report = export_onnx(model, images(), path, exporter=exporter, external_data=external)
    found = _metadata(path)
    assert found == report.metadata
    assert found["sn_export.exporter"] == exporter
    versions = json.loads(found["sn_export.versions"])
    assert versions == dict(report.versions)
    assert versions["torch"] == metadata.version("torch")
    sigmas = json.loads(found["sn_export.frozen"])
    assert list(sigmas) == ["0.weight", "4.weight"]
    for info in find_spectral_norm(model):
        assert sigmas[info.name] == pytest.approx(info.sigma, rel=1e-5)
    assert "sn_export.source_sha256" not in found


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_producer_is_torch(tmp_path: Path, exporter: str) -> None:
    """Tools that go by the producer's name find the one that made the graph."""
    path = tmp_path / "net.onnx"
    export_onnx(Head(), rows(), path, exporter=exporter)
    file = onnx.load(path)
    assert file.producer_name == "pytorch"
    assert torch.__version__.startswith(file.producer_version)


def test_own_metadata_and_source(tmp_path: Path) -> None:
    """Own keys are written in alphabetical order, beside the checkpoint's hash."""
    source = tmp_path / "checkpoint.pt"
    source.write_bytes(os.urandom(3 * 2**20 + 7))
    path = tmp_path / "net.onnx"
    own = {"licence": "MIT", "author": "Ada Lövelace", "empty": ""}
    export_onnx(Head(), rows(), path, exporter="torchscript", metadata=own, source=str(source))
    found = _metadata(path)
    assert own.items() <= found.items()
    assert list(found) == sorted(found)
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    assert found["sn_export.source_sha256"] == digest == compute_sha256(source)
    assert "checkpoint" not in path.read_bytes().decode("latin-1")


def test_sigma_that_is_no_number(tmp_path: Path) -> None:
    """A sigma that is not finite is null, so that the JSON stays standard."""
    infos = [
        SpectralNormInfo("a", "weight", "hook", (1,), "float32", 0, None, 1, sigma)
        for sigma in (float("nan"), float("inf"))
    ]
    assert make_metadata("dynamo", {}, infos[:1], None, {})["sn_export.frozen"] == (
        '{"a.weight": null}'
    )
    assert "null" in make_metadata("dynamo", {}, infos[1:], None, {})["sn_export.frozen"]


_BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "text": ("a=b", TypeError, "metadata must be a mapping of text to text, got 'a=b'"),
    "number": ({"a": 1}, TypeError, "metadata must be a mapping of text to text, got 'a': 1"),
    "key": ({1: "a"}, TypeError, "metadata must be a mapping of text to text, got 1: 'a'"),
    "empty": (
        {"": "a"},
        ValueError,
        "metadata needs keys that do not begin with 'sn_export.', got ''",
    ),
    "reserved": (
        {"sn_export.frozen": "{}"},
        ValueError,
        "metadata needs keys that do not begin with 'sn_export.', got 'sn_export.frozen'",
    ),
    "surrogate": ({"a": "\ud800"}, ValueError, "metadata must be valid Unicode, got '\\ud800'"),
}


@pytest.mark.parametrize(("given", "error", "message"), _BAD.values(), ids=_BAD)
def test_bad_metadata(tmp_path: Path, given: Any, error: type[Exception], message: str) -> None:
    """What cannot be written is told word for word before the model runs."""
    with pytest.raises(error) as caught:
        export_onnx(Raising(), rows(), tmp_path / "net.onnx", metadata=given)
    assert str(caught.value) == message


def test_absent_source(tmp_path: Path) -> None:
    """A checkpoint that is not there is named before the model runs."""
    absent = tmp_path / "absent.pt"
    with pytest.raises(FileNotFoundError) as caught:
        export_onnx(Raising(), rows(), tmp_path / "net.onnx", source=absent)
    assert str(caught.value) == f"source must be a file, there is none at '{absent}'"


_SCRIPT = """
import sys
from pathlib import Path
sys.path[:0] = sys.argv[2:]
import torch
from export_models import images, small_net
from sn_export import export_onnx
torch.manual_seed(4)
model = small_net("parametrization")
for exporter in ("dynamo", "torchscript"):
    target = Path(sys.argv[1]) / (exporter + ".onnx")
    case = target.with_suffix(".npz")
    own = dict.fromkeys({"b", "a", "c", "d"}, "x")
    export_onnx(model, images(), target, exporter=exporter, metadata=own, save_case=case)
"""


def test_same_bytes_whatever_the_hash_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process with another hash seed, so other orders of a set, elsewhere writes the same."""
    tests = Path(__file__).parent.parent
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    subprocess.run(
        [sys.executable, "-c", _SCRIPT, str(there), str(tests / "support"), str(tests.parent)],
        cwd=there,
        env={**os.environ, "PYTHONHASHSEED": "12345"},
        check=True,
    )
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", ["", str(here)])
        exec(_SCRIPT, {})
    assert contents_of(here) == contents_of(there)
    assert sorted(contents_of(here)) == [
        "dynamo.npz",
        "dynamo.onnx",
        "torchscript.npz",
        "torchscript.onnx",
    ]


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_nothing_of_the_machine(tmp_path: Path, exporter: str) -> None:
    """No path, user, host or date is in the file, wherever its checkpoint lies."""
    source = tmp_path / "a-checkpoint-of-mine.pt"
    source.write_bytes(b"weights")
    path = tmp_path / "net.onnx"
    export_onnx(Head(), rows(), path, exporter=exporter, source=source, metadata={"a": "b"})
    content = path.read_bytes()
    year = str(datetime.date.today().year)
    for text in (
        str(tmp_path),
        source.stem,
        str(Path.cwd()),
        sys.prefix,
        socket.gethostname(),
        f"{getpass.getuser()}@",
        f"{year}-",
        f"{year}/",
    ):
        assert text.encode() not in content, text
