"""Averaged weights (SWA, EMA), as torch's own class saves them: chosen, loaded and converted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cli_networks import Critic, Kind
from cli_running import runner
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from sn_export.checkpoints import (
    convert_checkpoint,
    inspect_checkpoint,
    load_checkpoint,
    read_checkpoint,
)

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(2))
WARNING = "u or v is no unit vector (product of their lengths "


def _average(kind: Kind, use_buffers: bool, folder: Path) -> AveragedModel:
    """Save ``a.pt`` with a network and the average of its past weights; return the average."""
    torch.manual_seed(0)
    model = Critic(kind)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=use_buffers)
    for _ in range(3):
        with torch.no_grad():  # steps so large that the vectors move
            for parameter in model.parameters():
                parameter += 0.03 * torch.randn_like(parameter)
            for _ in range(5):
                model(IMAGES)
        averaged.update_parameters(model)
    torch.save({"model": model.state_dict(), "ema": averaged.state_dict()}, folder / "a.pt")
    return averaged.eval()


@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize("kind", ["hook", "parametrization"])
def test_an_average_is_what_it_was(kind: Kind, use_buffers: bool, tmp_path: Path) -> None:
    """Loaded or made plain, an average computes the same; averaged u and v cause a warning."""
    averaged = _average(kind, use_buffers, tmp_path)
    with torch.no_grad():
        wanted = averaged(IMAGES)
    notes = [layer.note for layer in inspect_checkpoint(tmp_path / "a.pt", key="ema").layers]
    assert [WARNING in note for note in notes] == [use_buffers] * 4
    for spelling in ("hook", "parametrization", "plain"):
        model = Critic(spelling).eval()
        loaded = load_checkpoint(model, read_checkpoint(tmp_path / "a.pt"), key="ema")
        assert torch.equal(model(IMAGES), wanted)
        assert [WARNING in text for text in loaded.warnings] == [True] * use_buffers
    made = convert_checkpoint(tmp_path / "a.pt", tmp_path / "b.pt", "plain", key="ema")
    assert [WARNING in note for note in made.notes] == [True] * use_buffers
    plain = AveragedModel(Critic("plain"), use_buffers=use_buffers)
    plain.load_state_dict(torch.load(tmp_path / "b.pt")["ema"])
    assert torch.equal(plain.eval()(IMAGES), wanted)
    assert plain.n_averaged == 3


def test_the_command_line_asks_for_a_key_and_warns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Network and average fit alike, so --key is asked for; the warning is on stderr."""
    call = runner(tmp_path, monkeypatch, capsys)
    _average("hook", True, tmp_path)
    command = (
        *("onnx", "a.pt", "--model", "cli_networks:Critic", "--input", "2x3x8x8", "-o", "a.onnx"),
        *("--exporter", "torchscript", "--samples", "1"),
    )
    assert call(*command).err == (
        "sn-export: 'a.pt' holds 2 state dicts, each of which fits Critic; choose with --key one "
        "of 'model' (20 tensors, has 12 of the 12 of Critic), 'ema' (21 tensors, has 12 of the 12 "
        "of Critic)\n"
    )
    assert "(did you mean 'ema'?)" in call(*command, "--key", "emma").err
    ran = call(*command, "--key", "ema")
    assert ran.code == 0
    assert "sigma is too small, and the weight in eval mode" in ran.err
    assert WARNING not in ran.out
