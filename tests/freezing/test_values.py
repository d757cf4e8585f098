"""What is frozen: the value, the shape of the plain network, and the exact way back."""

from __future__ import annotations

import copy
from typing import cast

import pytest
import torch
from fingerprint import all_same_bits, assert_unchanged, fingerprint, same_bits
from networks import CASES, KINDS, MOMENTS, PAIRS, Case, bring_to
from torch import Tensor, nn

from sn_export import frozen_spectral_norm


def twin_in_eval(case: Case, kind: str, model: nn.Module) -> nn.Module:
    """A fresh copy of the model that has run one forward pass in eval mode."""
    twin = case.make(kind, seed=2)
    twin.load_state_dict(model.state_dict())
    twin.eval()
    with torch.no_grad():
        case.run(twin)
    return twin


@pytest.mark.parametrize(("state", "mode"), MOMENTS)
@pytest.mark.parametrize(("kind", "name"), PAIRS)
def test_block_is_exact_inside_and_leaves_no_trace(
    kind: str, name: str, state: str, mode: str
) -> None:
    """Inside stands the weight of an eval forward in a plain network; after, nothing changed."""
    case = CASES[name]
    model = case.make(kind)
    bring_to(state, model, kind, case)
    training = mode == "train"
    model.train(training)
    twin = twin_in_eval(case, kind, model)
    with torch.no_grad():
        expected = case.run(twin)
    weights = {tensor: cast(Tensor, getattr(twin, tensor)).detach() for tensor in case.tensors}
    plain = case.plain()
    before = fingerprint(model)

    with frozen_spectral_norm(model) as inside:
        assert inside is model
        assert type(model) is type(plain)
        assert all(m.training is training for m in model.modules())
        for tensor, weight in weights.items():
            frozen = getattr(model, tensor)
            assert type(frozen) is nn.Parameter
            assert frozen is model._parameters[tensor]
            assert not frozen.requires_grad
            assert frozen.grad is None
            assert same_bits(frozen, weight)
            assert frozen.stride() == weight.stride()
            assert frozen.device == weight.device
        assert list(model.state_dict()) == list(plain.state_dict())
        assert repr(model.state_dict()._metadata) == repr(plain.state_dict()._metadata)  # type: ignore[attr-defined]
        assert [n for n, _ in model.named_parameters()] == [n for n, _ in plain.named_parameters()]
        assert [n for n, _ in model.named_modules()] == [n for n, _ in plain.named_modules()]
        assert set(vars(model)) == set(vars(plain))
        assert not model._forward_pre_hooks
        flat = getattr(model, "_flat_weights", [])
        assert len(flat) == len(getattr(plain, "_flat_weights", []))
        assert all(
            getattr(model, n) is w for n, w in zip(model_flat_names(model), flat, strict=True)
        )
        model.eval()
        with torch.no_grad():
            assert all_same_bits(case.run(model), expected)
        model.train(training)

    assert_unchanged(before, model)


def model_flat_names(model: nn.Module) -> list[str]:
    """The names of the weights of a recurrent module; of other modules none."""
    return cast("list[str]", getattr(model, "_flat_weights_names", []))


@pytest.mark.parametrize(("kind", "name"), PAIRS)
def test_deep_copies_outside_and_inside_are_networks_of_their_own(kind: str, name: str) -> None:
    """Copies that share the dynamic class stay as they are; a copy made inside is plain."""
    case = CASES[name]
    model = case.make(kind)
    sibling = copy.deepcopy(model)
    twin = twin_in_eval(case, kind, model)
    with torch.no_grad():
        expected = case.run(twin)
    before = fingerprint(model, sibling)
    alone = fingerprint(sibling)

    with frozen_spectral_norm(model):
        inner = copy.deepcopy(model)
        middle = fingerprint(sibling)
    assert before.differences(fingerprint(model, sibling)) == []
    assert alone.differences(middle) == []
    with torch.no_grad():
        assert all_same_bits(case.run(inner.eval()), expected)
        assert all_same_bits(case.run(sibling.eval()), expected)
        assert all_same_bits(case.run(model.eval()), expected)
    plain = case.plain()
    assert type(inner) is type(plain)
    assert list(inner.state_dict()) == list(plain.state_dict())
    assert {n for n, p in inner.named_parameters() if not p.requires_grad} == set(case.tensors)


@pytest.mark.parametrize("kind", KINDS)
def test_root_shared_and_nested_modules_freeze_once(kind: str) -> None:
    """A module that stands in several places is frozen once, and comes back in all of them."""
    torch.manual_seed(0)
    shared = KINDS[kind](nn.Linear(3, 3))
    model = nn.Sequential(shared, nn.ReLU(), shared, nn.ModuleDict({"again": shared}))
    before = fingerprint(model)
    with frozen_spectral_norm(model):
        assert model[0] is model[2] is shared
        assert type(shared) is nn.Linear
        assert [n for n, _ in model.named_parameters()] == ["0.weight", "0.bias"]
    assert_unchanged(before, model)
