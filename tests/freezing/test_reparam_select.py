"""``only=``: kinds and names, and one clear error for what fits nothing.

`GROUPS` is taken from inside, so that a kind that is added is tested.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fingerprint import assert_unchanged, fingerprint
from networks import Scale
from reparam_networks import KIND_OF, mixed, pruned, registered
from torch import nn
from torch.nn.utils import parametrizations

from sn_export import (
    ParametrizationInfo,
    SpectralNormInfo,
    find_parametrizations,
    find_spectral_norm,
    frozen_parametrizations,
)
from sn_export.freezing import describe_sites
from sn_export.freezing.info import GROUPS

SELECTIONS: list[tuple[Any, set[str]]] = [
    (None, set(KIND_OF)),
    ((), set()),
    (GROUPS, set(KIND_OF)),
    *((kind, {name for name in KIND_OF if KIND_OF[name] == kind}) for kind in GROUPS),
    (["weight_norm", "pruning"], {"old.weight", "memory.weight_hh_l0", "sparse.weight"}),
    ("turn.weight", {"turn.weight"}),
    ("turn", {"turn.weight"}),
    ("memory", {"memory.weight_ih_l0", "memory.weight_hh_l0"}),
    ("memory.weight_hh_l0", {"memory.weight_hh_l0"}),
    ("", set(KIND_OF)),
    (iter(["norm", "orthogonal"]), {"norm.weight", "turn.weight"}),
    (
        {"spectral_norm": 1, "memory": 2},
        {"norm.weight", "memory.weight_ih_l0", "memory.weight_hh_l0"},
    ),
]


@pytest.mark.parametrize(
    ("only", "names"), SELECTIONS, ids=[str(i) for i, _ in enumerate(SELECTIONS)]
)
def test_kinds_and_names(only: Any, names: set[str]) -> None:
    """What is listed is what is frozen, and nothing else; a decorator freezes it each time."""
    only = list(only) if hasattr(only, "__next__") else only
    model = mixed()
    before = fingerprint(model)
    assert {info.name for info in find_parametrizations(model, only)} == names
    assert {info.name for info in describe_sites(model, only)} == names
    block = frozen_parametrizations(model, only)

    @block
    def check() -> None:
        left = {info.name for info in find_parametrizations(model)}
        assert left == set(KIND_OF) - names
        frozen = {name for name, _ in model.named_parameters()} & set(KIND_OF)
        assert frozen == names

    check()
    check()
    assert_unchanged(before, model)


@pytest.mark.parametrize("only", ["nothing", "norm.bias", "norm.wei", ["pruning", "nor"], "norm."])
def test_what_fits_nothing(only: Any) -> None:
    """A name that fits nothing is a ValueError that lists kinds and tensors; nothing changes."""
    model = mixed()
    before = fingerprint(model)
    value = only if isinstance(only, str) else only[-1]
    there = ", ".join(f"'{name}' ({kind})" for name, kind in KIND_OF.items())
    for call in (
        find_parametrizations,
        describe_sites,
        lambda *a: frozen_parametrizations(*a).__enter__(),
    ):
        with pytest.raises(ValueError) as caught:
            call(model, only)
        assert sorted(str(caught.value).replace(". The", ", The").split(", ")) == sorted(
            (
                f"only={value!r} is no kind ({', '.join(GROUPS)}), and no name of a "
                "reparametrized tensor or of a module that holds one, "
                f"The model has {there}"
            ).split(", ")
        )
    assert_unchanged(before, model)


def test_what_fits_nothing_in_other_models() -> None:
    """A model with nothing in it says so, and one with much is cut short."""
    with pytest.raises(ValueError, match=r"holds one. The model has none$"):
        find_parametrizations(nn.Linear(2, 2), "weight")
    model = nn.Sequential(*(pruned(nn.Linear(2, 2)) for _ in range(23)))
    with pytest.raises(ValueError, match=r"'19.weight' \(pruning\) and 3 more$"):
        find_parametrizations(model, "weight")


@pytest.mark.parametrize("only", [3, ["pruning", 3], [None], b"pruning"])
def test_what_is_no_string(only: Any) -> None:
    """Anything but strings is a TypeError at once."""
    with pytest.raises(TypeError, match="only must be a kind, the name of a tensor or module"):
        frozen_parametrizations(mixed(), only)


@pytest.mark.parametrize("model", [None, "model", nn.Linear])
def test_no_module(model: Any) -> None:
    """Anything but a module is a TypeError that says what it is."""
    for call in (frozen_parametrizations, find_parametrizations):
        with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got \w+"):
            call(model)


def test_kind_without_a_tensor_is_no_mistake() -> None:
    """A kind that the model has nothing of freezes nothing, as `frozen_spectral_norm` does."""
    model = pruned(nn.Linear(2, 2))
    before = fingerprint(model)
    for kind in set(GROUPS) - {"pruning"}:
        assert find_parametrizations(model, kind) == []
        with frozen_parametrizations(model, kind):
            assert_unchanged(before, model)


def test_name_that_an_outer_block_holds() -> None:
    """A name that is frozen already is no mistake: blocks nest."""
    model = mixed()
    before = fingerprint(model)
    with frozen_parametrizations(model):
        weight = model.turn.weight
        with frozen_parametrizations(model, "turn"), frozen_parametrizations(model, "norm.weight"):
            assert model.turn.weight is weight
        with pytest.raises(ValueError, match="no name of a reparametrized tensor"):
            frozen_parametrizations(model, "turn.bias").__enter__()
    assert_unchanged(before, model)


def test_names_of_a_shared_module() -> None:
    """A module that stands in two places has two names, and either selects it."""
    shared = pruned(nn.Linear(2, 2))
    model = nn.ModuleDict({"first": shared, "second": nn.Sequential(shared)})
    for only in ("first", "first.weight", "second", "second.0", "second.0.weight"):
        (info,) = find_parametrizations(model, only)
        assert info.name == "first.weight"


def test_a_chain_is_what_torch_has_in_it() -> None:
    """A chain of torch's own link and another one counts as torch's kind."""
    for link, kind in (
        (parametrizations.weight_norm, "weight_norm"),
        (parametrizations.orthogonal, "orthogonal"),
        (parametrizations.spectral_norm, "spectral_norm"),
    ):
        # The other two must come first: they cannot be set up with a value that is computed.
        for first in (True, False) if kind == "spectral_norm" else (True,):
            model = nn.Linear(3, 3)
            for apply in (link, registered(Scale)) if first else (registered(Scale), link):
                apply(model, "weight")
            assert [info.kind for info in find_parametrizations(model)] == [kind]


def test_listings_of_spectral_norm_agree() -> None:
    """`describe_sites` is `find_spectral_norm` without warnings; it lists the others if asked."""
    model = mixed()
    infos = find_spectral_norm(model)
    assert describe_sites(model) == infos
    everything = describe_sites(model, None)
    assert [info for info in everything if isinstance(info, SpectralNormInfo)] == infos
    others = [info for info in everything if isinstance(info, ParametrizationInfo)]
    assert others == [i for i in find_parametrizations(model) if i.kind != "spectral_norm"]
    assert others[0] == ParametrizationInfo("turn", "weight", "orthogonal", (4, 4), "float32")


def test_listing_needs_no_values() -> None:
    """On the meta device the listing is the same."""
    model = mixed()
    infos = find_parametrizations(model)
    with torch.no_grad():
        assert find_parametrizations(model.to("meta")) == infos
