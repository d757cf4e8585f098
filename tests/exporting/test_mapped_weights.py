"""Programs of a large export read their weights from its file, as if they held them in memory."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from export_models import KINDS, images, small_net
from torch import Tensor, nn

from sn_export import ExportReport, check_parity, export_onnx, frozen_spectral_norm
from sn_export.files import side_file
from sn_export.running import tensor_layouts

DTYPES = {"float32": torch.float32, "float16": torch.float16}


@pytest.fixture(autouse=True)
def _everything_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_layouts, "LARGE", 0)


def _wide(kind: str, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    # onnx keeps tensors of a few hundred bytes in the file itself.
    net = nn.Sequential(small_net(kind), nn.Linear(3, 200), nn.Linear(200, 3))
    return net.to(dtype).eval()


def _export(model: nn.Module, x: Tensor, path: Path) -> ExportReport:
    return export_onnx(model, (x,), path, exporter="dynamo", external_data=True)


def _frozen(model: nn.Module) -> dict[str, Tensor]:
    with frozen_spectral_norm(model):
        return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def _weights(report: ExportReport) -> dict[str, Tensor]:
    assert report.exported_program is not None
    return dict(report.exported_program.state_dict)


def _mapped(report: ExportReport) -> set[str]:
    """The weights that lie in the memory of a mapped side file."""
    ranges = [
        range(*(int(address, 16) for address in line.split()[0].split("-")))
        for line in Path("/proc/self/maps").read_text().splitlines()
        if side_file(report.path).name in line
    ]
    weights = _weights(report)
    return {n for n, w in weights.items() if any(w.data_ptr() in one for one in ranges)}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_frozen_weights_alone_are_mapped(tmp_path: Path, kind: str, dtype: str) -> None:
    """What the model holds itself stays its own; the rest has the bits of the frozen network."""
    model = _wide(kind, DTYPES[dtype])
    report = _export(model, images().to(DTYPES[dtype]), tmp_path / "net.onnx")
    weights = _weights(report)
    own = {name: tensor for name, tensor in model.named_parameters() if name in weights}
    assert own and all(weights[name] is tensor for name, tensor in own.items())
    in_side_file = {
        entry.name
        for entry in onnx.load(report.path, load_external_data=False).graph.initializer
        if entry.external_data
    }
    assert _mapped(report) == in_side_file - set(own) != set()
    wanted = _frozen(model)
    for name in weights:
        assert torch.equal(weights[name], wanted[name]), name


def test_programs_outlive_their_file(tmp_path: Path) -> None:
    """With the file replaced and then deleted, both programs are still those of the first."""
    first, x = _wide("hook"), images()
    with torch.no_grad():
        wanted = first(x)
    path = tmp_path / "net.onnx"
    report = _export(first, x, path)
    assert _mapped(report)
    other = _wide("hook")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(2)
    _export(other, x, path)
    for file in (path, side_file(path)):
        file.unlink()
    assert report.exported_program is not None and report.onnx_program is not None
    assert torch.equal(report.exported_program.module()(x), wanted)
    report.onnx_program.save(tmp_path / "again.onnx")
    assert check_parity(first, tmp_path / "again.onnx", [x]).passed


def test_programs_can_be_saved(tmp_path: Path) -> None:
    """torch writes each weight of a program once, and reads back the same program."""
    model, x = _wide("hook"), images()
    report = _export(model, x, tmp_path / "net.onnx")
    assert report.exported_program is not None and _mapped(report)
    saved = tmp_path / "net.pt2"
    torch.export.save(report.exported_program, saved)
    assert saved.stat().st_size < 2 * side_file(report.path).stat().st_size + 2**17
    with torch.no_grad():
        assert torch.equal(torch.export.load(saved).module()(x), model(x))


def test_writes_do_not_reach_the_file(tmp_path: Path) -> None:
    """The weights of a program can be written like any others, and the file stays proved."""
    report = _export(_wide("hook"), images(), tmp_path / "net.onnx")
    before = side_file(report.path).read_bytes()
    weights = _weights(report)
    with torch.no_grad():
        for name in _mapped(report):
            weights[name].zero_()
            assert not weights[name].any()
    assert side_file(report.path).read_bytes() == before


def test_small_files_are_not_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to the limit, and with all weights in the file itself, they are in memory."""
    model, x = _wide("hook"), images()
    assert _mapped(export_onnx(model, (x,), tmp_path / "one.onnx", exporter="dynamo")) == set()
    monkeypatch.undo()
    assert _mapped(_export(model, x, tmp_path / "net.onnx")) == set()
