"""Modules that read weights their own way: recurrent ones, attention, lists, shared parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import pytest
import torch
from fingerprint import all_same_bits, assert_unchanged, fingerprint, same_bits
from networks import seed_torch, tensors_of
from reparam_networks import REPARAMETRIZATIONS, hooked, pruned, reparametrize
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, spectral_norm

from sn_export import (
    ReparametrizationNotAppliedWarning,
    SpectralNormNotAppliedWarning,
    find_parametrizations,
    frozen_parametrizations,
)

Apply = Callable[[nn.Module, str], nn.Module]
each_how = pytest.mark.parametrize("how", ["spectral_norm", "hook", *REPARAMETRIZATIONS])
HOOKS: dict[str, Apply] = {"spectral_norm": spectral_norm, "weight_norm": hooked, "pruning": pruned}
each_hook = pytest.mark.parametrize("hook", HOOKS)


def apply(how: str, module: nn.Module, name: str = "weight") -> nn.Module:
    """Put a tensor under any reparametrization, spectral norm included."""
    if how == "spectral_norm":
        return parametrizations.spectral_norm(module, name)
    if how == "hook":
        return spectral_norm(module, name)
    return reparametrize(how, module, name)


@each_how
@pytest.mark.parametrize("build", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_modules_use_the_live_tensors(how: str, build: type[nn.RNNBase]) -> None:
    """The list of flat weights is the frozen tensors inside, and the module's own list after."""
    seed_torch(0)
    model = build(3, 2, num_layers=2, bidirectional=True).eval()
    for name in ("weight_hh_l0", "weight_ih_l1_reverse", "bias_ih_l0"):
        if name.startswith("weight") or how in ("pruned", "two originals"):
            apply(how, model, name)
    x = torch.randn(4, 2, 3)
    expected = tensors_of(model(x))
    before = fingerprint(model)
    with frozen_parametrizations(model):
        flat = model._flat_weights
        assert all(
            w is getattr(model, n) for w, n in zip(flat, model._flat_weights_names, strict=True)
        )
        assert [n for n, _ in model.named_parameters()] == model._flat_weights_names
        assert all_same_bits(tensors_of(model(x)), expected)
        assert model._flat_weights is flat
    assert_unchanged(before, model)
    outside = tensors_of(model(x))
    assert all_same_bits(outside, expected) or how == "chain"
    sum(t.sum() for t in outside).backward()  # type: ignore[union-attr]
    assert all(p.grad is not None for p in model.parameters())


class Encoder(nn.Module):
    """A transformer encoder, with all weights of its first layer under something."""

    def __init__(self, how: str) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        first = cast(Any, self.body.layers[0])
        apply(how, first.self_attn, "in_proj_weight")
        apply(how, first.linear1)
        apply(how, first.linear2)
        if how != "hook" and "hook" not in how and "pruned" not in how:
            apply(how, first.self_attn.out_proj)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x)
        return y


@contextmanager
def unfused() -> Iterator[None]:
    """Keep attention off the operator that torch fuses where a layer has no hooks."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


@each_how
def test_transformer_encoder(how: str) -> None:
    """Off the fused operator outputs have the same bits; with it they agree up to rounding."""
    seed_torch(0)
    model = Encoder(how).eval()
    x = torch.randn(3, 5, 8)
    before = fingerprint(model)
    with unfused(), frozen_parametrizations(model), torch.no_grad():
        inside = model(x)
    assert_unchanged(before, model)
    with frozen_parametrizations(model), torch.no_grad():
        fused = model(x)
    assert_unchanged(before, model)
    with unfused(), torch.no_grad():
        expected = model(x)
    assert same_bits(inside, expected)
    torch.testing.assert_close(fused, expected)


@each_hook
def test_hook_on_out_proj_never_runs(hook: str) -> None:
    """Attention never calls out_proj: the weight in use is frozen, listed, and warned of."""
    seed_torch(0)
    model = nn.Sequential(nn.MultiheadAttention(4, 2)).eval()
    attention = cast(nn.MultiheadAttention, model[0])
    HOOKS[hook](attention.out_proj, "weight")
    x = torch.randn(3, 2, 4)
    with torch.no_grad():
        for parameter in attention.out_proj.parameters():
            parameter.mul_(2)  # which the hook never tells the network
    expected = tensors_of(attention(x, x, x, need_weights=False))
    (info,) = find_parametrizations(model)
    assert (info.name, info.is_applied, info.kind) == ("0.out_proj.weight", False, hook)
    before = fingerprint(model)
    with pytest.warns(ReparametrizationNotAppliedWarning) as caught, frozen_parametrizations(model):
        assert all_same_bits(tensors_of(attention(x, x, x, need_weights=False)), expected)
    assert_unchanged(before, model)
    assert caught[0].filename == __file__
    assert (caught[0].category is SpectralNormNotAppliedWarning) == (hook == "spectral_norm")
    assert str(caught[0].message).startswith(
        f"the {hook.replace('_', ' ')} of '0.out_proj.weight' is never applied: "
        "torch.nn.MultiheadAttention reads the weight of out_proj without calling it"
    )
    remedy = {"pruning": "Prune in place"}.get(
        hook, f"Apply torch.nn.utils.parametrizations.{hook}"
    )
    assert f". {remedy}" in str(caught[0].message)


@each_hook
@pytest.mark.parametrize("kind", ["list", "dict"])
def test_hook_on_a_parameter_list_never_runs(hook: str, kind: str) -> None:
    """Nothing calls a list of parameters either."""
    model = nn.Module()
    values = [nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.randn(2))]
    model.values = (
        nn.ParameterList(values)
        if kind == "list"
        else nn.ParameterDict(dict(zip("01", values, strict=True)))
    )
    HOOKS[hook](model.values, "0")
    in_use = model.values.__dict__["0"].detach().clone()
    before = fingerprint(model)
    with (
        pytest.warns(ReparametrizationNotAppliedWarning, match="nothing calls a torch.nn.Param"),
        frozen_parametrizations(model),
    ):
        assert same_bits(getattr(model.values, "0"), in_use)
        assert list(model.state_dict()) == ["values.1", "values.0"]
    assert_unchanged(before, model)


@pytest.mark.parametrize("how", ["spectral_norm", "weight_norm", "orthogonal", "chain"])
@pytest.mark.parametrize("kind", ["list", "dict"])
def test_parametrized_entry_of_a_list(how: str, kind: str) -> None:
    """An entry of a ParameterList or ParameterDict under a parametrization."""
    seed_torch(0)

    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            entries = {"0": nn.Parameter(torch.randn(4, 3)), "1": nn.Parameter(torch.randn(4))}
            self.entries: Any = (
                nn.ParameterList(entries.values()) if kind == "list" else nn.ParameterDict(entries)
            )
            apply(how, self.entries, "0")

        def forward(self, x: Tensor) -> Tensor:
            first, second = (0, 1) if kind == "list" else ("0", "1")
            y: Tensor = x @ self.entries[first].t() + self.entries[second]
            return y

    model = Holder().eval()
    x = torch.randn(2, 3)
    with torch.no_grad():
        expected = model(x)
    before = fingerprint(model)
    with frozen_parametrizations(model), torch.no_grad():
        assert same_bits(model(x), expected)
        assert set(model.state_dict()) == {"entries.0", "entries.1"}
        assert len(model.entries) == 2
    assert_unchanged(before, model)


class Tied(nn.Module):
    """A decoder that uses the encoder's parameter, which is under something in one place."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.encoder = nn.Linear(4, 4)
        self.decoder = nn.Linear(4, 4)
        self.decoder.weight = self.encoder.weight
        apply(how, self.encoder)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.decoder(self.encoder(x))
        return y


@each_how
def test_parameter_in_two_places(how: str) -> None:
    """One Parameter in two modules, under something in one: the other goes on using the raw one."""
    seed_torch(0)
    model = Tied(how).eval()
    shared = model.decoder.weight
    x = torch.randn(2, 4)
    with torch.no_grad():
        expected = model(x)
    before = fingerprint(model)
    with frozen_parametrizations(model):
        assert model.decoder.weight is shared
        assert model.encoder.weight is not shared
        assert same_bits(model(x).detach(), expected)
    assert_unchanged(before, model)


@each_how
def test_module_in_several_places(how: str) -> None:
    """A module used twice is frozen once, under all its names."""
    seed_torch(0)
    layer = apply(how, nn.Linear(4, 4))
    model = nn.Sequential(layer, nn.ReLU(), nn.Sequential(layer, layer)).eval()
    x = torch.randn(2, 4)
    with torch.no_grad():
        expected = model(x)
    before = fingerprint(model)
    assert len(find_parametrizations(model)) == 1
    with frozen_parametrizations(model):
        assert same_bits(model(x).detach(), expected)
        assert len(list(model.parameters())) == 2
    assert_unchanged(before, model)


def test_mask_and_norm_on_a_recurrent_module() -> None:
    """Weight norm, spectral norm and a mask on one LSTM, each on a tensor of its own."""
    seed_torch(0)
    model = nn.LSTM(3, 2).eval()
    hooked(model, "weight_hh_l0")
    spectral_norm(model, "weight_ih_l0")
    prune.l1_unstructured(model, "bias_ih_l0", 0.5)
    x = torch.randn(4, 2, 3)
    expected = tensors_of(model(x))
    before = fingerprint(model)
    for only in (None, "weight_norm", "pruning", "spectral_norm", "bias_ih_l0"):
        with frozen_parametrizations(model, only):
            pass
        assert_unchanged(before, model)
        with frozen_parametrizations(model, only):
            assert all_same_bits(tensors_of(model(x)), expected)
        model(x)
        before = fingerprint(model)
