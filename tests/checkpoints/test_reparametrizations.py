"""Weight norm, pruning and other reparametrizations in a checkpoint, mixed with spectral norm.

Finding and respelling are called inside, on states that no file of torch would hold.
"""

from __future__ import annotations

import random
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_networks import Kind, prefixed, trained
from hypothesis import given, settings, strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm
from vocoder_networks import NETWORKS, WEIGHT_NORM, Discriminators, Generator

from sn_export.checkpoints import (
    convert_checkpoint,
    inspect_checkpoint,
    load_checkpoint,
    read_checkpoint,
)
from sn_export.checkpoints.content import StateDict
from sn_export.checkpoints.reparametrizations import find_reparametrizations
from sn_export.checkpoints.spelling import respell
from sn_export.errors import CheckpointError

KINDS: list[Kind] = ["hook", "parametrization"]
SPELLINGS: list[Kind] = ["plain", "hook", "parametrization"]


def _trained(name: str, kind: Kind, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    build, shape = NETWORKS[name]
    x = torch.randn(shape)
    return trained(build(kind), x).eval().to(dtype), x.to(dtype)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("to", SPELLINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_either_spelling_loads_into_any(kind: Kind, to: Kind, name: str, tmp_path: Path) -> None:
    """A network of any spelling loads either spelling, and computes the same bits."""
    model, x = _trained(name, kind)
    torch.save({"net": prefixed(model.state_dict(), "module.")}, tmp_path / "a.pt")
    other = NETWORKS[name][0](to)
    load_checkpoint(other, read_checkpoint(tmp_path / "a.pt"))
    assert torch.equal(other.eval()(x), model(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("to", SPELLINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_convert_is_bit_for_bit(
    kind: Kind, to: Kind, name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """The other network loads the converted file strictly, and computes the same bits."""
    model, x = _trained(name, kind, dtype)
    save_file(model.state_dict(), tmp_path / "a.safetensors")
    made = convert_checkpoint(tmp_path / "a.safetensors", tmp_path / "b.pt", to)
    other = NETWORKS[name][0](to).to(dtype).eval()
    other.load_state_dict(torch.load(tmp_path / "b.pt"))
    assert torch.equal(other(x), model(x))
    assert len(made.changed) == (0 if kind == to else len(made.found))


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("to", SPELLINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_keys_and_versions_are_those_of_the_other_network(kind: Kind, to: Kind, name: str) -> None:
    """Keys, their order and the versions are those that the other network would save."""
    state = NETWORKS[name][0](kind).state_dict()
    result = respell(StateDict((), state, state._metadata), to)
    wanted = NETWORKS[name][0](to).state_dict()
    assert list(result.entries) == list(wanted)
    assert result.versions == wanted._metadata


_trained_once = cache(_trained)


@given(
    order=st.randoms(use_true_random=False),
    network=st.sampled_from(sorted(NETWORKS)),
    kind=st.sampled_from(KINDS),
)
@settings(max_examples=30, deadline=None)
def test_the_order_of_keys_does_not_matter(order: random.Random, network: str, kind: Kind) -> None:
    """Whatever the order of keys, the same tensors are found and the values are the same."""
    state = _trained_once(network, kind)[0].state_dict()
    names = list(state)
    order.shuffle(names)
    shuffled = {f"module.{name}": state[name] for name in names}
    sites = {site.name: site for site in find_reparametrizations(shuffled)}
    for site in find_reparametrizations({f"module.{name}": state[name] for name in state}):
        assert sites[site.name] == site
    for to in SPELLINGS:
        result = respell(StateDict((), shuffled), to).entries
        wanted = respell(StateDict((), state), to).entries
        assert result.keys() == {f"module.{name}" for name in wanted}
        for name, entry in wanted.items():
            assert torch.equal(result[f"module.{name}"].read(), entry.read())


class _Gain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(2.0))

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.gain


def _mixed() -> nn.Module:
    """Return a network with one tensor of each kind."""
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {
            "sn": nn.utils.spectral_norm(nn.Linear(3, 4)),
            "wn": WEIGHT_NORM["hook"](nn.Linear(3, 4), dim=1),
            "pruned": prune.l1_unstructured(nn.Linear(3, 4), "weight", 0.5),
            "orthogonal": orthogonal(nn.Linear(4, 4)),
            "gain": nn.Linear(3, 4),
        }
    )
    parametrize.register_parametrization(model["gain"], "weight", _Gain())
    return model


def test_inspect_lists_each_with_its_kind(tmp_path: Path) -> None:
    """inspect lists kind, spelling, dim and parts of every reparametrized tensor."""
    torch.save(_mixed().state_dict(), tmp_path / "a.pt")
    layers = inspect_checkpoint(tmp_path / "a.pt").layers
    assert [(one.module, one.kind, one.spelling, one.dim, [*one.keys]) for one in layers] == [
        ("sn", "hook", "hook", 0, ["weight", "u", "v"]),
        ("wn", "weight_norm", "hook", 1, ["g", "v"]),
        ("pruned", "pruning", "hook", None, ["weight", "mask"]),
        ("orthogonal", "orthogonal", "parametrization", None, ["original", "0.base"]),
        ("gain", "parametrization", "parametrization", None, ["original", "0.gain"]),
    ]
    assert all(one.shape[0] == 4 for one in layers)
    assert layers[-1].meaning == (
        "made of 'original', '0.gain'; only the model's code says what makes it of '0.gain', "
        "'original'"
    )


def _message(folder: Path, to: Kind, **options: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        convert_checkpoint(folder / "a.pt", folder / "b.pt", to, **options)
    assert sorted(path.name for path in folder.iterdir()) == ["a.pt"]
    return str(caught.value)


def test_what_cannot_be_converted_is_named_and_nothing_written(tmp_path: Path) -> None:
    """Each tensor that cannot be converted is named with the reason, and nothing is written."""
    torch.save(_mixed().state_dict(), tmp_path / "a.pt")
    assert _message(tmp_path, "plain") == (
        "cannot spell 'orthogonal.weight' as plain: the file does not say by which map "
        "(matrix_exp, cayley or householder) its weight is made orthogonal; tell 'sn-export "
        "convert' with --orthogonal-map; cannot spell "
        "'gain.weight' as plain: only the model's code says what makes it of '0.gain', "
        "'original'; to leave that as it is: --only spectral_norm or --only weight_norm"
    )
    assert _message(tmp_path, "parametrization") == (
        "cannot spell 'pruned.weight' as parametrization: torch has no parametrization for "
        "pruning; to leave that as it is: --only spectral_norm or --only weight_norm"
    )


@pytest.mark.parametrize("name", ["pruned", "orthogonal", "gain", "broken"])
def test_a_dim_for_what_has_none(name: str, tmp_path: Path) -> None:
    """It is refused, with the names of the tensors whose dim can be given."""
    state = _mixed().state_dict()
    state |= {"broken.weight_orig": torch.ones(4, 3), "broken.weight_u": torch.ones(4)}
    torch.save(state, tmp_path / "a.pt")
    dims = {f"{name}.weight": 0}
    message = (
        f"--dim {name}.weight=0 names no tensor under spectral or weight norm; there are "
        "'sn.weight', 'wn.weight'"
    )
    assert _message(tmp_path, "plain", dims=dims) == message
    with pytest.raises(CheckpointError) as caught:
        inspect_checkpoint(tmp_path / "a.pt", dims=dims)
    assert str(caught.value) == message


class Orthogonal(nn.Module):
    """Square, tall, wide, batched and complex weights that torch keeps orthogonal.

    Of the batched ones, one has squares, and one is square in the dimensions before its last.
    """

    def __init__(self, name: str | None) -> None:
        super().__init__()
        shapes = {"square": (4, 4), "tall": (5, 3), "wide": (3, 5), "convolution": (2, 3, 4, 2)}
        shapes |= {"squares": (2, 3, 3), "batch": (4, 4, 2)}
        for key, shape in shapes.items():
            self.register_parameter(key, nn.Parameter(torch.randn(shape)))
        if name != "householder":
            self.complex = nn.Parameter(torch.randn(3, 3, dtype=torch.complex64))
        for key in dict(self.named_parameters()):
            orthogonal(self, key, name)


@pytest.mark.parametrize("name", [None, "matrix_exp", "cayley", "householder"])
def test_orthogonal_weights_are_converted_by_the_map_that_is_told(
    name: str | None, tmp_path: Path
) -> None:
    """Orthogonal weights are converted bit for bit, by the map that is given or by default."""
    model = Orthogonal(name)
    with torch.no_grad():  # as training would, which leaves the diagonal
        for parameter in model.parameters():
            parameter += torch.randn_like(parameter).tril(-1)
    torch.save(model.state_dict(), tmp_path / "a.pt")
    told: Any = name or "default"
    convert_checkpoint(tmp_path / "a.pt", tmp_path / "b.pt", "plain", orthogonal_map=told)
    converted = torch.load(tmp_path / "b.pt")
    assert list(converted) == [key.split(".")[1] for key in model.state_dict() if "original" in key]
    assert all(torch.equal(value, getattr(model, key)) for key, value in converted.items())


CHAINS: dict[str, tuple[Any, ...]] = {
    "weight norm": (weight_norm,),
    "of one norm": (partial(weight_norm, dim=None),),
    "orthogonal": (orthogonal,),
    "spectral norm": (spectral_norm,),
    "two more": (weight_norm, spectral_norm),
}


@pytest.mark.parametrize("name", CHAINS)
def test_a_chain_that_ends_in_spectral_norm(name: str, tmp_path: Path) -> None:
    """A chain becomes plain bit for bit, in a file or a network; it has no hook."""
    layer = nn.Conv1d(4, 6, 3)
    for make in (*CHAINS[name], spectral_norm):
        make(layer)
    model = trained(nn.Sequential(layer), torch.randn(2, 4, 8)).eval()
    torch.save(model.state_dict(), tmp_path / "a.pt")
    told: Any = "default" if name == "orthogonal" else None
    (row,) = inspect_checkpoint(tmp_path / "a.pt").layers
    assert (row.group, row.dim, row.sigma > 0) == (
        "spectral_norm",
        *((0, True) if told is None else (None, False)),
    )
    made = convert_checkpoint(tmp_path / "a.pt", tmp_path / "b.pt", "plain", orthogonal_map=told)
    assert made.found[0].label.endswith(" + spectral norm")
    assert torch.equal(torch.load(tmp_path / "b.pt")["0.weight"], layer.weight)
    if told is None:
        plain = nn.Sequential(nn.Conv1d(4, 6, 3))
        load_checkpoint(plain, read_checkpoint(tmp_path / "a.pt"))
        assert torch.equal(plain[0].weight, layer.weight)
    with pytest.raises(CheckpointError, match=r"'0\.weight' as hook: torch has no hook for "):
        convert_checkpoint(tmp_path / "a.pt", tmp_path / "c.pt", "hook", orthogonal_map=told)
    if name != "spectral norm":
        with pytest.raises(CheckpointError, match=r"'0\.weight' as plain: --only cannot take its "):
            convert_checkpoint(tmp_path / "a.pt", tmp_path / "c.pt", "plain", only="spectral_norm")


def test_orthogonal_weights_that_cannot_be_converted(tmp_path: Path) -> None:
    """Orthogonal weights have no hook; a base of another shape is refused."""
    state = Orthogonal(None).state_dict()
    torch.save(state, tmp_path / "a.pt")
    assert _message(tmp_path, "hook", orthogonal_map="cayley") == (
        "cannot spell 'square', 'tall', 'wide', 'convolution', 'squares' and 2 more as hook: torch "
        "has no hook for orthogonality"
    )
    assert _message(tmp_path, "plain", orthogonal_map="householder") == (
        "torch cannot make 'complex' orthogonal by householder: The householder parametrization "
        "does not support complex tensors."
    )
    state["parametrizations.tall.0.base"] = torch.eye(4)
    torch.save(state, tmp_path / "a.pt")
    assert _message(tmp_path, "plain", orthogonal_map="default") == (
        "cannot spell 'tall' as plain: 'parametrizations.tall.0.base' is [4, 4] and should be "
        "[5, 5]"
    )
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "a.pt")
    assert "nothing" in _message(tmp_path, "plain", orthogonal_map="default")


@pytest.mark.parametrize("only", ["spectral_norm", "weight_norm"])
def test_only_one_kind_is_converted_and_the_rest_named(only: Any, tmp_path: Path) -> None:
    """With --only the others stay bit for bit, and the notes name them."""
    state = _mixed().state_dict()
    torch.save(state, tmp_path / "a.pt")
    made = convert_checkpoint(tmp_path / "a.pt", tmp_path / "b.pt", "plain", only=only)
    name, other = ("sn", "wn") if only == "spectral_norm" else ("wn", "sn")
    assert [site.name for site in made.changed] == [f"{name}.weight"]
    converted = torch.load(tmp_path / "b.pt")
    assert f"{name}.weight" in converted
    kept = [key for key in state if not key.startswith(f"{name}.")]
    assert all(torch.equal(converted[key], state[key]) for key in kept)
    label = "weight norm" if other == "wn" else "spectral norm"
    assert made.notes == (
        f"left as it is, under {label}: '{other}.weight'",
        "left as it is, under pruning: 'pruned.weight'",
        "left as it is, under orthogonality: 'orthogonal.weight'",
        "left as it is, under another parametrization: 'gain.weight'",
    )


def test_a_pruned_network_becomes_plain(tmp_path: Path) -> None:
    """A pruned weight is what torch's own removal of the mask makes."""
    model = nn.Sequential(prune.random_unstructured(nn.Conv1d(3, 4, 3), "weight", 0.4))
    torch.save(model.state_dict(), tmp_path / "a.pt")
    convert_checkpoint(tmp_path / "a.pt", tmp_path / "b.pt", "plain")
    prune.remove(model[0], "weight")
    converted = torch.load(tmp_path / "b.pt")
    assert all(torch.equal(converted[key], value) for key, value in model.state_dict().items())


def test_a_mask_of_another_shape(tmp_path: Path) -> None:
    """It is named with its shape and the one wanted; torch would broadcast it."""
    torch.save(
        {"a.weight_orig": torch.ones(3, 2), "a.weight_mask": torch.ones(3, 1)}, tmp_path / "a.pt"
    )
    assert _message(tmp_path, "plain") == "'a.weight_mask' is [3, 1] and should be [3, 2]"


def test_a_pruned_weight_norm_is_not_half_converted(tmp_path: Path) -> None:
    """A mask on a part of another reparametrization blocks the conversion."""
    layer = WEIGHT_NORM["hook"](nn.Linear(3, 4))
    prune.l1_unstructured(layer, "weight_v", 0.5)
    torch.save(layer.state_dict(), tmp_path / "a.pt")
    assert _message(tmp_path, "plain") == (
        "cannot spell 'weight_v' as plain: it is itself the v of a weight norm"
    )


def test_a_weight_norm_that_is_incomplete_is_not_left_behind(tmp_path: Path) -> None:
    """Parts of a weight norm that are alone, or do not fit, stop the conversion."""
    state = dict(Generator("hook").state_dict())
    g = state.pop("conv_pre.weight_g")
    torch.save(state, tmp_path / "a.pt")
    message = (
        "cannot spell 'conv_pre.weight' as plain: its weight norm is incomplete: there is no "
        "'conv_pre.weight_g'"
    )
    assert _message(tmp_path, "plain") == message
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(Generator("plain"), read_checkpoint(tmp_path / "a.pt"))
    assert str(caught.value) == message
    notes = {one.module: one.note for one in inspect_checkpoint(tmp_path / "a.pt").layers}
    assert notes["conv_pre"].endswith("there is no 'conv_pre.weight_g'")
    torch.save(state | {"conv_pre.weight_g": g.flatten()}, tmp_path / "a.pt")
    assert _message(tmp_path, "plain") == (
        "cannot spell 'conv_pre.weight' as plain: the shape of 'conv_pre.weight_g' is not that of "
        "norms of its v"
    )


def test_links_without_tensors_are_known_by_their_versions(tmp_path: Path) -> None:
    """A link without tensors, which only the versions show, is not left out."""
    layer = nn.utils.parametrizations.spectral_norm(nn.Linear(3, 4))
    parametrize.register_parametrization(layer, "weight", nn.Tanh())
    torch.save(layer.state_dict(), tmp_path / "a.pt")
    assert _message(tmp_path, "plain").startswith(
        "cannot spell 'weight' as plain: only the model's code says what makes it"
    )


def test_a_dim_that_several_fit(tmp_path: Path) -> None:
    """If several dims fit a weight norm, torch's default is taken and noted, or the given one."""
    model = Discriminators("hook")
    name = "discriminators.1.conv_post.weight"
    torch.save(model.state_dict(), tmp_path / "a.pt")
    made = convert_checkpoint(tmp_path / "a.pt", tmp_path / "b.pt", "plain")
    assert made.notes == (
        f"'{name}': the shapes fit several dims of weight norm, which differ in the last bits of "
        "the weight; 0 was taken, torch's default, and --dim takes another",
    )
    made = convert_checkpoint(tmp_path / "a.pt", tmp_path / "c.pt", "plain", dims={name: 3})
    assert made.notes == ()
    conv = model.get_submodule(name.removesuffix(".weight"))
    value = torch._weight_norm(conv.weight_v, conv.weight_g, 3)
    assert torch.equal(torch.load(tmp_path / "c.pt")[name], value)
    with pytest.raises(CheckpointError) as caught:
        convert_checkpoint(tmp_path / "a.pt", tmp_path / "c.pt", "plain", dims={name: 1})
    assert str(caught.value) == (
        f"'{name}' [1, 6, 3, 1] with g of shape [1, 1, 1, 1] has dim 0 or 3, got --dim {name}=1"
    )


def test_a_norm_of_zero_and_values_that_are_no_number(tmp_path: Path) -> None:
    """A weight that would not be finite is refused, and its part named."""
    state = dict(Generator("hook").state_dict())
    state["conv_pre.weight_v"] = torch.zeros_like(state["conv_pre.weight_v"])
    torch.save(state, tmp_path / "a.pt")
    assert _message(tmp_path, "plain") == (
        "a norm in 'conv_pre.weight_v' is 0 or too small to divide by, so the weight "
        "'conv_pre.weight' would not be finite"
    )
    state["conv_pre.weight_v"] = torch.full_like(state["conv_pre.weight_v"], torch.nan)
    torch.save(state, tmp_path / "a.pt")
    assert inspect_checkpoint(tmp_path / "a.pt").layers[0].note == (
        "'conv_pre.weight_v' holds NaN or infinite values"
    )


def _averaged(one: nn.Module, other: nn.Module) -> dict[str, Tensor]:
    second = other.state_dict()
    return {name: 0.8 * value + 0.2 * second[name] for name, value in one.state_dict().items()}


def test_averaged_vectors_are_told_of(tmp_path: Path) -> None:
    """inspect, convert and load say what averaging did to u and v."""
    one, other = _trained("discriminators", "hook")[0], Discriminators("hook")
    torch.save(_averaged(one, other), tmp_path / "a.pt")
    layer = inspect_checkpoint(tmp_path / "a.pt").layers[0]
    assert "u or v is no unit vector" in layer.note
    assert "sigma is too small, and the weight in eval mode" in layer.meaning
    for to in SPELLINGS:
        notes = convert_checkpoint(tmp_path / "a.pt", tmp_path / "b.pt", to).notes
        assert "no unit vector" in notes[0]
        assert "discriminators.0.convs.0.weight" in notes[0]
        loaded = load_checkpoint(Discriminators(to), read_checkpoint(tmp_path / "a.pt"))
        assert sum("no unit vector" in note for note in loaded.warnings) == 1
    torch.save(one.state_dict(), tmp_path / "a.pt")
    assert inspect_checkpoint(tmp_path / "a.pt").layers[0].note == ""


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounded_vectors_are_no_averaged_ones(dtype: torch.dtype, tmp_path: Path) -> None:
    """Unit vectors in half precision are not taken for averaged ones."""
    torch.save(_trained("discriminators", "hook", dtype)[0].state_dict(), tmp_path / "a.pt")
    assert [one.note for one in inspect_checkpoint(tmp_path / "a.pt").layers][:3] == [""] * 3


_ENDS = ("", "_orig", "_u", "_v", "_g", "_mask", "_bar", "_sigma", "_v_orig", "_v_mask")
_LINKS = ("original", "original0", "original1", "0._u", "0._v", "1._u", "0.base", "original1_orig")
_VALUES: tuple[Any, ...] = (
    *(torch.ones(shape) for shape in ((), (1,), (4,), (4, 3), (4, 1), (1, 3), (0, 3))),
    torch.zeros(4, 3),
    torch.full((4,), torch.nan),
    torch.ones(4, 3, dtype=torch.int64),
    torch.ones(4, dtype=torch.complex64),
    torch.ones(4, 3).to(torch.float8_e5m2),
    torch.ones(4, 3).to_sparse(),
    "text",
    None,
)


@given(
    prefix=st.sampled_from(["", "a.module."]),
    ends=st.dictionaries(st.sampled_from(_ENDS), st.sampled_from(range(len(_VALUES))), max_size=5),
    links=st.dictionaries(st.sampled_from(_LINKS), st.sampled_from(range(len(_VALUES)))),
)
@settings(max_examples=200, deadline=None)
def test_parts_that_do_not_belong_together(
    prefix: str, ends: dict[str, int], links: dict[str, int]
) -> None:
    """Any values under these keys are converted, or refused with a message."""
    state = {f"{prefix}weight{end}": _VALUES[i] for end, i in ends.items()}
    state |= {f"{prefix}parametrizations.weight.{end}": _VALUES[i] for end, i in links.items()}
    for to in SPELLINGS:
        try:
            for entry in respell(StateDict((), state), to).entries.values():
                entry.read()
        except CheckpointError as error:
            assert "'" in str(error)
