"""The ways out of a block: each leaves the model as it was, and nothing behind."""

from __future__ import annotations

import gc
import pickle
import threading
import weakref
from collections.abc import Iterator

import pytest
import torch
from fingerprint import all_same_bits, assert_unchanged, fingerprint, live_tensors, same_bits
from networks import HOOKS, KINDS, Net, Scale, images, net, raw
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, spectral_norm

from sn_export import FreezeError, frozen_spectral_norm

each_kind = pytest.mark.parametrize("kind", KINDS)


class Unexpected(Exception):
    """An error of the caller's own."""


@each_kind
@pytest.mark.parametrize("error", [Unexpected, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_any_exception_restores_and_goes_on(kind: str, error: type[BaseException]) -> None:
    """An exception raised inside restores the model and is not swallowed."""
    model = net(kind)
    before = fingerprint(model)
    with pytest.raises(error, match="inside"), frozen_spectral_norm(model):
        raise error("inside")
    assert_unchanged(before, model)


@each_kind
def test_closed_generator_restores(kind: str) -> None:
    """A generator that is closed while it holds a block restores the model."""

    def hold(model: nn.Module) -> Iterator[None]:
        with frozen_spectral_norm(model):
            yield

    model = net(kind)
    before = fingerprint(model)
    generator = hold(model)
    next(generator)
    assert type(model.head) is nn.Linear  # type: ignore[comparison-overlap]
    generator.close()  # type: ignore[attr-defined]
    assert_unchanged(before, model)


@each_kind
def test_return_and_break_restore(kind: str) -> None:
    """Leaving by return or break restores the model like any other way."""

    def value(model: Net) -> Tensor:
        with frozen_spectral_norm(model) as plain:
            return plain.head.weight

    model = net(kind)
    before = fingerprint(model)
    assert not value(model).requires_grad
    for _ in range(2):
        with frozen_spectral_norm(model):
            break
    assert_unchanged(before, model)


@each_kind
def test_blocks_nest(kind: str) -> None:
    """An inner block finds nothing to do: the weights are the outer block's until that ends."""
    model = net(kind)
    before = fingerprint(model)
    with frozen_spectral_norm(model):
        weight = model.head.weight
        with frozen_spectral_norm(model), frozen_spectral_norm(model.head):
            assert model.head.weight is weight
        assert model.head.weight is weight
        assert type(model.conv) is nn.Conv2d
    assert_unchanged(before, model)


@each_kind
def test_block_on_a_part_inside_and_outside(kind: str) -> None:
    """A block on a part leaves the rest alone, and a block on the whole takes the rest in."""
    model = net(kind)
    before = fingerprint(model)
    with frozen_spectral_norm(model.head):
        weight = model.head.weight
        assert "weight" not in model.conv._parameters
        with frozen_spectral_norm(model):
            assert type(model.conv.weight) is nn.Parameter
            assert model.head.weight is weight
        assert "weight" not in model.conv._parameters
        assert model.head.weight is weight
    assert_unchanged(before, model)


@each_kind
def test_fifty_blocks_leave_no_trace(kind: str) -> None:
    """Fifty blocks in a row leave no tensor, class, hook or claim behind."""
    model = net(kind)
    other = parametrizations.spectral_norm(nn.Linear(2, 2))
    parametrize.register_parametrization(other, "bias", Scale())
    before = fingerprint(model, other)
    with frozen_spectral_norm(model), frozen_spectral_norm(other):
        pass
    gc.collect()
    tensors = live_tensors()
    classes = len(nn.Linear.__subclasses__())
    for _ in range(50):
        with frozen_spectral_norm(model), frozen_spectral_norm(other):
            pass
    assert live_tensors() == tensors
    assert len(nn.Linear.__subclasses__()) == classes
    assert_unchanged(before, model, other)


@each_kind
def test_no_frozen_weight_outlives_the_block(kind: str) -> None:
    """After the block nothing holds a frozen weight, not even until the next collection."""
    model = net(kind)
    gc.collect()
    gc.disable()
    try:
        with frozen_spectral_norm(model):
            weights = [weakref.ref(model.conv.weight), weakref.ref(model.head.weight)]
            assert all(ref() is not None for ref in weights)
        assert [ref() for ref in weights] == [None, None]
    finally:
        gc.enable()


def test_block_does_not_keep_the_model_alive() -> None:
    """A finished block that is kept in a variable holds no frozen weight."""
    model = net("parametrization")
    block = frozen_spectral_norm(model)
    with block:
        weight = weakref.ref(model.head.weight)
    gc.collect()
    assert weight() is None


@each_kind
def test_another_thread_is_refused_while_the_model_is_held(kind: str) -> None:
    """A second thread is refused the model and its parts, but neither copies nor other models."""
    model, stranger = net(kind), net(kind)
    before = fingerprint(model)
    errors: list[str] = []
    frozen: list[bool] = []

    def intrude() -> None:
        for target in (model, model.head, nn.Sequential(model)):
            try:
                with frozen_spectral_norm(target):
                    frozen.append(True)
            except FreezeError as error:
                errors.append(str(error))
        with frozen_spectral_norm(stranger):
            frozen.append(type(stranger.head) is nn.Linear)

    def in_a_thread() -> None:
        thread = threading.Thread(target=intrude)
        thread.start()
        thread.join()

    with frozen_spectral_norm(model):
        in_a_thread()
    hint = (
        "a block in another thread holds it frozen. "
        "Leave that block first, or give each thread its own copy of the model"
    )
    assert errors == [
        f"cannot freeze 'conv': {hint}",
        f"cannot freeze 'Linear': {hint}",
        f"cannot freeze '0.conv': {hint}",
    ]
    assert frozen == [True]
    assert_unchanged(before, model)
    in_a_thread()
    assert frozen == [True] * 5
    assert len(errors) == 3


@pytest.mark.parametrize("kind", HOOKS)
def test_handles_of_the_hook_and_of_others_still_work(kind: str) -> None:
    """Handles taken before the block remove the very hooks they were given for."""
    model = nn.Linear(3, 3)
    calls: list[str] = []
    first = model.register_forward_pre_hook(lambda m, x: calls.append("first"))
    KINDS[kind](model)
    last = model.register_forward_pre_hook(lambda m, x: calls.append("last"))
    order = list(model._forward_pre_hooks.items())
    with frozen_spectral_norm(model):
        model(torch.zeros(1, 3))
        assert calls == ["first", "last"]
    assert list(model._forward_pre_hooks.items()) == order
    last.remove()
    first.remove()
    assert list(model._forward_pre_hooks.items()) == order[1:2]
    nn.utils.remove_spectral_norm(model)
    assert type(model.weight) is nn.Parameter


@each_kind
def test_handle_taken_before_removes_its_hook_inside(kind: str) -> None:
    """A user's hook that is removed inside the block stays removed."""
    model = KINDS[kind](nn.Linear(3, 3))
    calls: list[int] = []
    handle = model.register_forward_pre_hook(lambda m, x: calls.append(1))
    before = set(model._forward_pre_hooks)
    with frozen_spectral_norm(model):
        handle.remove()
    model(torch.zeros(1, 3))
    assert calls == []
    assert set(model._forward_pre_hooks) == before - {handle.id}


def test_plain_network_can_be_pickled_inside() -> None:
    """Inside, torch's ban on pickling parametrized modules is gone: nothing is parametrized."""
    model = net("parametrization").eval()
    with frozen_spectral_norm(model), torch.no_grad():
        expected = model(images())
        loaded = pickle.loads(pickle.dumps(model))
    assert type(loaded.head) is nn.Linear
    with torch.no_grad():
        assert same_bits(loaded(images()), expected)


@each_kind
def test_context_of_torch_does_not_matter(kind: str) -> None:
    """Inference mode, no_grad and a cache of parametrizations change neither value nor way back."""
    model = net(kind).eval()
    with torch.no_grad():
        expected = model(images())
    before = fingerprint(model)
    with torch.inference_mode(), frozen_spectral_norm(model):
        inference = model(images())
        assert not model.head.weight.is_inference()
    assert_unchanged(before, model)
    with torch.enable_grad(), frozen_spectral_norm(model):
        plain = model(images())
        assert not model.head.weight.requires_grad
    with parametrize.cached(), frozen_spectral_norm(model), torch.no_grad():
        cached = model(images())
    assert_unchanged(before, model)
    assert all_same_bits((inference, plain.detach(), cached), (expected,) * 3)


@each_kind
def test_other_parametrizations_of_the_module_stay(kind: str) -> None:
    """What parametrizes another tensor of the same module stays in place and in use."""
    model = KINDS[kind](nn.Linear(3, 3))
    parametrize.register_parametrization(model, "bias", Scale())
    sibling = parametrize.register_parametrization(nn.Linear(3, 3), "bias", Scale())
    model.eval()
    x = torch.randn(2, 3)
    with torch.no_grad():
        expected = model(x)
    before = fingerprint(model)
    with frozen_spectral_norm(model):
        assert parametrize.is_parametrized(model, "bias")
        assert not parametrize.is_parametrized(model, "weight")
        assert type(model.weight) is nn.Parameter
        assert set(model.state_dict()) == set(sibling.state_dict())
        assert type(model).__name__ == type(sibling).__name__
        with torch.no_grad():
            assert same_bits(model(x), expected)
    assert_unchanged(before, model)


def test_optimizer_goes_on_with_the_same_parameters() -> None:
    """An optimizer made before the block steps the parameters that stand there after it."""
    model = spectral_norm(nn.Linear(3, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with frozen_spectral_norm(model):
        pass
    old = raw(model, "hook").detach().clone()
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert not torch.equal(raw(model, "hook"), old)
