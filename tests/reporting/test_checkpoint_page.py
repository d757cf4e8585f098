"""The page of ``sn-export inspect``: stored sigma beside the true one, and names as text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from browser import BROWSER, look
from cli_running import Run, runner
from report_contents import NASTY
from torch import nn
from torch.nn.utils import spectral_norm

from sn_export.reporting import inspection_to_html


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command line in an otherwise empty folder."""
    return runner(tmp_path, monkeypatch, capsys)


@pytest.mark.parametrize("layers", [2, 25])
def test_page_and_content(run: Run, layers: int) -> None:
    """The page has every layer's sigma, past 20 with an overview; its JSON is that of --json."""
    net = nn.Sequential(*(spectral_norm(nn.Linear(3, 4)) for _ in range(layers)))
    torch.save(net.state_dict(), "net.pt")
    ran = run("inspect", "net.pt", "--report", "net.html", "--json")
    assert ran.code == 0
    found = json.loads(ran.out)
    page = Path("net.html").read_text("utf-8")
    values = [layer[name] for layer in found["layers"] for name in ("sigma", "sigma_exact")]
    assert all(f"{value:.6g}" in page for value in values)
    assert ("as an overview" in page) == (layers > 20)
    assert run("inspect", "net.pt", "--report", "net.json").code == 0
    assert json.loads(Path("net.json").read_text("utf-8")).items() >= found.items()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("net.pt", "--report", "a.md"), "must end in one of .json, .html, got 'a.md'"),
        (("net.pt", "--report", "no/a.html"), "no"),
        (("net.onnx", "--report", "a.html"), "leave out --report"),
    ],
)
def test_what_cannot_be_written(run: Run, options: tuple[str, ...], message: str) -> None:
    """A report that cannot be written has exit code 2 before the checkpoint is read."""
    for name in ("net.pt", "net.onnx"):
        Path(name).write_bytes(b"")
    ran = run("inspect", *options)
    assert (ran.code, message in ran.err) == (2, True)


def hostile() -> dict[str, Any]:
    """Return the content of a file whose names are markup."""
    layer = {
        "module": NASTY,
        "tensor": "weight",
        "group": "spectral_norm",
        "spelling": "hook",
        "shape": [3, 3],
        "dim": None,
        "sigma": 1.25,
        "sigma_exact": None,
        "meaning": NASTY,
        "key": "",
    }
    texts = {"path": NASTY, "format": "torch", "key": NASTY, "notes": [NASTY], "command": NASTY}
    other = {**layer, "group": "pruning", "sigma": None}
    return {**texts, "tensors": 3, "layers": [layer, other, {**layer, "sigma": "inf"}]}


def test_names_are_only_text() -> None:
    """No name in a file becomes markup, and a missing key of the content is named."""
    page = inspection_to_html(hostile())
    assert "<script>" not in page and "<img" not in page
    with pytest.raises(ValueError, match="layers"):
        inspection_to_html({})


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on PATH")
def test_on_a_phone(tmp_path: Path) -> None:
    """On a phone nothing is wider than the page, and every text has contrast."""
    found = look(inspection_to_html(hostile()), tmp_path, width=390)
    assert found["width"] <= 390 and found["poor"] == []
