"""Reparametrising a frozen weight inside a block: after it nothing of that is left."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from fingerprint import Fingerprint, fingerprint, same_bits
from networks import KINDS, Scale, images, net, seed_torch
from reparam_networks import REPARAMETRIZATIONS, hooked, pruned, reparametrize
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm

from sn_export import FrozenWeightChangedWarning, frozen_parametrizations, frozen_spectral_norm

INSIDE: dict[str, Callable[[nn.Module], object]] = {
    "hook": spectral_norm,
    "spectral_norm": parametrizations.spectral_norm,
    **{
        how: lambda module, how=how: reparametrize(how, module)  # type: ignore[misc]
        for how in REPARAMETRIZATIONS
    },
    "hook, removed": lambda m: nn.utils.remove_spectral_norm(spectral_norm(m)),
    "pruned, removed": lambda m: prune.remove(pruned(m), "weight"),
    "chain, removed": lambda m: parametrize.remove_parametrizations(
        parametrizations.orthogonal(m), "weight"
    ),
    "on a chain": lambda m: prune.l1_unstructured(
        parametrizations.spectral_norm(m).parametrizations.weight,  # type: ignore[arg-type,union-attr]
        "original",
        0.5,
    ),
}


def assert_restored(before: Fingerprint, model: nn.Module) -> None:
    """Assert that the model is as it was; registering inside draws numbers and counts hooks.

    Torch writes a second property into a parametrized class, which copies may share. So that
    class is left alone, and the module has one with the entries of before.
    """
    differences = before.differences(fingerprint(model))
    own = ("rng torch", "next hook id", "0: class: ")
    differences = [d for d in differences if not d.startswith(own)]
    assert not differences, "\n".join(differences)


@pytest.mark.parametrize("inside", INSIDE)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("runs", [True, False], ids=["used", "unused"])
def test_spectral_norm_and_something_inside(kind: str, inside: str, runs: bool) -> None:
    """What is put on a frozen weight is gone after the block, with a warning; the rest is back."""
    model = net(kind)
    model(images())
    model.eval()
    before = fingerprint(model)
    with (
        pytest.warns(FrozenWeightChangedWarning, match=r"the frozen 'head.weight' was changed"),
        frozen_spectral_norm(model),
    ):
        INSIDE[inside](model.head)
        if runs:
            model(images())
            model.state_dict()
    assert_restored(before, model)


@pytest.mark.parametrize("inside", INSIDE)
@pytest.mark.parametrize("how", REPARAMETRIZATIONS)
def test_anything_and_something_inside(how: str, inside: str) -> None:
    """The same with every other reparametrization underneath, and a parametrized bias beside it."""
    seed_torch(0)
    model = reparametrize(how, nn.Linear(4, 4)).eval()
    parametrize.register_parametrization(model, "bias", Scale())
    x = torch.randn(2, 4)
    expected = model(x).detach()
    before = fingerprint(model)
    for only in ("weight", None):
        with (
            pytest.warns(FrozenWeightChangedWarning, match=r"'weight'.* changed inside the block"),
            frozen_parametrizations(model, only),
        ):
            INSIDE[inside](model)
            model(x)
        assert_restored(before, model)
    assert same_bits(model(x).detach(), expected)


@pytest.mark.parametrize("inside", ["hook", "spectral_norm", *REPARAMETRIZATIONS])
@pytest.mark.parametrize("build", [nn.LSTM, nn.GRU])
def test_recurrent_module(inside: str, build: type[nn.RNNBase]) -> None:
    """The flat weights of a recurrent module come back, too."""
    model = hooked(build(3, 4), "weight_hh_l0")
    before = fingerprint(model)
    with pytest.warns(FrozenWeightChangedWarning), frozen_parametrizations(model):
        if inside in REPARAMETRIZATIONS:
            reparametrize(inside, model, "weight_hh_l0")
        else:
            {"hook": spectral_norm}.get(inside, parametrizations.spectral_norm)(
                model, "weight_hh_l0"
            )
        model(torch.ones(2, 1, 3))
    assert_restored(before, model)


def test_hooks_of_the_callers_survive() -> None:
    """Hooks registered beside the reparametrization, before and after it, stay."""
    model = spectral_norm(nn.Linear(3, 3))
    calls: list[str] = []
    with pytest.warns(FrozenWeightChangedWarning), frozen_spectral_norm(model):
        model.register_forward_pre_hook(lambda m, x: calls.append("first"))
        hooked(model)
        model.register_forward_pre_hook(lambda m, x: calls.append("second"))
        pruned(model, "bias")
    model(torch.ones(1, 3))
    assert calls == ["first", "second"]
    assert set(model.state_dict()) == {
        "bias_orig",
        "bias_mask",
        "weight_orig",
        "weight_u",
        "weight_v",
    }


@pytest.mark.parametrize("only", ["weight", None])
@pytest.mark.parametrize("kind", ["hook", "parametrization", "chain-last"])
@pytest.mark.parametrize("change", ["add", "remove", "exchange"])
def test_parametrizations_of_other_tensors_stay(kind: str, change: str, only: str | None) -> None:
    """A parametrization put on a bias inside, or taken off it, is so after the block."""
    model = KINDS[kind](nn.Linear(3, 3)).eval()
    if change != "add":
        parametrize.register_parametrization(model, "bias", nn.Identity())
    block = frozen_parametrizations(model, only) if only else frozen_spectral_norm(model)
    weight = model(torch.eye(3)).detach()
    chain = None if kind == "hook" else model.parametrizations.weight  # type: ignore[union-attr]
    with block:
        if change != "add":
            parametrize.remove_parametrizations(model, "bias")
        if change != "remove":
            parametrize.register_parametrization(model, "bias", Scale())
    names = dict(model.named_parameters())
    assert ("bias" in names) == (change == "remove")
    assert ("parametrizations.bias.original" in names) == (change != "remove")
    assert type(model).__bases__ == (nn.Linear,) or (kind, change) == ("hook", "remove")
    if chain is not None:
        assert model.parametrizations.weight is chain  # type: ignore[union-attr]
    if change == "remove":
        assert same_bits(model(torch.eye(3)).detach(), weight)
    else:
        expected = (model.bias * 1.0).detach()
        assert same_bits(model(torch.zeros(1, 3)).detach()[0], expected)
    after = fingerprint(model)
    with frozen_parametrizations(model):
        assert list(model.state_dict()) == ["weight", "bias"]
    assert_restored(after, model)
