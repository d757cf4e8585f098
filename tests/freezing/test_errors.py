"""What cannot be frozen is refused by name, and nothing has changed then."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from fingerprint import assert_unchanged, fingerprint
from networks import HOOKS, KINDS
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.nn.utils import parametrize

from sn_export import (
    FreezeError,
    SnExportError,
    find_spectral_norm,
    frozen_parametrizations,
    frozen_spectral_norm,
)

each_kind = pytest.mark.parametrize("kind", KINDS)


def refused(model: nn.Module) -> FreezeError:
    """Return the error of a model that is refused; what comes before it in the walk is sound."""
    before = fingerprint(model)
    with pytest.raises(FreezeError) as caught, frozen_spectral_norm(model):
        raise AssertionError("the block was entered")
    assert_unchanged(before, model)
    error = caught.value
    assert isinstance(error, SnExportError)
    assert str(error) == f"cannot freeze '{error.tensor}': {error.reason}. {error.remedy}"
    return error


def beside_sound_ones(kind: str, faulty: nn.Module) -> nn.Module:
    """Put a faulty module between two that can be frozen."""
    return nn.Sequential(
        KINDS[kind](nn.Linear(2, 2)),
        nn.ModuleDict({"faulty": faulty}),
        KINDS[kind](nn.Linear(2, 2)),
    )


@each_kind
def test_meta_weights_are_refused(kind: str) -> None:
    """A weight without values is refused with the way to load them."""
    faulty = KINDS[kind](nn.Linear(2, 2, device="meta"))
    assert str(refused(beside_sound_ones(kind, faulty))) == (
        "cannot freeze '1.faulty.weight': it is on the meta device and has no values. "
        "Load the weights first, for example with load_state_dict(..., assign=True)"
    )


@pytest.mark.parametrize("kind", [*HOOKS, "parametrization", "chain-last"])
def test_partly_meta_weights_are_refused(kind: str) -> None:
    """A weight whose singular vectors alone are without values is refused as well."""
    faulty = KINDS[kind](nn.Linear(2, 2))
    owner: Any = faulty if kind in HOOKS else faulty.parametrizations.weight[-1]  # type: ignore[index,union-attr]
    name = "weight_u" if kind in HOOKS else "_u"
    owner._buffers[name] = owner._buffers[name].to("meta")
    error = refused(beside_sound_ones(kind, faulty))
    assert error.tensor == "1.faulty.weight"
    assert error.reason == "it is on the meta device and has no values"


@pytest.mark.parametrize("kind", [*HOOKS, "parametrization"])
def test_uninitialised_weights_are_refused(kind: str) -> None:
    """A lazy weight that no forward pass has given a shape is refused with what to do."""
    faulty = KINDS[kind](nn.Linear(2, 2))
    owner: Any = faulty if kind in HOOKS else faulty.parametrizations.weight  # type: ignore[union-attr]
    owner._parameters["weight_orig" if kind in HOOKS else "original"] = UninitializedParameter()
    model = nn.Sequential(KINDS[kind](nn.Linear(2, 2)), faulty)
    keys = list(vars(faulty))
    with pytest.raises(FreezeError) as caught, frozen_spectral_norm(model):
        raise AssertionError("the block was entered")
    assert str(caught.value) == (
        "cannot freeze '1.weight': it is not initialised yet. "
        "Run one forward pass through the model first"
    )
    assert list(vars(faulty)) == keys
    assert "weight" not in model[0]._parameters


@each_kind
def test_lazy_modules_without_spectral_norm_do_not_matter(kind: str) -> None:
    """A lazy module elsewhere in the model is left as it is and hinders nothing."""
    model = nn.Sequential(KINDS[kind](nn.Linear(2, 2)), nn.LazyLinear(3), nn.LazyBatchNorm1d())
    with frozen_spectral_norm(model):
        assert type(model[0].weight) is nn.Parameter
    assert isinstance(model[1].weight, UninitializedParameter)
    assert isinstance(model[2].running_mean, UninitializedBuffer)
    assert model(torch.randn(4, 2)).shape == (4, 3)


@pytest.mark.parametrize("buffer", ["weight_u", "weight_v"])
@pytest.mark.parametrize("kind", HOOKS)
def test_hook_without_its_vectors_is_refused(kind: str, buffer: str) -> None:
    """A hook whose singular vector is gone is refused; the message names the vector."""
    faulty = KINDS[kind](nn.Linear(2, 2))
    del faulty._buffers[buffer]
    assert str(refused(beside_sound_ones(kind, faulty))) == (
        f"cannot freeze '1.faulty.weight': its spectral norm hook finds no parameter or buffer "
        f"'{buffer}'. Remove whatever renamed it (pruning, another reparametrization) first"
    )


def test_value_that_cannot_be_computed_is_refused() -> None:
    """An error in a parametrization becomes a FreezeError that names the tensor and the cause."""

    class Broken(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            if not self.training:
                raise ValueError("no such weight")
            return weight

    faulty = KINDS["parametrization"](nn.Linear(2, 2))
    nn.utils.parametrize.register_parametrization(faulty, "weight", Broken())
    error = refused(beside_sound_ones("parametrization", faulty))
    assert str(error) == (
        "cannot freeze '1.faulty.weight': computing its parametrization value raised "
        "ValueError: no such weight. An eval-mode forward of this module would fail as well"
    )
    assert isinstance(error.__cause__, ValueError)


def traced(kind: str) -> torch.jit.ScriptModule:
    """Compile a layer under spectral norm."""
    layer = KINDS[kind](nn.Linear(2, 2)).eval()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        return torch.jit.trace(nn.Sequential(layer), torch.zeros(1, 2), check_trace=False)  # type: ignore[no-any-return,no-untyped-call]


@pytest.mark.parametrize(
    ("kind", "name"),
    [("hook", "0.weight_orig"), ("parametrization", "0.parametrizations.weight.original")],
)
def test_scripted_spectral_norm_is_refused(kind: str, name: str) -> None:
    """Compiled spectral norm is refused, at the root and below, by both functions."""
    module = traced(kind)
    hint = (
        "it belongs to a ScriptModule, whose spectral norm is compiled code. "
        "Freeze the Python module first, then script or trace it inside the block"
    )
    for model, prefix in ((module, ""), (nn.ModuleList([module]), "0.")):
        for function in (lambda m: frozen_spectral_norm(m).__enter__(), find_spectral_norm):
            with pytest.raises(FreezeError) as caught:
                function(model)
            assert str(caught.value) == f"cannot freeze '{prefix}{name}': {hint}"


def test_scripted_module_without_spectral_norm_is_no_hindrance() -> None:
    """A compiled part without spectral norm stays in the model, and the rest is frozen."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(nn.Linear(2, 2))
    model = nn.Sequential(KINDS["hook"](nn.Linear(2, 2)), scripted)
    with frozen_spectral_norm(model):
        assert model[1] is scripted
        assert "weight" in model[0]._parameters


@pytest.mark.parametrize("thing", [None, "model", 3, [nn.Linear(2, 2)], nn.Linear])
def test_what_is_no_module_is_a_type_error(thing: Any) -> None:
    """What is not a module is refused at the call already, by its type's name."""
    message = f"model must be a torch.nn.Module, got {type(thing).__name__}"
    for function in (frozen_spectral_norm, find_spectral_norm):
        with pytest.raises(TypeError) as caught:
            function(thing)
        assert str(caught.value) == message


def test_removed_property_of_a_copy_is_refused() -> None:
    """Where torch has deleted the property that copies share, the copy is refused, unharmed."""
    import copy

    model = KINDS["parametrization"](nn.Linear(2, 2))
    sibling = copy.deepcopy(model)
    nn.utils.parametrize.remove_parametrizations(sibling, "weight")
    if "weight" in vars(type(model)):
        pytest.fail("torch no longer deletes the shared property: drop the refusal")
    before = list(vars(model)), type(model)
    with pytest.raises(FreezeError) as caught, frozen_spectral_norm(model):
        raise AssertionError("the block was entered")
    assert str(caught.value) == (
        "cannot freeze 'weight': class ParametrizedLinear has no property of its own for it. "
        "remove_parametrizations on a deep copy deletes the property that all copies "
        "share; build the model anew and load its state dict"
    )
    assert (list(vars(model)), type(model)) == before


def test_a_value_that_is_no_tensor_is_refused() -> None:
    """A parametrization that gives a pair has no one weight, which is said with its type."""

    class Pair(nn.Module):
        def forward(self, weight: Tensor) -> tuple[Tensor, Tensor]:
            return weight, weight

    model = nn.Linear(2, 2)
    parametrize.register_parametrization(model, "weight", Pair(), unsafe=True)
    with (
        pytest.raises(FreezeError, match="'weight': its parametrization value is of type tuple"),
        frozen_parametrizations(model),
    ):
        raise AssertionError("the block was entered")
