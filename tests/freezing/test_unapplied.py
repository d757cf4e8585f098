"""Weights that a network reads without calling their layer: the block leaves what is in use."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import cast

import pytest
import torch
import torch.nn.functional as F
from fingerprint import assert_unchanged, fingerprint, same_bits
from handwritten_networks import SNLinear, old_spectral_norm
from networks import seed_torch
from reading_networks import CALLERS, READERS, Direct, Tabled
from torch import Tensor, nn
from torch.nn.utils import prune, spectral_norm, weight_norm

from sn_export import (
    ReparametrizationNotAppliedWarning,
    SpectralNormNotAppliedWarning,
    SpectralNormNotRecognisedWarning,
    find_parametrizations,
    frozen_parametrizations,
    frozen_spectral_norm,
)


def pruned(module: nn.Module) -> nn.Module:
    return prune.random_unstructured(module, "weight", 0.5)


HOOKS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "spectral_norm": spectral_norm,
    "weight_norm": weight_norm,
    "pruning": pruned,
    "old": old_spectral_norm,
}


def as_built(model: nn.Module) -> nn.Module:
    return model


def as_run(model: nn.Module) -> nn.Module:
    for training in (True, False):
        model.train(training)
        with torch.no_grad():
            model(torch.randn(4, 3))
    return model


def as_loaded(model: nn.Module) -> nn.Module:
    state = {
        key: t + 1 if t.is_floating_point() and "mask" not in key else t
        for key, t in model.state_dict().items()
    }
    model.load_state_dict(state)
    return model


def as_copied(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        return as_loaded(copy.deepcopy(as_run(model).eval()))


def as_moved(model: nn.Module) -> nn.Module:
    return as_run(model).to(torch.float64).to(torch.float32)


STATES = (as_built, as_run, as_loaded, as_copied, as_moved)
each_state = pytest.mark.parametrize("state", STATES, ids=[s.__name__ for s in STATES])
each_hook = pytest.mark.parametrize("hook", HOOKS)


def output(model: nn.Module) -> Tensor:
    """What an eval forward gives, after one that has set what hooks set."""
    x = torch.linspace(-1, 1, 12).reshape(4, 3)
    with torch.no_grad():
        model(x)
        result: Tensor = model(x)
    return result


@each_hook
@each_state
@pytest.mark.parametrize("name", READERS)
def test_what_is_read_and_never_called_is_left_and_named(
    name: str, hook: str, state: Callable[[nn.Module], nn.Module]
) -> None:
    """The block holds the weight that the network reads, and says that the norm is not applied."""
    seed_torch(0)
    with torch.no_grad():  # so that what the hook leaves can be copied
        model = state(READERS[name](HOOKS[hook])).eval()
    before = fingerprint(model)
    with (
        pytest.warns(ReparametrizationNotAppliedWarning, match="without calling it") as caught,
        frozen_parametrizations(model),
    ):
        inside = output(model)
    assert_unchanged(before, model)
    is_norm = hook in ("spectral_norm", "old")
    assert (caught[0].category is SpectralNormNotAppliedWarning) == is_norm
    assert caught[0].filename == __file__
    assert same_bits(inside, output(model))
    infos = find_parametrizations(model)
    assert infos
    assert not any(info.is_applied for info in infos)


@each_hook
@each_state
@pytest.mark.parametrize("name", CALLERS)
def test_what_is_called_and_read_stays_exact(
    name: str, hook: str, state: Callable[[nn.Module], nn.Module]
) -> None:
    """A layer that is called too has the weight that its hook sets, and nothing is said."""
    seed_torch(0)
    with torch.no_grad():
        model = state(CALLERS[name](HOOKS[hook])).eval()
    iterates = hook == "old"  # in eval mode, too
    expected = None if iterates else output(copy.deepcopy(model))
    before = fingerprint(model)
    with frozen_parametrizations(model):
        inside = output(model)
    assert_unchanged(before, model)
    if expected is not None:
        assert same_bits(inside, expected)
    assert all(info.is_applied for info in find_parametrizations(model))


def test_what_has_run_tells_where_source_does_not() -> None:
    """A layer whose hook never ran in a network that did is left as it is, and named."""
    model = as_run(Tabled(spectral_norm, "reads")).eval()
    expected = output(model)
    with (
        pytest.warns(SpectralNormNotAppliedWarning, match="Tabled has run without calling l"),
        frozen_spectral_norm(model),
    ):
        assert same_bits(output(model), expected)


class Auxiliary(Direct):
    """Has a head that is called in train mode alone."""

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.l(x)) if self.training else x


def test_a_head_of_the_training_keeps_its_norm() -> None:
    """What eval mode neither calls nor reads is frozen as it is called, without a word."""
    model = Auxiliary(spectral_norm).eval()
    output(model)
    expected = copy.deepcopy(model.l)(torch.ones(1, 3))
    with warnings.catch_warnings(), frozen_spectral_norm(model):
        warnings.simplefilter("error")
        assert same_bits(model.l(torch.ones(1, 3)).detach(), expected.detach())


class RawReader(nn.Module):
    """Calls a layer that normalises its own weight, and reads that weight as it is stored."""

    def __init__(self, calls: bool) -> None:
        super().__init__()
        self.layer = SNLinear(3, 3)
        self.calls = calls

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.layer(x) if self.calls else x, self.layer.weight)


@pytest.mark.parametrize("calls", [True, False])
def test_raw_weight_in_use_stays(calls: bool) -> None:
    """Where a forward reads the raw weight of such a layer, it is named, and left as it is."""
    seed_torch(0)
    model = RawReader(calls).eval()
    expected = output(copy.deepcopy(model))
    before = fingerprint(model)
    with (
        pytest.warns(SpectralNormNotRecognisedWarning, match="'layer'"),
        frozen_spectral_norm(model),
    ):
        inside = output(copy.deepcopy(model))
    assert_unchanged(before, model)
    assert same_bits(inside, expected)


def test_the_parent_is_named_where_others_read_too() -> None:
    """Of two that read a weight the one that holds the layer is named."""
    model = nn.TransformerEncoderLayer(4, 2, 4, batch_first=True).eval()
    spectral_norm(model.self_attn.out_proj)
    with (
        pytest.warns(SpectralNormNotAppliedWarning, match=r"torch\.nn\.MultiheadAttention reads"),
        frozen_spectral_norm(model),
    ):
        pass


def test_a_block_on_the_layer_alone_has_its_norm() -> None:
    """Who calls a layer in front of a block calls it, whatever a network around reads."""
    seed_torch(0)
    model = Direct(spectral_norm).eval()
    with torch.no_grad():
        expected = copy.deepcopy(model.l)(torch.ones(1, 3))
    with warnings.catch_warnings(), frozen_spectral_norm(model.l), torch.no_grad():
        warnings.simplefilter("error")
        assert same_bits(model.l(torch.ones(1, 3)), expected)


class EveryStatement(nn.Module):
    """A forward with the statements and expressions of the language, in which nothing is read."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = spectral_norm(nn.Linear(3, 3))
        self.calls = 0

    def forward(self, x: Tensor, *rest: Tensor, **named: Tensor) -> Tensor:
        import math as m

        def inner(y: Tensor, scale: float = 1.0) -> Tensor:
            nonlocal x
            return y * scale

        class Local:
            factor = 1

        pass
        try:
            assert x.ndim, f"{x.ndim:>{2}} dims"
        except (AssertionError, ValueError) as error:
            raise RuntimeError from error
        else:
            self.calls += 1
        finally:
            count: int = 0
        while count < 2:
            count += 1
            if count == 1:
                continue
            break
        with warnings.catch_warnings():
            pairs = {k: v for k, v in zip("ab", (x, x), strict=True) if k}
        match x.ndim:
            case 0 | 1:
                del pairs["a"]
            case n if n > 9:
                pairs = {}
            case _:
                pass
        doubled = [y for y in (*pairs.values(),)][0:1][-1]
        chosen = (lambda t: t)(doubled) if not rest or named else (yes := doubled) + yes
        return self.layer(inner(chosen, m.cos(0) ** Local.factor))


def test_every_statement_is_followed() -> None:
    """Whatever a forward is written with, the layer that it calls is found and frozen."""
    model = EveryStatement().eval()
    wanted = output(model)
    with frozen_spectral_norm(model):
        assert set(model.layer._parameters) == {"bias", "weight"}
        assert same_bits(output(model), wanted)
