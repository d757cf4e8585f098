"""Handwritten spectral norm: found by what it holds and does, frozen and restored exactly."""

from __future__ import annotations

import copy
import functools
import math
import pickle
import warnings
from typing import Any, cast

import pytest
import torch
from fingerprint import assert_unchanged, contents, fingerprint, same_bits
from handwritten_networks import CASES, Case, old_spectral_norm, set_weight
from torch import Tensor, nn

from sn_export import find_spectral_norm, find_suspects, frozen_spectral_norm

each = pytest.mark.parametrize("name", CASES)
STATES = ("new", "trained", "loaded")


def bring_to(state: str, model: nn.Module, case: Case) -> None:
    """Bring a new model, in place, into a state that real models are found in."""
    if state == "trained":  # the last forward leaves a weight with a graph behind
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
        for _ in range(2):
            optimizer.zero_grad()
            case.run(model).square().sum().backward()
            optimizer.step()
    elif state == "loaded":
        case.run(model)
        model.load_state_dict(case.make(seed=1).state_dict())


def next_eval_output(case: Case, model: nn.Module) -> Tensor:
    """What a fresh copy of the model gives in its next eval-mode forward."""
    twin = case.make(seed=2)
    twin.load_state_dict(model.state_dict())
    with torch.no_grad():
        return case.run(twin.eval())


def layer_of(case: Case, model: nn.Module) -> nn.Module:
    """The layer that the weight belongs to."""
    return model.get_submodule(case.layer)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("state", STATES)
@each
def test_block_is_exact_inside_and_leaves_no_trace(name: str, state: str, training: bool) -> None:
    """Inside stands the weight of the next eval forward, plain; after, nothing changed."""
    case = CASES[name]
    model = case.make()
    bring_to(state, model, case)
    model.train(training)
    expected = next_eval_output(case, model)
    plain = case.plain()
    before = fingerprint(model)

    with frozen_spectral_norm(model) as inside:
        assert inside is model
        layer = layer_of(case, model)
        weight = layer._parameters[case.tensor]
        assert type(weight) is nn.Parameter
        assert getattr(layer, case.tensor) is weight
        assert not weight.requires_grad
        assert list(layer.state_dict()) == list(plain.state_dict())
        assert [n for n, _ in layer.named_parameters()] == [n for n, _ in plain.named_parameters()]
        assert len(model.state_dict()) == len(plain.state_dict())
        assert all(m.training is training for m in model.modules())
        model.eval()
        with torch.no_grad():
            assert same_bits(case.run(model), expected)
            assert same_bits(case.run(model), expected)
        model.train(training)

    assert_unchanged(before, model)


@pytest.mark.parametrize("made_inside", [True, False])
@each
def test_inference_mode_does_not_matter(name: str, made_inside: bool) -> None:
    """Asked in inference mode, also if made in it, a module gives the same normal parameter."""
    case = CASES[name]
    with torch.inference_mode(made_inside):
        model = case.make().eval()
    expected = next_eval_output(case, case.make())
    before = fingerprint(model)
    with torch.inference_mode():
        assert [info.name for info in find_spectral_norm(model)] == [case.name]
        with frozen_spectral_norm(model):
            assert not cast(Tensor, layer_of(case, model)._parameters[case.tensor]).is_inference()
            assert same_bits(case.run(model), expected)
    assert_unchanged(before, model)


@each
def test_training_inside_changes_no_state_of_spectral_norm(name: str) -> None:
    """Forward passes in train mode use the frozen weight, and write neither u, v nor sigma."""
    case = CASES[name]
    model = case.make().train()
    expected = next_eval_output(case, model)
    before = fingerprint(model)
    with frozen_spectral_norm(model):
        with torch.no_grad():
            assert same_bits(case.run(model), expected)
        state = {key: contents(value) for key, value in model.state_dict().items()}
        case.run(model)
        assert state == {key: contents(value) for key, value in model.state_dict().items()}
    assert_unchanged(before, model)


@each
def test_is_listed_and_only_looked_at(name: str) -> None:
    """Each is found, by its family, with a sigma that its weight is divided by, if there is one."""
    case = CASES[name]
    model = nn.Sequential(case.make())
    before = fingerprint(model)
    (info,) = find_spectral_norm(model)
    assert find_suspects(model) == []
    assert_unchanged(before, model)
    assert info.name == f"0.{case.name}"
    assert info.kind == case.kind
    raw = next(p for p in model.parameters() if p.shape == info.shape and p.requires_grad)
    with frozen_spectral_norm(model):
        weight = layer_of(case, cast(nn.Module, model[0]))._parameters[case.tensor]
        assert weight is not None
        assert info.shape == tuple(weight.shape)
        if name == "wrapper-masked":
            assert math.isnan(info.sigma)  # no one number divides
        else:
            torch.testing.assert_close(weight * info.sigma, raw.detach())
        assert find_spectral_norm(model) == []


@each
def test_copies_stand_for_themselves(name: str) -> None:
    """A deep copy from inside is a plain network for good; a copy from outside is untouched."""
    case = CASES[name]
    model = case.make()
    sibling = copy.deepcopy(model)
    expected = next_eval_output(case, model)
    before = fingerprint(model, sibling)
    with frozen_spectral_norm(model):
        inner = copy.deepcopy(model)
        keys = list(model.state_dict())
    assert_unchanged(before, model, sibling)
    assert list(inner.state_dict()) == keys
    assert type(inner).__name__ == type(model).__name__
    assert isinstance(inner, type(model))
    with torch.no_grad():
        assert same_bits(case.run(inner.eval()), expected)
        assert same_bits(case.run(inner), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert find_spectral_norm(inner) == []


@each
def test_can_be_pickled_inside(name: str) -> None:
    """A pickle made inside holds the plain network."""
    case = CASES[name]
    model = case.make()
    expected = next_eval_output(case, model)
    with frozen_spectral_norm(model):
        keys = list(model.state_dict())
        loaded = pickle.loads(pickle.dumps(model))
    assert list(loaded.state_dict()) == keys
    with torch.no_grad():
        assert same_bits(case.run(loaded.eval()), expected)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@each
def test_exceptions_and_nesting_restore(name: str, error: type[BaseException]) -> None:
    """An exception out of two nested blocks, after a change of mode, restores all but the mode."""
    case = CASES[name]
    model = case.make()
    before = fingerprint(model)
    with (
        pytest.raises(error),
        frozen_spectral_norm(model),
        frozen_spectral_norm(model),
    ):
        model.eval()
        raise error
    assert not model.training
    model.train()
    assert_unchanged(before, model)


@pytest.mark.parametrize("name", ["wrapper-conv", "biggan-conv", "inline"])
def test_interrupt_while_the_module_is_asked(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """KeyboardInterrupt out of the user's own code leaves no trace."""
    case = CASES[name]
    model = case.make()
    before = fingerprint(model)

    def interrupt(*args: object, **kwargs: object) -> Tensor:
        raise KeyboardInterrupt

    import handwritten_networks

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        for function in ("l2normalize", "power_iteration", "max_singular_value"):
            patched.setattr(handwritten_networks, function, interrupt)
        with frozen_spectral_norm(model):
            raise AssertionError("not reached")
    assert_unchanged(before, model)


@each
def test_hooks_on_module_and_layer_run_as_before(name: str) -> None:
    """Hooks of the user's run inside just as outside, and not while the module is asked."""
    case = CASES[name]
    model = case.make().eval()
    calls: list[str] = []
    model.register_forward_hook(lambda m, a, o: calls.append("module"))
    if case.layer:
        layer = layer_of(case, model)
        layer.register_forward_pre_hook(lambda m, a: calls.append("before the layer"))
        layer.register_forward_hook(lambda m, a, o: calls.append("after the layer"))
        layer.register_backward_hook(lambda m, a, o: None)
    case.run(model)
    outside = calls.copy()
    calls.clear()
    with frozen_spectral_norm(model):
        assert calls == []
        case.run(model)
    assert calls == outside


def test_what_a_prehook_adds_to_the_state_dict_goes_with_it() -> None:
    """Inside, its version is not written into the state dict, which is that of a plain layer."""
    case = CASES["prehook-operator"]
    with frozen_spectral_norm(case.make()) as model:
        inside, plain = model.state_dict(), case.plain().state_dict()
        assert getattr(inside, "_metadata", None) == getattr(plain, "_metadata", None)


def test_a_mode_given_inside_reaches_the_helper() -> None:
    """A child that is away for the length of the block has the mode of its module afterwards."""
    model = CASES["helped-torch"].make()
    with frozen_spectral_norm(model):
        model.eval()
    assert [module.training for module in model.modules()] == [False, False]


def test_attributes_of_a_hook_stay() -> None:
    """What a hook's object writes to itself while it is asked is put back."""
    model = CASES["prehook"].make()
    (hook,) = model._forward_pre_hooks.values()
    calls = vars(hook)["calls"]
    with frozen_spectral_norm(model):
        pass
    assert vars(hook)["calls"] is calls
    assert calls == 0


def _closed_over() -> Any:
    setting = set_weight

    def hook(module: nn.Module, inputs: Any) -> None:
        setting(module, inputs)

    return hook


class Setter:
    """Holds a pre-hook as a method."""

    set_statically = staticmethod(set_weight)

    def set_weight(self, module: nn.Module, inputs: Any) -> None:
        set_weight(module, inputs)


class SettingModule(Setter, nn.Module):
    """Is a module, beside the layer."""


_FUNCTIONS: dict[str, Any] = {
    "closure": _closed_over,
    "lambda": lambda: lambda module, inputs: set_weight(module, inputs),
    "partial": lambda: functools.partial(set_weight, name="weight"),
    "partial of a partial": lambda: functools.partial(functools.partial(set_weight), name="weight"),
    "decorated": lambda: torch.no_grad()(set_weight),
    "method": lambda: Setter().set_weight,
    "method of a module": lambda: SettingModule().set_weight,
    "static method": lambda: Setter.set_statically,
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", _FUNCTIONS)
def test_functions_around_a_prehook(kind: str, training: bool) -> None:
    """A pre-hook is known by what it calls, from a closure, a lambda or a partial too."""
    model = old_spectral_norm(nn.Linear(3, 4), _FUNCTIONS[kind]()).train(training)
    model(torch.randn(2, 3))
    x, before = torch.randn(2, 3), fingerprint(model)
    assert [(info.name, info.kind) for info in find_spectral_norm(model)] == [("weight", "prehook")]
    with frozen_spectral_norm(model) as plain, torch.no_grad():
        assert list(plain.state_dict()) == ["weight", "bias"]
        inside = plain(x)
    assert_unchanged(before, model)
    with torch.no_grad():
        assert same_bits(inside, model.eval()(x))
