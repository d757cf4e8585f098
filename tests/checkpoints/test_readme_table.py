"""The commands in the table of ``sn_export/checkpoints/README.md`` do their jobs."""

from __future__ import annotations

import json
import re
import shlex
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from cli_networks import Critic, Tokens, before_v, prefixed, trained_critic
from cli_running import runner
from export_models import run_file
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils.parametrizations import orthogonal
from vocoder_networks import Generator

import sn_export
from sn_export import check_case, export_onnx
from sn_export.checkpoints import convert_checkpoint

PAGE = Path(sn_export.__file__).parent / "checkpoints" / "README.md"
ROWS = dict(
    re.findall(r"^\| ([^|]+) \| `(sn-export [^|`]+)` \|$", PAGE.read_text("utf-8"), re.MULTILINE)
)
IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(2))


def _save(content: Any) -> Callable[[Path], None]:
    return lambda path: torch.save(content, path)


def _save_shards(path: Path) -> None:
    path.parent.mkdir()
    torch.save(trained_critic().state_dict(), path.parent / "a.pt")
    target = path.parent / "model.safetensors"
    convert_checkpoint(path.parent / "a.pt", target, "hook", max_shard_size=1000)
    assert path.exists()


def _save_bin_shards(folder: Path) -> None:
    folder.mkdir()
    state = trained_critic().state_dict()
    shards = {name: f"pytorch_model-{i % 2}.bin" for i, name in enumerate(state)}
    for shard in sorted(set(shards.values())):
        torch.save({name: state[name] for name in state if shards[name] == shard}, folder / shard)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": shards}))


def _save_case(folder: Path) -> None:
    folder.mkdir()
    path = folder / "critic.onnx"
    export_onnx(
        trained_critic(), IMAGES, path, exporter="torchscript", save_case=folder / "critic.npz"
    )
    assert check_case(path, folder / "critic.npz").passed


def _make(name: str) -> None:
    """Write the file or folder that a command names; torch's warning of one process is ignored."""
    critic = trained_critic()
    state = critic.state_dict()
    makers: dict[str, Callable[[Path], object]] = {
        "critic.pt": _save(state),
        "train.pt": _save({"model": state, "optimizer": {"state": {}}, "step": 3}),
        "gan.pt": _save({"generator": Tokens().state_dict(), "critic": state}),
        "ddp.pt": _save(prefixed(state, "module._orig_mod.")),
        "epoch=9.ckpt": _save({"state_dict": prefixed(state, "critic."), "epoch": 9}),
        "two.ckpt": _save(
            {
                "state_dict": {
                    **prefixed(Critic().state_dict(), "old."),
                    **prefixed(state, "critic."),
                }
            }
        ),
        "code.pt": _save({"state_dict": state, "hyper_parameters": Tokens()}),
        "critic.safetensors": lambda path: save_file(state, path),
        "arrays.npz": lambda path: np.savez(path, **{k: v.numpy() for k, v in state.items()}),
        "shards/model.safetensors.index.json": _save_shards,
        "hub": _save_bin_shards,
        "ranks": lambda path: dcp.save(
            dict(state), storage_writer=dcp.HuggingFaceStorageWriter(path, save_distributed=True)
        ),
        "whole.pt": _save(critic),
        "dcp": lambda path: dcp.save(dict(state), checkpoint_id=path),
        "hook.pt": _save(before_v(state, critic)),
        "vocoder.pt": _save(Generator("parametrization").state_dict()),
        "orthogonal.pt": _save(orthogonal(nn.Linear(3, 4)).state_dict()),
        "part.pt": _save(state | {"extra": torch.ones(2)}),
        "critic.onnx": lambda path: export_onnx(critic, IMAGES, path, exporter="torchscript"),
        "cases": _save_case,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        makers[name](Path(name))


@pytest.mark.parametrize("have", ROWS)
def test_row(
    have: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command ends with exit code 0, and an exported file is that of the trained network."""
    call = runner(tmp_path, monkeypatch, capsys)
    command = ROWS[have].replace("NET", "--model nets:critic --input 2x3x8x8 -o critic.onnx")
    command = command.replace("nets:critic", "cli_networks:critic")
    command = command.replace("nets:vocoder", "vocoder_networks:Generator")
    _, *arguments = shlex.split(command)
    for argument in arguments[1:3] if arguments[0] == "check" else arguments[1:2]:
        if not argument.startswith("-"):
            _make(argument)
    if arguments[0] == "onnx":
        arguments += ["--exporter", "torchscript", "--samples", "1"]
    ran = call(*arguments)
    assert ran.code == 0, ran.err
    if "critic.onnx" in arguments[1:] and arguments[0] == "onnx":
        (got,) = run_file(Path("critic.onnx"), IMAGES)
        np.testing.assert_allclose(got, trained_critic()(IMAGES).detach(), rtol=1e-3, atol=1e-5)
