"""find_spectral_norm: what it tells, and that it only looks."""

from __future__ import annotations

import math
from typing import cast

import pytest
import torch
from fingerprint import assert_unchanged, fingerprint, same_bits
from networks import CASES, HOOKS, KINDS, PAIRS, Custom, net
from torch import Tensor, nn
from torch.nn.utils import parametrizations, spectral_norm

from sn_export import SpectralNormInfo, find_spectral_norm, frozen_spectral_norm

DTYPES = {"float16", "bfloat16", "float64", "complex64"}


@pytest.mark.parametrize(("kind", "name"), PAIRS)
def test_lists_every_tensor_and_touches_nothing(kind: str, name: str) -> None:
    """Each tensor is listed with its shape and dtype, and the model is as it was."""
    case = CASES[name]
    model = nn.ModuleDict({"part": case.make(kind)})
    before = fingerprint(model)
    found = find_spectral_norm(model)
    assert_unchanged(before, model)
    assert {info.tensor for info in found} == set(case.tensors)
    assert all(info.module == "part" for info in found)
    assert all(info.name == f"part.{info.tensor}" for info in found)
    assert {info.kind for info in found} == {"hook" if kind in HOOKS else "parametrization"}
    plain = case.plain()
    for info in found:
        assert info.shape == tuple(getattr(plain, info.tensor).shape)
        assert info.dtype == (name if name in DTYPES else "float32")
        assert math.isfinite(info.sigma)


@pytest.mark.parametrize("kind", ["hook", "parametrization"])
def test_tells_the_options(kind: str) -> None:
    """dim, eps and n_power_iterations are those that spectral norm was applied with."""
    model = KINDS[kind](nn.Linear(3, 4), dim=1, eps=1e-3, n_power_iterations=7)
    (info,) = find_spectral_norm(model)
    assert info == SpectralNormInfo(
        module="",
        tensor="weight",
        kind=kind,
        shape=(4, 3),
        dtype="float32",
        dim=1,
        eps=1e-3,
        n_power_iterations=7,
        sigma=info.sigma,
    )
    assert info.name == "weight"


def test_default_dim_follows_the_module() -> None:
    """Transposed convolutions are normalised along their second dimension by default."""
    for apply in (spectral_norm, parametrizations.spectral_norm):
        model = nn.Sequential(apply(nn.ConvTranspose2d(2, 3, 2)), apply(nn.Conv2d(3, 2, 2)))
        assert [info.dim for info in find_spectral_norm(model)] == [1, 0]


def test_sigma_is_u_w_v_as_stored() -> None:
    """Sigma comes from the stored vectors, and nears the largest singular value in training."""
    hook, parametrized = spectral_norm(nn.Linear(3, 4)), KINDS["parametrization"](nn.Linear(3, 4))
    (info,) = find_spectral_norm(hook)
    expected = hook.weight_u @ hook.weight_orig.detach() @ hook.weight_v
    assert info.sigma == pytest.approx(float(expected), rel=1e-6)
    for model in (hook, parametrized):
        for _ in range(60):
            model(torch.zeros(1, 3))
        (info,) = find_spectral_norm(model)
        raw = next(p for p in model.parameters() if p.ndim == 2)
        exact = float(torch.linalg.matrix_norm(raw.detach(), 2))
        assert info.sigma == pytest.approx(exact, rel=1e-4)


def test_vector_has_no_power_iterations_in_a_parametrization() -> None:
    """The norm of a vector is exact, so there is nothing to iterate."""
    model = parametrizations.spectral_norm(Custom((3,)), "kernel")
    (info,) = find_spectral_norm(model)
    assert info.n_power_iterations is None
    original = model.parametrizations.kernel.original  # type: ignore[union-attr]
    assert info.sigma == pytest.approx(float(torch.linalg.vector_norm(original.detach())), rel=1e-6)


def test_sigma_in_a_chain_is_of_what_spectral_norm_is_given() -> None:
    """Behind another parametrization, sigma is that of the tensor which arrives there."""
    model = KINDS["chain-last"](nn.Linear(3, 4)).eval()
    (info,) = find_spectral_norm(model)
    scale, norm = model.parametrizations.weight  # type: ignore[union-attr,misc,index]
    input_of_link = scale(model.parametrizations.weight.original)  # type: ignore[union-attr,operator]
    expected = norm._u @ input_of_link.detach() @ norm._v
    assert info.sigma == pytest.approx(float(expected), rel=1e-5)


def test_sigma_on_the_meta_device_is_nan() -> None:
    """A model without values can be listed; its sigma is not a number."""
    for kind in ("hook", "subclass", "parametrization", "chain-first", "chain-last"):
        (info,) = find_spectral_norm(KINDS[kind](nn.Linear(3, 4, device="meta")))
        assert math.isnan(info.sigma)
        assert info.shape == (4, 3)


def test_order_is_that_of_the_modules() -> None:
    """Modules are listed in the order of named_modules, a shared one once."""
    shared = net("hook")
    model = nn.Sequential(net("parametrization"), shared, nn.ModuleList([shared]))
    names = [info.name for info in find_spectral_norm(model)]
    assert names == ["0.conv.weight", "0.head.weight", "1.conv.weight", "1.head.weight"]


def test_nothing_to_find() -> None:
    """A network without spectral norm, and one that is frozen already, give an empty list."""
    model = net("chain-twice")
    assert find_spectral_norm(nn.Linear(2, 2)) == []
    with frozen_spectral_norm(model):
        assert find_spectral_norm(model) == []
    assert len(find_spectral_norm(model)) == 2


class Inputless(nn.Module):
    """Holds a layer of no inputs, as a network does whose width was rounded down to 0."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = spectral_norm(nn.Linear(0, 3))

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.layer(x[:, :0]))


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_layer_without_inputs() -> None:
    """A weight without elements is listed and frozen like any other."""
    model, x = Inputless().eval(), torch.ones(2, 3)
    assert [info.name for info in find_spectral_norm(model)] == ["layer.weight"]
    with torch.no_grad():
        wanted = model(x)
        with frozen_spectral_norm(model):
            assert same_bits(model(x), wanted)


def test_info_cannot_be_changed() -> None:
    """What was found is a record, not a handle on the model."""
    (info,) = find_spectral_norm(spectral_norm(nn.Linear(2, 2)))
    with pytest.raises(AttributeError):
        info.sigma = 1.0  # type: ignore[misc]
