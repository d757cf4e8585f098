"""A model that goes to another dtype and comes back inside a block is what it was."""

from __future__ import annotations

import pytest
import torch
from export_models import KINDS, assert_as_before, images, small_net
from fingerprint import fingerprint
from torch import nn

from sn_export import FrozenWeightChangedWarning, frozen_spectral_norm

ROUND_TRIPS = {
    "half": lambda model: model.half().float(),
    "bfloat16": lambda model: model.bfloat16().float(),
    "double and half": lambda model: model.double().half().float(),
    "half and bfloat16": lambda model: model.half().bfloat16().float(),
}


def _net(kind: str) -> nn.Module:
    return nn.Sequential(small_net(kind), nn.Linear(3, 3), nn.BatchNorm1d(3))


@pytest.mark.parametrize("trip", ROUND_TRIPS)
@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back(kind: str, trip: str) -> None:
    """No parameter or buffer of the model has lost a bit, frozen or not."""
    model = _net(kind)
    before = fingerprint(model)
    with pytest.warns(FrozenWeightChangedWarning), frozen_spectral_norm(model):
        ROUND_TRIPS[trip](model)
    assert_as_before(before, model)


@pytest.mark.parametrize("trip", ROUND_TRIPS)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_there_and_back(kind: str, trip: str) -> None:
    """Pending gradients are the same objects, in the same memory, with the same bits."""
    model = _net(kind)
    model(images()).square().sum().backward()
    before = fingerprint(model)
    with pytest.warns(FrozenWeightChangedWarning), frozen_spectral_norm(model):
        ROUND_TRIPS[trip](model)
    assert_as_before(before, model)


@pytest.mark.parametrize("trip", ["half", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_other_gradients_stay(kind: str, trip: str) -> None:
    """What becomes of gradients inside stays: set to None, replaced, written in place."""
    model = _net(kind)
    other, norm = model[1], model[2]
    model(images()).square().sum().backward()
    with pytest.warns(FrozenWeightChangedWarning), frozen_spectral_norm(model):
        other.weight.grad = None
        other.bias.grad = new = torch.full((3,), 7.0)
        with torch.no_grad():
            norm.weight.grad.fill_(0.1)  # type: ignore[union-attr, operator]
        ROUND_TRIPS[trip](model)
    assert other.weight.grad is None
    assert other.bias.grad is new and (new == 7).all()
    assert (norm.weight.grad == torch.tensor(0.1)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_other_changes_stay(kind: str) -> None:
    """What else is written inside stays, also where a frozen weight was edited."""
    model = _net(kind)
    other = model[1]
    assert isinstance(other, nn.Linear)
    with pytest.warns(FrozenWeightChangedWarning), frozen_spectral_norm(model):
        with torch.no_grad():
            model.get_submodule("0.0").weight.mul_(2)  # type: ignore[union-attr, operator]
            other.weight.fill_(5)
        other.bias.data = torch.full((3,), 7.0)
    assert (other.weight == 5).all() and (other.bias == 7).all()
