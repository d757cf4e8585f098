"""Inspection of the spectral norms in a checkpoint, without model code."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from cli_networks import APPLY, Critic, Kind, before_v, trained_critic
from torch import nn

from sn_export import find_spectral_norm
from sn_export.checkpoints import StoredLayer, inspect_checkpoint
from sn_export.errors import CheckpointError


@pytest.mark.parametrize("kind", ["hook", "parametrization"])
def test_it_lists_what_the_model_has(kind: Kind, tmp_path: Path) -> None:
    """Module, tensor, kind, shape, dtype, dim and sigma are those of the loaded model."""
    model = trained_critic(kind)
    torch.save({"model": model.state_dict()}, tmp_path / "a.pt")
    found = inspect_checkpoint(tmp_path / "a.pt")
    assert found.key == "model"
    assert found.format == "torch"
    assert [
        (one.module, one.tensor, one.kind, one.shape, one.dtype, one.dim, one.sigma)
        for one in found.layers
    ] == [
        (one.module, one.tensor, one.kind, one.shape, one.dtype, one.dim, one.sigma)
        for one in find_spectral_norm(model)
    ]


def test_sigma_exact_is_the_largest_singular_value(tmp_path: Path) -> None:
    """sigma_exact is the largest singular value of each layer, and gives the shortfall."""
    model = trained_critic()
    torch.save(model.state_dict(), tmp_path / "a.pt")
    for layer in inspect_checkpoint(tmp_path / "a.pt").layers:
        weight = model.get_parameter(f"{layer.module}.weight_orig").detach().double()
        assert layer.dim is not None
        exact = torch.linalg.svdvals(weight.movedim(layer.dim, 0).flatten(1))[0].item()
        assert layer.sigma_exact == pytest.approx(exact, rel=1e-12)
        assert layer.shortfall == pytest.approx(1 - layer.sigma / exact)


def _layer(tmp_path: Path, **changes: torch.Tensor) -> StoredLayer:
    state = {
        "weight_orig": torch.diag(torch.tensor([3.0, 2.0])),
        "weight_u": torch.tensor([1.0, 0.0]),
        "weight_v": torch.tensor([1.0, 0.0]),
    }
    torch.save({**state, **changes}, tmp_path / "a.pt")
    (layer,) = inspect_checkpoint(tmp_path / "a.pt", dims={"weight": 0}).layers
    return layer


def test_what_it_means_for_removing_and_applying_again(tmp_path: Path) -> None:
    """The meaning of sigma is said: converged or not, of another weight, zero, or NaN."""
    assert _layer(tmp_path).meaning == (
        "converged; re-applied, it is the same only after u and v converged again"
    )
    half = torch.tensor([0.6, 0.8])
    assert _layer(tmp_path, weight_u=half, weight_v=half).meaning == (
        "re-applied, the weight becomes 1.271 times smaller"
    )
    assert _layer(tmp_path, weight_u=torch.tensor([-1.0, 0.0])).meaning == (
        "never trained: u and v are not of this weight; re-applied, its sign changes"
    )
    assert _layer(tmp_path, weight_orig=torch.zeros(2, 2)).meaning == (
        "sigma is 0, so the weight in use is not finite"
    )
    assert _layer(tmp_path, weight_v=torch.full((2,), torch.nan)).meaning == (
        "'weight_v' holds NaN or infinite values"
    )


def test_a_square_weight_whose_dim_cannot_be_told(tmp_path: Path) -> None:
    """If the dim is unknown, so is sigma, and the note says how to give it."""
    layer = APPLY["hook"](nn.Linear(4, 4))
    torch.save(layer.state_dict(), tmp_path / "a.pt")
    (found,) = inspect_checkpoint(tmp_path / "a.pt").layers
    assert found.dim is None
    assert found.sigma != found.sigma
    assert found.sigma_exact == pytest.approx(torch.linalg.svdvals(layer.weight_orig)[0].item())
    assert found.note == (
        "cannot tell the dim of 'weight' [4, 4]: its shape and vectors fit 0 or 1; say which "
        "with --dim weight=0"
    )
    (found,) = inspect_checkpoint(tmp_path / "a.pt", dims={"weight": 0}).layers
    assert found.sigma == find_spectral_norm(layer)[0].sigma


@pytest.mark.parametrize("kernel", [(), (3,)])
def test_the_exact_sigma_of_a_weight_whose_dim_cannot_be_told(
    kernel: tuple[int, ...], tmp_path: Path
) -> None:
    """If all dims that fit agree on the exact sigma, it is known."""
    weight = torch.randn(4, 4, *kernel)
    vectors = {"weight_u": torch.randn(4), "weight_v": torch.randn(weight[0].numel())}
    torch.save({"weight_orig": weight, **vectors}, tmp_path / "a.pt")
    (found,) = inspect_checkpoint(tmp_path / "a.pt").layers
    assert found.dim is None
    assert math.isnan(found.sigma_exact) == bool(kernel)
    assert found.meaning == found.note and "say which with --dim weight=0" in found.note


@pytest.mark.parametrize(
    ("length", "meaning"),
    [
        (2.0, "sigma is too large, and the weight in eval mode 4 times too small"),
        (0.5, "sigma is too small, and the weight in eval mode 4 times too large"),
    ],
)
def test_vectors_that_are_no_unit_vectors(length: float, meaning: str, tmp_path: Path) -> None:
    """The note says what vectors of another length do to the weight in use."""
    vector = torch.tensor([length, 0.0])
    assert _layer(tmp_path, weight_u=vector, weight_v=vector).note.endswith(meaning)


def test_a_checkpoint_from_before_v(tmp_path: Path) -> None:
    """Without v, sigma is that of the v for which torch solves."""
    model = trained_critic()
    old = before_v(model.state_dict(), model)
    loaded = Critic()
    loaded.load_state_dict(dict(old))
    torch.save(dict(old), tmp_path / "a.pt")
    sigmas = [one.sigma for one in inspect_checkpoint(tmp_path / "a.pt").layers]
    assert sigmas == [one.sigma for one in find_spectral_norm(loaded)]


def test_an_unknown_name_for_a_dim(tmp_path: Path) -> None:
    """A dim of an unknown tensor is refused with the names that exist."""
    torch.save(APPLY["hook"](nn.Linear(3, 4)).state_dict(), tmp_path / "a.pt")
    with pytest.raises(CheckpointError) as caught:
        inspect_checkpoint(tmp_path / "a.pt", dims={"x": 0})
    assert str(caught.value) == (
        "--dim x=0 names no tensor under spectral or weight norm; there are 'weight'"
    )


def test_no_spectral_norm(tmp_path: Path) -> None:
    """A plain checkpoint has no layers, and is no error."""
    torch.save(Critic("plain").state_dict(), tmp_path / "a.pt")
    assert inspect_checkpoint(tmp_path / "a.pt").layers == ()


def test_every_state_dict_with_spectral_norm_is_listed(tmp_path: Path) -> None:
    """Of several networks each layer has the key of its own."""
    critic = trained_critic()
    content = {
        "generator": trained_critic("parametrization").state_dict(),
        "critic": critic.state_dict(),
        "plain": nn.Linear(2, 2).state_dict(),
        "optimizer": torch.optim.Adam(critic.parameters()).state_dict(),
    }
    torch.save(content, tmp_path / "a.pt")
    found = inspect_checkpoint(tmp_path / "a.pt")
    assert {(layer.key, layer.kind) for layer in found.layers} == {
        ("generator", "parametrization"),
        ("critic", "hook"),
    }
    assert found.key == ""
    only = inspect_checkpoint(tmp_path / "a.pt", key="critic")
    assert {layer.key for layer in only.layers} == {"critic"}


def test_several_state_dicts_without_spectral_norm(tmp_path: Path) -> None:
    """Several plain networks are no error either."""
    plain = nn.Linear(2, 2).state_dict()
    torch.save({"a": plain, "b": plain}, tmp_path / "a.pt")
    found = inspect_checkpoint(tmp_path / "a.pt")
    assert (found.layers, found.tensors) == ((), 4)
