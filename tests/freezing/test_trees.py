"""The promises hold for any tree of modules."""

from __future__ import annotations

import pytest
import torch
from fingerprint import assert_unchanged, fingerprint, same_bits
from hypothesis import HealthCheck, given, settings
from strategies import WIDTH, networks
from torch import nn
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.spectral_norm import SpectralNorm

from sn_export import find_spectral_norm, frozen_spectral_norm

examples = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


def under_spectral_norm(model: nn.Module) -> set[str]:
    """Find spectral norm the simple way: by asking every module under every name."""
    found = set()
    for path, module in model.named_modules():
        names = [h.name for h in module._forward_pre_hooks.values() if isinstance(h, SpectralNorm)]
        if is_parametrized(module):
            chains = module.parametrizations.items()  # type: ignore[operator,union-attr]
            names += [n for n, c in chains if any(isinstance(m, _SpectralNorm) for m in c)]
        found |= {f"{path}.{name}".lstrip(".") for name in names}
    return found


@given(model=networks())
@examples
def test_any_tree_is_plain_inside_and_unchanged_after(model: nn.Module) -> None:
    """Outputs are equal outside and inside, no spectral norm is seen inside, no trace is left."""
    expected_sites = under_spectral_norm(model)
    x = torch.ones(2, WIDTH)
    modes = [(module, module.training) for module in model.modules()]
    with torch.no_grad():
        expected = model.eval()(x)
    for module, mode in modes:
        module.training = mode
    before = fingerprint(model)
    assert {site.name for site in find_spectral_norm(model)} == expected_sites
    assert_unchanged(before, model)
    with frozen_spectral_norm(model):
        assert find_spectral_norm(model) == []
        assert under_spectral_norm(model) == set()
        inside = [(module, module.training) for module in model.modules()]
        with torch.no_grad():
            assert same_bits(model.eval()(x), expected)
        for module, mode in inside:
            module.training = mode
        assert expected_sites <= set(dict(model.named_parameters(remove_duplicate=False)))
    assert_unchanged(before, model)


@given(model=networks())
@examples
def test_any_tree_survives_an_error_inside(model: nn.Module) -> None:
    """An error inside the block leaves any tree as it was."""
    before = fingerprint(model)
    with pytest.raises(ZeroDivisionError), frozen_spectral_norm(model):
        _ = 1 / 0
    assert_unchanged(before, model)
