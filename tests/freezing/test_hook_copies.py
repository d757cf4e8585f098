"""Copies of torch's hooks, as packages carry them, are known by what they do."""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fingerprint import assert_unchanged, fingerprint, same_bits
from torch import nn

from sn_export import find_parametrizations, find_spectral_norm, frozen_parametrizations


def carried(name: str) -> Callable[[nn.Module], nn.Module]:
    """Return the function of torch that applies a hook, with all around it copied."""
    source = inspect.getsource(sys.modules[f"torch.nn.utils.{name}"])
    namespace: dict[str, Any] = {"__name__": "carried", "__package__": "torch.nn.utils"}
    exec(source, namespace)
    apply: Callable[[nn.Module], nn.Module] = namespace[name]
    return apply


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["spectral_norm", "weight_norm"])
def test_a_copy_of_a_hook_is_frozen(name: str, training: bool) -> None:
    """Inside is the plain layer with the weight of an eval forward; after, all is as it was."""
    model = carried(name)(nn.Linear(3, 4))
    x = torch.randn(2, 3)
    with torch.no_grad():
        model(x)
        expected = copy.deepcopy(model.eval())(x)
    model.train(training)
    before = fingerprint(model)
    assert [(info.name, info.kind) for info in find_parametrizations(model)] == [("weight", name)]
    kinds = [(info.kind, info.n_power_iterations) for info in find_spectral_norm(model)]
    assert kinds == [("hook", 1)] * (name == "spectral_norm")
    with frozen_parametrizations(model), torch.no_grad():
        assert list(model.state_dict()) == ["weight", "bias"]
        assert not model._forward_pre_hooks
        assert same_bits(model(x), expected)
    assert_unchanged(before, model)


@pytest.mark.filterwarnings("ignore::sn_export.SpectralNormNotRecognisedWarning")
@pytest.mark.parametrize("lacking", ["weight_orig", "weight_u", "weight_v"])
def test_a_copy_without_its_tensors_is_none(lacking: str) -> None:
    """A hook whose tensors are not there computes something else, and is left alone."""
    model = carried("spectral_norm")(nn.Linear(3, 4))
    model._parameters.pop(lacking, None)
    model._buffers.pop(lacking, None)
    assert find_parametrizations(model) == []


def test_a_buffer_that_is_named_as_sigma_stays() -> None:
    """Of torch's own hook it is not; copies for convolutions keep their sigma there."""
    model = nn.utils.spectral_norm(nn.Linear(3, 4))
    model.register_buffer("weight_sigma", torch.ones(1))
    before = fingerprint(model)
    with frozen_parametrizations(model):
        assert list(model.state_dict()) == ["weight", "bias", "weight_sigma"]
    assert_unchanged(before, model)
