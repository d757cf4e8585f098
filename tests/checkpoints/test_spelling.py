"""Hook, parametrization and plain: the same network bit for bit.

Finding and respelling are called inside: a file would tell of their result alone.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cli_networks import (
    APPLY,
    Critic,
    Kind,
    Lstm,
    Tokens,
    before_v,
    prefixed,
    trained,
    trained_critic,
)
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn

from sn_export.checkpoints import StateDict
from sn_export.checkpoints.reparametrizations import find_reparametrizations
from sn_export.checkpoints.spelling import Respelled, respell
from sn_export.errors import CheckpointError

KINDS: list[Kind] = ["hook", "parametrization"]
SPELLINGS: list[Kind] = ["plain", "hook", "parametrization"]
NETWORKS: dict[str, tuple[Callable[[Kind], nn.Module], Callable[[], Tensor]]] = {
    "critic": (Critic, lambda: torch.randn(4, 3, 8, 8)),
    "lstm": (Lstm, lambda: torch.randn(3, 2, 4)),
    "tokens": (Tokens, lambda: torch.randint(0, 7, (4, 5))),
}

_TRAINED = {kind: trained_critic(kind).state_dict() for kind in KINDS}


def _state(state: dict[str, Any]) -> StateDict:
    return StateDict((), state, getattr(state, "_metadata", None))


def _values(result: Respelled) -> dict[str, Any]:
    return {name: entry.read() for name, entry in result.entries.items()}


def _respelled(state: dict[str, Any], to: Kind, **dims: int) -> dict[str, Any]:
    return _values(respell(_state(state), to, dims))


def _linear(kind: Kind, rows: int = 4, columns: int = 4, **options: Any) -> nn.Module:
    layer: nn.Module = APPLY[kind](nn.Linear(columns, rows), **options)
    return layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("to", SPELLINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_are_equal_bit_for_bit(kind: Kind, to: Kind, name: str, dtype: torch.dtype) -> None:
    """A network of the other spelling loads the result strictly, and gives the same outputs."""
    build, example = NETWORKS[name]
    model = trained(build(kind), example()).to(dtype).eval()
    x = example()
    x = x.to(dtype) if x.is_floating_point() else x
    other = build(to).to(dtype).eval()
    other.load_state_dict(_respelled(model.state_dict(), to))
    assert torch.equal(other(x), model(x))


@functools.cache
def _trained_as(kind: Kind, to: Kind) -> dict[str, Tensor]:
    return _respelled(_TRAINED[kind], to)


@given(order=st.randoms(use_true_random=False), kind=st.sampled_from(KINDS))
@settings(max_examples=12, deadline=None)
def test_the_order_of_keys_does_not_matter(order: random.Random, kind: Kind) -> None:
    """The order of keys does not change the values, be they sorted or the bias late."""
    state = _TRAINED[kind]
    names = list(state)
    order.shuffle(names)
    shuffled = {name: state[name] for name in names}
    for to in SPELLINGS:
        result, wanted = _respelled(shuffled, to), _trained_as(kind, to)
        assert result.keys() == wanted.keys()
        assert all(torch.equal(value, wanted[name]) for name, value in result.items())


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("to", SPELLINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_keys_and_versions_are_those_of_the_other_network(kind: Kind, to: Kind, name: str) -> None:
    """Keys, their order and the versions are those that the other network would save."""
    build, _ = NETWORKS[name]
    result = respell(_state(build(kind).state_dict()), to)
    wanted = build(to).state_dict()
    assert result.entries.keys() == wanted.keys()
    if name != "lstm":  # of several tensors of one module the parts stay together
        assert list(result.entries) == list(wanted)
    assert result.versions == wanted._metadata  # type: ignore[attr-defined]
    assert list(result.versions or ()) == list(wanted._metadata)  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back_is_the_same_state_dict(kind: Kind) -> None:
    """Hook to parametrization to hook, or the reverse, changes no bit and no key."""
    state = trained(Critic(kind), torch.randn(4, 3, 8, 8)).state_dict()
    there = respell(_state(state), KINDS[1 - KINDS.index(kind)])
    back = respell(StateDict((), _values(there), there.versions), kind)
    assert list(back.entries) == list(state)
    assert back.versions == state._metadata
    assert all(torch.equal(value, state[name]) for name, value in _values(back).items())


def test_nothing_else_is_touched_and_no_random_number_drawn() -> None:
    """Other values are the same objects, and no random number is drawn."""
    model = trained(Critic("parametrization"), torch.randn(4, 3, 8, 8))
    state, before = model.state_dict(), torch.get_rng_state()
    result = _respelled(state, "plain")
    assert torch.equal(torch.get_rng_state(), before)
    assert result["body.1.running_mean"] is state["body.1.running_mean"]
    assert list(state) == list(model.state_dict())


@pytest.mark.parametrize("to", SPELLINGS)
def test_checkpoints_from_before_v_are_as_torch_loads_them(to: Kind) -> None:
    """Without weight_v the result is what torch's own hook makes on loading."""
    model = trained(Critic(), torch.randn(4, 3, 8, 8)).eval()
    old = before_v(model.state_dict(), model)
    loaded = Critic().eval()
    loaded.load_state_dict(dict(old))
    other = Critic(to).eval()
    other.load_state_dict(_respelled(old, to))
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(other(x), loaded(x))


@pytest.mark.parametrize("to", SPELLINGS)
def test_prefixes_of_wrappers_do_not_matter(to: Kind) -> None:
    """Keys and versions are respelled behind the prefix of a wrapper."""
    model = trained(Critic(), torch.randn(4, 3, 8, 8))
    state = prefixed(model.state_dict(), "module.")
    wanted = prefixed(Critic(to).state_dict(), "module.")
    result = respell(_state(state), to)
    assert list(result.entries) == list(wanted)
    assert result.versions == wanted._metadata  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dim", [0, 1])
def test_the_dim_of_a_square_weight_is_what_its_vectors_satisfy(kind: Kind, dim: int) -> None:
    """The vectors of a trained square weight tell its dim."""
    model = trained(_linear(kind, dim=dim), torch.randn(5, 4)).eval()
    plain = nn.Linear(4, 4)
    plain.load_state_dict(_respelled(model.state_dict(), "plain"))
    x = torch.randn(2, 4)
    assert torch.equal(plain(x), model(x))


def test_a_dim_that_cannot_be_told_is_asked_for() -> None:
    """If the vectors do not tell the dim, the message names the option."""
    state = _linear("hook").state_dict()
    with pytest.raises(CheckpointError) as caught:
        _respelled(state, "plain")
    assert str(caught.value) == (
        "cannot tell the dim of 'weight' [4, 4]: its shape and vectors fit 0 or 1; say which "
        "with --dim weight=0"
    )
    value = _respelled(state, "plain", weight=1)["weight"]
    u, v = state["weight_u"], state["weight_v"]
    sigma = torch.dot(u, torch.mv(state["weight_orig"].t(), v))
    assert torch.equal(value, state["weight_orig"] / sigma)
    assert len(_respelled(state, "parametrization")) == 4  # where the dim does not matter


@pytest.mark.parametrize("dim", [1, -1, 2, -3])
def test_a_dim_that_does_not_fit_is_refused(dim: int) -> None:
    """A dim from the caller that does not fit the shapes is refused."""
    state = _linear("hook", 4, 3).state_dict()
    with pytest.raises(CheckpointError) as caught:
        _respelled(state, "plain", weight=dim)
    assert str(caught.value) == (
        f"'weight' [4, 3] with u of 4 elements has dim 0, got --dim weight={dim}"
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_dim_may_be_counted_from_the_end(kind: Kind) -> None:
    """A dim may be counted from the end, as in torch."""
    state = _linear(kind).state_dict()
    first, last = (_respelled(state, "plain", weight=dim)["weight"] for dim in (0, 1))
    assert torch.equal(_respelled(state, "plain", weight=-2)["weight"], first)
    assert torch.equal(_respelled(state, "plain", weight=-1)["weight"], last)
    assert not torch.equal(first, last)


def _broken(change: Callable[[dict[str, Any]], Any], kind: Kind = "hook") -> str:
    state = dict(_linear(kind, 4, 3).state_dict())
    change(state)
    with pytest.raises(CheckpointError) as caught:
        _respelled(state, "plain")
    return str(caught.value)


def test_incomplete_spectral_norm() -> None:
    """A missing vector is named, in either spelling."""
    assert _broken(lambda s: s.pop("weight_u")) == (
        "cannot spell 'weight' as plain: its spectral norm is incomplete: there is 'weight_orig' "
        "without 'weight_u'"
    )
    assert _broken(lambda s: s.pop("weight_v")) == (
        "cannot spell 'weight' as plain: its spectral norm is incomplete: there is 'weight_orig' "
        "without 'weight_v'"
    )
    assert _broken(lambda s: s.pop("parametrizations.weight.0._v"), "parametrization") == (
        "cannot spell 'weight' as plain: its spectral norm is incomplete: there is "
        "'parametrizations.weight.0._u' without 'parametrizations.weight.0._v'"
    )


def test_vectors_that_fit_no_dim() -> None:
    """Vectors that fit no dim, as norms of a convolution operator have them, are refused."""
    assert _broken(lambda s: s.update(weight_u=torch.ones(7))) == (
        "the vectors of 'weight' fit no dim of its shape [4, 3]: u has shape [7] and v has "
        "shape [3]"
    )


def test_not_a_number() -> None:
    """NaN in a weight or a vector is named and counted."""
    assert _broken(lambda s: s["weight_orig"][0].fill_(torch.nan)) == (
        "'weight_orig' is NaN or infinite in 3 of 12 values"
    )
    assert _broken(lambda s: s["weight_v"].fill_(torch.inf)) == (
        "'weight_v' is NaN or infinite in 3 of 3 values"
    )


def test_sigma_zero() -> None:
    """A weight of zeros is refused, as it cannot be divided by its sigma."""
    assert _broken(lambda s: s["weight_orig"].zero_()) == (
        "sigma of 'weight' is 0 or too small to divide by, so its normalised weight would not "
        "be finite"
    )


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        (
            "weight_sigma",
            "'weight_sigma' beside it belongs to a class of its own, not to torch's hook",
        ),
        ("weight_mask", "'weight_mask' beside it says that it is also pruned"),
    ],
)
def test_what_only_model_code_can_compute_is_refused(extra: str, reason: str) -> None:
    """A value that torch's hook alone does not determine is refused."""
    assert _broken(lambda s: s.update({extra: torch.ones(())})) == (
        f"cannot spell 'weight' as plain: {reason}"
    )


def test_chains_of_parametrizations_are_refused() -> None:
    """A chain with a foreign parametrization is refused, as its code is not in the file."""
    state = {
        "parametrizations.weight.original": torch.ones(4, 3),
        "parametrizations.weight.0.factor": torch.ones(()),
        "parametrizations.weight.1._u": torch.ones(4),
        "parametrizations.weight.1._v": torch.ones(3),
    }
    with pytest.raises(CheckpointError) as caught:
        _respelled(state, "plain")
    assert str(caught.value) == (
        "cannot spell 'weight' as plain: only the model's code says what makes it of '0.factor', "
        "'1._u', '1._v', 'original'"
    )


def test_vectors_and_complex_weights_have_no_other_spelling() -> None:
    """A conversion between torch's two implementations is refused where they differ."""
    vector = {"g_orig": torch.ones(3), "g_u": torch.ones(3), "g_v": torch.ones(1)}
    with pytest.raises(CheckpointError) as caught:
        _respelled(vector, "parametrization")
    assert str(caught.value) == (
        "cannot spell 'g' as parametrization: torch's parametrization treats a vector in "
        "another way than its hook does"
    )
    cfloat = torch.complex64
    state = nn.utils.spectral_norm(nn.Linear(3, 4, dtype=cfloat)).state_dict()
    with pytest.raises(CheckpointError) as caught:
        _respelled(state, "parametrization")
    assert str(caught.value) == (
        "cannot spell 'weight' as parametrization: torch's parametrization conjugates u and "
        "its hook does not"
    )


def test_keys_that_only_look_alike_are_left_alone() -> None:
    """Keys that look like parts of a reparametrization, and are none, stay."""
    g, v = torch.ones(2, 2), torch.ones(4, 3)
    assert find_reparametrizations({"a.weight_orig": 1, "a.weight_mask": 2}) == []
    assert find_reparametrizations({"gate_g": g, "gate_v": v}) == []
    assert find_reparametrizations({"w_g": torch.ones(4, 1), "w_v": v, "w": v}) == []
    assert find_reparametrizations({"gate_g": torch.ones(4), "gate_v": torch.ones(4)}) == []
    assert find_reparametrizations({"w_g": torch.ones(0, 1), "w_v": torch.ones(0, 3)}) == []
