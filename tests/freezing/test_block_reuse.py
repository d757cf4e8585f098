"""A block object entered again, as a decorator, and blocks that overlap without nesting."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from typing import Any, ClassVar

import pytest
import torch
from fingerprint import assert_unchanged, fingerprint, same_bits
from networks import KINDS, net
from reparam_networks import mixed
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from sn_export import (
    FrozenWeightChangedWarning,
    find_parametrizations,
    frozen_parametrizations,
    frozen_spectral_norm,
)

each_kind = pytest.mark.parametrize("kind", KINDS)
Block = AbstractContextManager[nn.Module]


@each_kind
def test_block_is_entered_again(kind: str) -> None:
    """One block object serves several with-statements, each with the weights of its time."""
    model = net(kind).eval()
    block = frozen_spectral_norm(model)
    before = fingerprint(model)
    for _ in range(3):
        with block as plain:
            assert plain is model
            first = model.head.weight
        assert_unchanged(before, model)
    other = net(kind, seed=1)
    model.load_state_dict(other.state_dict())
    with block, frozen_spectral_norm(other):
        assert same_bits(model.head.weight, other.head.weight)
        assert not same_bits(model.head.weight, first)


def test_block_is_entered_within_itself() -> None:
    """Entered again inside, the same object finds nothing to do, and leaves in turn."""
    model = mixed()
    before = fingerprint(model)
    block = frozen_parametrizations(model)
    with block:
        weight = model.turn.weight
        with block:
            assert model.turn.weight is weight
        assert model.turn.weight is weight
        assert find_parametrizations(model) == []
    assert_unchanged(before, model)


def test_decorator_freezes_each_call() -> None:
    """As a decorator it freezes each call anew, also one that calls itself; errors come out."""
    model = mixed()
    before = fingerprint(model)

    @frozen_parametrizations(model)
    def count(depth: int) -> int:
        """Count."""
        assert find_parametrizations(model) == []
        return depth and 4 // depth + count(depth - 1)

    assert count.__doc__ == "Count."
    for _ in range(2):
        assert count(2) == 6
        assert_unchanged(before, model)
        with pytest.raises(TypeError, match="unsupported operand"):
            count("2")  # type: ignore[arg-type]
        assert_unchanged(before, model)


def _spectral(model: Any) -> Block:
    return frozen_spectral_norm(model)


def _all(model: Any) -> Block:
    return frozen_parametrizations(model)


def _part(model: Any) -> Block:
    return frozen_parametrizations(model.memory)


def _weight_norm(model: Any) -> Block:
    return frozen_parametrizations(model, "weight_norm")


PAIRS = [
    (_spectral, _spectral),
    (_spectral, _all),
    (_all, _part),
    (_part, _all),
    (_weight_norm, _all),
]


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_blocks_that_overlap(first: Callable[[Any], Block], second: Callable[[Any], Block]) -> None:
    """If the first block ends first, what the second holds stays frozen until that ends, too."""
    model = mixed()
    before = fingerprint(model)
    one, two = ExitStack(), ExitStack()
    one.enter_context(first(model))
    two.enter_context(second(model))
    parameters = {name: p for name, p in model.named_parameters()}
    left = find_parametrizations(model)
    one.close()
    assert {name: p for name, p in model.named_parameters()} == parameters
    assert find_parametrizations(model) == left
    two.close()
    assert_unchanged(before, model)
    with first(model):
        pass
    assert_unchanged(before, model)


def test_three_blocks_in_any_order() -> None:
    """Of three blocks, whichever ends last restores the model."""
    for order in ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)):
        model = mixed()
        before = fingerprint(model)
        blocks = [_part(model), _spectral(model), _all(model)]
        for block in blocks:
            block.__enter__()
        for index in order[:2]:
            blocks[index].__exit__(None, None, None)
        blocks[order[2]].__exit__(None, None, None)
        assert_unchanged(before, model)


def test_blocks_on_different_models_do_not_wait() -> None:
    """A block that ends before one on another model is undone at once."""
    model, other = mixed(), mixed()
    before = fingerprint(model)
    one, two = _all(model), _all(other)
    one.__enter__()
    two.__enter__()
    one.__exit__(None, None, None)
    assert_unchanged(before, model)
    assert find_parametrizations(other) == []
    two.__exit__(None, None, None)


def test_generators_that_take_turns() -> None:
    """Two generators that hold a block on the same model and end in either order."""

    def hold(model: nn.Module) -> Iterator[torch.Tensor]:
        with frozen_spectral_norm(model):
            yield model.head.weight  # type: ignore[misc]
            yield model.head.weight  # type: ignore[misc]

    model = net("parametrization")
    before = fingerprint(model)
    one, two = hold(model), hold(model)
    weight = next(one)
    assert next(two) is weight
    one.close()  # type: ignore[attr-defined]
    assert next(two) is weight
    two.close()  # type: ignore[attr-defined]
    assert_unchanged(before, model)


def test_an_abandoned_block_does_not_hold_others_up() -> None:
    """A later block that is thrown away without an end is ended, and the earlier one with it."""
    model = net("hook")
    before = fingerprint(model)
    one, two = ExitStack(), frozen_spectral_norm(model)
    one.enter_context(frozen_spectral_norm(model))
    two.__enter__()
    one.close()
    assert type(model.head.weight) is nn.Parameter
    del two
    assert_unchanged(before, model)


def test_edits_are_told_by_the_block_that_undoes_them() -> None:
    """A change that is discarded is warned of when that happens."""
    model = net("hook")
    before = fingerprint(model)
    one, two = frozen_spectral_norm(model), frozen_spectral_norm(model)
    one.__enter__()
    two.__enter__()
    one.__exit__(None, None, None)
    with torch.no_grad():
        model.head.weight.zero_()
    with pytest.warns(FrozenWeightChangedWarning, match=r"the frozen 'head.weight' was changed"):
        two.__exit__(None, None, None)
    assert_unchanged(before, model)


class Registered(nn.Linear):
    """A class that keeps a list of its subclasses."""

    known: ClassVar[list[str]] = []

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        Registered.known.append(cls.__name__)


def test_no_subclass_is_announced() -> None:
    """Freezing one of two parametrized tensors runs no ``__init_subclass__`` of the user's."""
    model = Registered(3, 3)
    parametrizations.spectral_norm(model)
    parametrize.register_parametrization(model, "bias", nn.Identity())
    known = list(Registered.known)
    before = fingerprint(model)
    x = torch.ones(1, 3)
    expected = model.eval()(x).detach()
    model.train()
    with frozen_spectral_norm(model):
        assert Registered.known == known
        assert isinstance(model, Registered)
        assert type(model).__bases__ == (Registered,)
        assert type(model).__name__ == "ParametrizedRegistered"
        assert same_bits(model(x).detach(), expected)
    assert_unchanged(before, model)
