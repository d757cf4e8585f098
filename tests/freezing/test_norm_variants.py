"""Spectral norms from the literature: each is frozen exactly, or named as a suspect."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from fingerprint import assert_unchanged, fingerprint, same_bits
from norm_variants import VARIANTS
from torch import nn

from sn_export import (
    SpectralNormNotRecognisedWarning,
    find_spectral_norm,
    find_suspects,
    frozen_spectral_norm,
)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", VARIANTS)
def test_found_or_named(name: str, training: bool) -> None:
    """What is found gives the output of an eval forward inside; the rest is named, and left."""
    variant = VARIANTS[name]
    model = nn.Sequential(variant.make())
    for _ in range(2):
        model(variant.x())
    model.train(training)
    with torch.no_grad():
        expected = copy.deepcopy(model).eval()(variant.x())
    before = fingerprint(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SpectralNormNotRecognisedWarning)
        found = [info.name for info in find_spectral_norm(model)]
        suspects = [suspect.module for suspect in find_suspects(model)]
        with frozen_spectral_norm(model), torch.no_grad():
            inside = copy.deepcopy(model).eval()(variant.x())
    assert_unchanged(before, model)
    assert same_bits(inside, expected)
    assert (found, suspects) == ((["0.weight"], []) if variant.is_found else ([], ["0"]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "name", ["per-group", "per-head", "per-projection", "per-head-link", "soft"]
)
def test_dtypes(name: str, dtype: torch.dtype) -> None:
    """A factor of its own for each row or group is found in any dtype, with its rounding."""
    variant = VARIANTS[name]
    model = nn.Sequential(variant.make()).to(dtype).eval()
    x = variant.x().to(dtype)
    with torch.no_grad():
        expected = copy.deepcopy(model)(x)
    assert [info.name for info in find_spectral_norm(model)] == ["0.weight"]
    with frozen_spectral_norm(model), torch.no_grad():
        assert same_bits(model(x), expected)


@pytest.mark.parametrize("name", VARIANTS)
def test_training_goes_on_as_of_a_twin(name: str) -> None:
    """A network that was frozen between its steps trains bit for bit as one that never was."""
    variant = VARIANTS[name]
    models = [nn.Sequential(variant.make()) for _ in range(2)]
    optimizers = [torch.optim.Adam(model.parameters(), lr=0.1) for model in models]
    for step in range(3):
        for index, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            if index:
                model.train(step % 2 == 0)
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", SpectralNormNotRecognisedWarning)
                    with frozen_spectral_norm(model), torch.no_grad():
                        model.eval()(variant.x())
            model.train()
            optimizer.zero_grad()
            model(variant.x()).square().sum().backward()
            optimizer.step()
    states = [model.state_dict() for model in models]
    assert list(states[0]) == list(states[1])
    assert all(same_bits(states[0][key], states[1][key]) for key in states[0])
