"""Handwritten spectral norm in a checkpoint is named, and never taken for a plain weight.

`find_handwritten_norms` is asked inside, on names alone: files say no more of them.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cli_networks import trained_critic
from torch import Tensor

from sn_export.checkpoints import convert_checkpoint, inspect_checkpoint
from sn_export.checkpoints.reparametrizations import find_handwritten_norms
from sn_export.errors import CheckpointError

WEIGHT = torch.ones(4, 3, 2, 2)
STATES: dict[str, dict[str, Tensor]] = {
    "weight_bar": {"weight_bar": WEIGHT, "weight_u": torch.ones(4), "weight_v": torch.ones(12)},
    "u0, sv0": {"weight": WEIGHT, "u0": torch.ones(1, 4), "sv0": torch.ones(1)},
    "sn_u": {"weight": WEIGHT, "sn_u": torch.ones(1, 4), "sn_sigma": torch.ones(1)},
    "weight_u": {"weight": WEIGHT, "weight_u": torch.ones(1, 4)},
    "u": {"weight": WEIGHT, "u": torch.ones(1, 4)},
}
NOT: dict[str, dict[str, Tensor]] = {
    "plain": {"weight": WEIGHT, "bias": torch.ones(4)},
    "hook": {"weight_orig": WEIGHT, "weight_u": torch.ones(4), "weight_v": torch.ones(12)},
    "old hook": {"weight_orig": WEIGHT, "weight": WEIGHT, "weight_u": torch.ones(4)},
    "another u": {"weight": WEIGHT, "u": torch.ones(5)},
    "a matrix": {"weight": WEIGHT, "u": torch.ones(4, 4)},
    "a foot bar": {"weight_bar": WEIGHT},
}


@pytest.mark.parametrize("name", STATES)
def test_handwritten_norms_are_found(name: str) -> None:
    """Each published way to keep the vectors is found, at the root and in modules."""
    raw = next(iter(STATES[name]))
    assert find_handwritten_norms(STATES[name]) == [raw]
    inside = {f"body.0.module.{key}": value for key, value in STATES[name].items()}
    assert find_handwritten_norms(inside) == [f"body.0.module.{raw}"]


@pytest.mark.parametrize("name", NOT)
def test_others_are_not(name: str) -> None:
    """Plain layers, torch's own spectral norm, and vectors that do not fit are not found."""
    assert find_handwritten_norms(NOT[name]) == []


def test_a_mixed_file_is_no_plain_one(tmp_path: Path) -> None:
    """Beside torch's spectral norm the handwritten ones are named, and stay with --only alone."""
    mixed = dict(trained_critic().state_dict())
    mixed |= {f"own.{key}": value for key, value in STATES["weight_bar"].items()}
    torch.save(mixed, tmp_path / "a.pt")
    note = (
        "'own.weight_bar' looks like handwritten spectral norm, which is left as it is: only the "
        "model's code can tell the weight in use, and 'sn-export onnx' runs that"
    )
    assert inspect_checkpoint(tmp_path / "a.pt").notes == (note,)
    with pytest.raises(CheckpointError) as caught:
        convert_checkpoint(tmp_path / "a.pt", tmp_path / "b.pt", "plain")
    assert str(caught.value) == (
        "cannot spell 'own.weight_bar' as plain: it looks like handwritten spectral norm, and only "
        "the model's code can tell the weight in use ('sn-export onnx' runs that); to leave that "
        "as it is: --only spectral_norm"
    )
    assert not (tmp_path / "b.pt").exists()
    made = convert_checkpoint(tmp_path / "a.pt", tmp_path / "b.pt", "plain", only="spectral_norm")
    assert made.notes == (note,)
    kept = torch.load(tmp_path / "b.pt")
    assert all(
        torch.equal(kept[f"own.{key}"], value) for key, value in STATES["weight_bar"].items()
    )


def test_convert_with_nothing_of_torch(tmp_path: Path) -> None:
    """Without torch's spectral norm the error names the handwritten ones, and what to do."""
    torch.save(STATES["u0, sv0"], tmp_path / "a.pt")
    with pytest.raises(CheckpointError) as caught:
        convert_checkpoint(tmp_path / "a.pt", tmp_path / "b.pt", "plain")
    assert "holds no spectral norm to convert" in str(caught.value)
    assert ". 'weight' looks like handwritten spectral norm" in str(caught.value)
