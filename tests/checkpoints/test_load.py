"""Loading into a model: prefixes, spellings, and messages that name the keys."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_networks import APPLY, Critic, Kind, before_v, prefixed, trained_critic
from torch import Tensor, nn

from sn_export.checkpoints import Loaded, load_checkpoint, read_checkpoint
from sn_export.errors import CheckpointError

KINDS: list[Kind] = ["hook", "parametrization"]
SPELLINGS: list[Kind] = ["plain", "hook", "parametrization"]


def _load(model: nn.Module, content: Any, folder: Path, **options: Any) -> Loaded:
    torch.save(content, folder / "a.pt")
    return load_checkpoint(model, read_checkpoint(folder / "a.pt"), **options)


def _equal(left: nn.Module, right: nn.Module) -> bool:
    x = torch.randn(2, 3, 8, 8)
    return torch.equal(left.eval()(x), right.eval()(x))


@pytest.mark.parametrize("to", SPELLINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_spelling_is_that_of_the_model(kind: Kind, to: Kind, tmp_path: Path) -> None:
    """Whatever the checkpoint's spelling, the model computes the same, and a note says it."""
    trained, model = trained_critic(kind), Critic(to)
    loaded = _load(model, trained.state_dict(), tmp_path)
    assert _equal(model, trained)
    names = "'body.0.weight', 'body.3.weight', 'body.4.weight', 'head.weight'"
    note = f"respelled 4 spectral norms from {kind} to {to}: {names}"
    assert loaded.notes == (() if kind == to else (note,))


@pytest.mark.parametrize("to", SPELLINGS)
def test_checkpoints_from_before_v(to: Kind, tmp_path: Path) -> None:
    """A checkpoint without v loads into any spelling as torch's hook loads it."""
    trained = trained_critic()
    old = before_v(trained.state_dict(), trained)
    wanted, model = Critic(), Critic(to)
    wanted.load_state_dict(dict(old))
    loaded = _load(model, dict(old), tmp_path)
    assert _equal(model, wanted)
    assert loaded.notes


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("kind", KINDS)
def test_prefixes_of_wrappers_go(kind: Kind, wrapper: str, tmp_path: Path) -> None:
    """The prefixes of DistributedDataParallel and torch.compile are removed."""
    trained, model = trained_critic("hook"), Critic(kind)
    loaded = _load(model, {"state_dict": prefixed(trained.state_dict(), wrapper)}, tmp_path)
    assert _equal(model, trained)
    shown = ", ".join(f"'{part}.'" for part in sorted(wrapper.rstrip(".").split(".")))
    assert loaded.notes[:2] == (
        "took the state dict under 'state_dict'",
        f"took the wrappers' {shown} out of the names",
    )


def test_wrappers_within_names_go(tmp_path: Path) -> None:
    """A checkpoint loads if a part of the network alone was compiled."""
    trained, model = trained_critic(), Critic()
    state = {k.replace("body.", "body._orig_mod."): v for k, v in trained.state_dict().items()}
    _load(model, state, tmp_path)
    assert _equal(model, trained)


def test_a_model_that_itself_says_module_is_left_alone(tmp_path: Path) -> None:
    """A prefix is removed only if the names fit then."""
    trained, model = nn.DataParallel(trained_critic()), nn.DataParallel(Critic())
    assert _load(model, trained.state_dict(), tmp_path).notes == ()
    assert _equal(model, trained)


def test_a_wrapped_model_that_itself_says_module(tmp_path: Path) -> None:
    """The wrapper's prefix is removed, not the network's own attribute of that name."""
    trained, model = nn.DataParallel(trained_critic()), nn.DataParallel(Critic())
    loaded = _load(model, prefixed(trained.state_dict(), "module."), tmp_path)
    assert _equal(model, trained)
    assert loaded.notes == ("took 20 entries under 'module.'",)


def _lightning() -> tuple[Critic, Critic, dict[str, Any]]:
    generator, critic = trained_critic(seed=1), trained_critic(seed=2)
    state = OrderedDict({"loss.weight": torch.ones(3)})
    state.update(prefixed(generator.state_dict(), "generator."))
    state.update(prefixed(critic.state_dict(), "critic."))
    return generator, critic, {"state_dict": state, "epoch": 1, "hyper_parameters": {}}


def test_an_attribute_of_lightning_goes(tmp_path: Path) -> None:
    """The attribute that holds the network is found, and others are left out."""
    _, critic, content = _lightning()
    state = content["state_dict"]
    for name in [name for name in state if name.startswith("generator.")]:
        del state[name]
    model = Critic("parametrization")
    loaded = _load(model, content, tmp_path)
    assert _equal(model, critic)
    assert loaded.notes[1] == "took 20 entries under 'critic.', and left out 1 other"


def test_several_attributes_that_fit_are_chosen_by_prefix(tmp_path: Path) -> None:
    """If two networks of one class fit, the message names both prefixes."""
    generator, _, content = _lightning()
    model = Critic()
    with pytest.raises(CheckpointError) as caught:
        _load(model, content, tmp_path)
    assert str(caught.value) == (
        "the names fit Critic under several prefixes; choose with --prefix one of 'critic.', "
        "'generator.'"
    )
    _load(model, content, tmp_path, prefix="generator.")
    assert _equal(model, generator)
    with pytest.raises(CheckpointError) as caught:
        _load(model, content, tmp_path, prefix="gen.")
    assert str(caught.value) == (
        "no name in the checkpoint starts with 'gen.'; it has 'loss.', 'generator.', 'critic.'"
    )


def test_the_state_dict_that_fits_is_taken(tmp_path: Path) -> None:
    """Of several state dicts the one with the model's names is taken."""
    trained, model = trained_critic(), Critic()
    other = nn.Linear(3, 3).state_dict()
    loaded = _load(model, {"model": other, "critic": trained.state_dict()}, tmp_path)
    assert loaded.key == "critic"
    assert _equal(model, trained)


def test_of_several_that_do_not_fit_the_usual_one_is_told(tmp_path: Path) -> None:
    """If no state dict fits, the message is about the one under a usual name."""
    content = {"ema": nn.Linear(3, 3).state_dict(), "state_dict": {"other": torch.ones(2)}}
    with pytest.raises(CheckpointError, match=r"does not fit Critic: .* unknown .other."):
        _load(Critic(), content, tmp_path)


def test_each_candidate_is_listed_with_how_well_it_fits(tmp_path: Path) -> None:
    """If a key is needed, the message counts the model's tensors in each state dict."""
    state = trained_critic().state_dict()
    part = {name: value for name, value in state.items() if not name.startswith("head.")}
    with pytest.raises(CheckpointError) as caught:
        _load(Critic(), {"ema": state, "net": state, "part": part}, tmp_path)
    assert str(caught.value).replace(f"{tmp_path}/", "") == (
        "'a.pt' holds 2 state dicts, each of which fits Critic; choose with --key one of 'ema' "
        "(20 tensors, has 12 of the 12 of Critic), 'net' (20 tensors, has 12 of the 12 of Critic)"
    )


def _message(model: nn.Module, state: dict[str, Any], folder: Path, **options: Any) -> str:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        _load(model, state, folder, **options)
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    return str(caught.value).replace(f"{folder}/", "")


def test_missing_and_unexpected_keys(tmp_path: Path) -> None:
    """Missing and unknown keys are named, and for a misspelt one the right one."""
    state = dict(Critic().state_dict())
    state["body.0.biass"] = state.pop("body.0.bias")
    assert _message(Critic(), state, tmp_path) == (
        "'a.pt' does not fit Critic: it lacks 'body.0.bias'; it has the unknown "
        "'body.0.biass'. Should 'body.0.biass' be 'body.0.bias'?"
    )


def test_wrong_shapes(tmp_path: Path) -> None:
    """Each tensor of another shape is named with both shapes."""
    state = dict(Critic().state_dict())
    state["body.1.bias"] = torch.ones(7)
    assert _message(Critic(), state, tmp_path) == (
        "'a.pt' does not fit Critic: 'body.1.bias' is [7] and should be [4]"
    )


def test_a_plain_checkpoint_for_a_model_under_spectral_norm(tmp_path: Path) -> None:
    """A plain checkpoint has no vectors for the model: the message says what to do."""
    state = APPLY["plain"](nn.Linear(3, 4)).state_dict()
    assert _message(APPLY["hook"](nn.Linear(3, 4)), state, tmp_path) == (
        "'a.pt' does not fit Linear: it lacks 'weight_orig', 'weight_u', 'weight_v'; it has "
        "the unknown 'weight'. The model has spectral norm on 'weight' and the checkpoint has "
        "plain weights there: build the model without spectral norm"
    )


def test_a_model_in_a_wrapper(tmp_path: Path) -> None:
    """A prefix that the model's names have and the checkpoint's lack is named."""
    model = nn.Sequential(OrderedDict(net=nn.Linear(2, 2)))
    assert _message(model, nn.Linear(2, 2).state_dict(), tmp_path) == (
        "'a.pt' does not fit Sequential: it lacks 'net.weight', 'net.bias'; it has the unknown "
        "'weight', 'bias'. The model's names start with 'net.', the checkpoint's do not: "
        "--network net loads it into 'net'"
    )


@pytest.mark.filterwarnings("ignore:Casting complex values")
def test_values_that_the_model_cannot_hold(tmp_path: Path) -> None:
    """NaN in the checkpoint is named, and complex numbers for a real tensor."""
    state = dict(Critic().state_dict())
    state["body.1.running_var"] = torch.full((4,), torch.nan)
    assert _message(Critic(), state, tmp_path) == (
        "'body.1.running_var' is NaN or infinite in 4 of 4 values"
    )
    state["body.1.running_var"] = torch.ones(4, dtype=torch.complex64)
    assert _message(Critic(), state, tmp_path) == (
        "'body.1.running_var' is complex, and real in the model"
    )


def test_sigma_zero(tmp_path: Path) -> None:
    """A weight of zeros, which has no normalised weight, is refused."""
    state = dict(Critic().state_dict())
    state["head.weight_orig"] = torch.zeros(5, 2)
    assert _message(Critic(), state, tmp_path) == (
        "sigma of 'head.weight' is 0 or too small to divide by, so its normalised weight would "
        "not be finite"
    )


def test_renamed_leading_parts_are_suggested(tmp_path: Path) -> None:
    """If most unknown names fit with another start, the message says so."""
    state = {f"main.{name.removeprefix('body.')}" if name.startswith("body.") else name: value
             for name, value in trained_critic().state_dict().items()}  # fmt: skip
    for kind in ("hook", "parametrization"):
        with pytest.raises(CheckpointError) as caught:
            _load(Critic(kind), state, tmp_path)
        assert str(caught.value).endswith(
            ". With 'body.' in the place of 'main.', 11 of the 11 unknown tensors fit: rename "
            "them in the checkpoint, or the attribute in the model"
        )
    del state["main.0.bias"], state["main.3.bias"]
    few = {name: value for name, value in state.items() if not name.startswith("main.1.")}
    few |= {f"other.{i}": torch.ones(i) for i in range(9)}
    with pytest.raises(CheckpointError) as caught:
        _load(Critic(), few, tmp_path)
    assert "in the place of" not in str(caught.value)


class _Renaming(nn.Module):
    """Renames keys of an older release in a load_state_dict pre-hook."""

    def __init__(self, kind: Kind = "hook") -> None:
        super().__init__()
        self.head = APPLY[kind](nn.Linear(3, 4))
        self.seen: list[str] = []
        self.register_load_state_dict_pre_hook(self._rename)

    @staticmethod
    def _rename(module: Any, state: dict[str, Any], prefix: str, *args: Any) -> None:
        module.seen.append(prefix)
        for key in [key for key in state if key.startswith(f"{prefix}final.")]:
            state[f"{prefix}head.{key.removeprefix(f'{prefix}final.')}"] = state.pop(key)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(x)
        return out


class _Adding(nn.Module):
    """Adds keys that older checkpoints lack, in ``_load_from_state_dict``."""

    def __init__(self) -> None:
        super().__init__()
        self.head = APPLY["hook"](nn.Linear(3, 4))
        self.register_buffer("scale", torch.ones(1))

    def _load_from_state_dict(self, state: Any, prefix: str, *args: Any) -> None:
        state.setdefault(f"{prefix}scale", torch.full((1,), 3.0))
        super()._load_from_state_dict(state, prefix, *args)


class _Tolerant(nn.Linear):
    """Loads whatever fits, as some published networks do."""

    def load_state_dict(self, state: Any, strict: bool = True, assign: bool = False) -> Any:
        return super().load_state_dict(state, strict=False, assign=assign)


class _Delegating(nn.Module):
    """Hands a state dict with names of its own to its child, and asks nothing of itself."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 4)

    def load_state_dict(self, state: Any, strict: bool = True, assign: bool = False) -> Any:
        inner = {name.removeprefix("old."): value for name, value in state.items()}
        return self.inner.load_state_dict(inner, strict=strict, assign=assign)


def test_an_override_that_asks_the_children_alone(tmp_path: Path) -> None:
    """Where it takes a state dict nothing is said to be left out; where not, both are named."""
    model, state = _Delegating(), nn.Linear(3, 4).state_dict()
    loaded = _load(model, {f"old.{name}": value for name, value in state.items()}, tmp_path)
    assert torch.equal(model.inner.weight, state["weight"])
    assert (loaded.notes, loaded.missing, loaded.unexpected) == ((), (), ())
    with pytest.raises(CheckpointError, match=r"lacks 'inner\.weight', .*the unknown 'old\.x'"):
        _load(model, {"old.x": state["weight"]}, tmp_path)


@pytest.mark.parametrize("wrapper", ["", "module."])
def test_what_the_model_brings_up_to_date_itself_is_taken(wrapper: str, tmp_path: Path) -> None:
    """Pre-hooks and overrides of the model act, under the prefixes of wrappers too."""
    old, model = _Renaming(), _Renaming()
    state = {k.replace("head.", "final."): v for k, v in old.state_dict().items()}
    _load(model, prefixed(state, wrapper), tmp_path)
    assert torch.equal(model.head.weight_orig, old.head.weight_orig)
    other = _Renaming("parametrization")
    loaded = _load(other, prefixed(state, wrapper), tmp_path)
    assert torch.equal(other.head.parametrizations.weight.original, old.head.weight_orig)
    assert loaded.notes[-1] == (
        "respelled 1 spectral norm from hook to parametrization: 'head.weight'"
    )
    adding, older = _Adding(), dict(_Adding().state_dict())
    del older["scale"]
    _load(adding, prefixed(older, wrapper), tmp_path)
    assert torch.equal(adding.head.weight_orig, older["head.weight_orig"])
    assert adding.scale.item() == 3


def test_a_refused_model_is_as_it_was(tmp_path: Path) -> None:
    """A refused model keeps its values, and what its own hooks recorded is undone."""
    model = _Renaming()
    before = dict(model.__dict__)
    values = {name: value.clone() for name, value in model.state_dict().items()}
    state = dict(_Renaming().state_dict())
    state["head.bias"] = torch.ones(7)
    message = _message(model, state, tmp_path)
    assert message == "'a.pt' does not fit _Renaming: 'head.bias' is [7] and should be [4]"
    assert model.__dict__ == before
    assert model.seen == []
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())


def test_a_model_that_takes_anything(tmp_path: Path) -> None:
    """A tolerant model loads with a note on the rest; a checkpoint without any of it is refused."""
    trained, model = nn.Linear(3, 4), _Tolerant(3, 4)
    loaded = _load(model, {"weight": trained.weight.data, "other": torch.ones(2)}, tmp_path)
    assert torch.equal(model.weight, trained.weight)
    assert (loaded.missing, loaded.unexpected) == (("bias",), ("other",))
    loaded = _load(model, prefixed(trained.state_dict(), "module."), tmp_path)
    assert (loaded.missing, loaded.unexpected) == ((), ())
    assert torch.equal(model.bias, trained.bias)
    assert _message(model, {"a": torch.ones(2)}, tmp_path) == (
        "'a.pt' does not fit _Tolerant: it lacks 'weight', 'bias'; it has the unknown 'a'"
    )


def test_a_scripted_model(tmp_path: Path) -> None:
    """A scripted model, which takes no hooks, loads too."""
    model, trained = torch.jit.script(nn.Linear(3, 4)), nn.Linear(3, 4)
    _load(model, {"module.weight": trained.weight, "module.bias": trained.bias}, tmp_path)
    assert torch.equal(model.weight, trained.weight)
    assert _message(model, {"weight": trained.weight.data}, tmp_path) == (
        "'a.pt' does not fit RecursiveScriptModule: it lacks 'bias'"
    )


def test_without_strict(tmp_path: Path) -> None:
    """Without strict the tensors that fit are loaded and the rest is listed; shapes must fit."""
    trained, model = trained_critic(), Critic("parametrization")
    state = dict(trained.state_dict())
    bias = state.pop("body.0.bias")
    state["extra"] = torch.ones(2)
    before = model.body[0].bias.clone()
    loaded = _load(model, state, tmp_path, strict=False)
    assert (loaded.missing, loaded.unexpected) == (("body.0.bias",), ("extra",))
    assert loaded.notes[-2:] == (
        "not in the checkpoint, and so as the model was built: 'body.0.bias'",
        "not in the model, and so left out: 'extra'",
    )
    assert loaded.metadata() == {
        "checkpoint.missing_keys": '["body.0.bias"]',
        "checkpoint.unexpected_keys": '["extra"]',
    }
    assert torch.equal(model.body[0].bias, before)
    with torch.no_grad():
        model.body[0].bias.copy_(bias)
    assert _equal(model, trained)
    state["body.0.bias"] = torch.ones(9)
    assert _message(Critic(), state, tmp_path, strict=False) == (
        "'a.pt' does not fit Critic: it has the unknown 'extra'; 'body.0.bias' is [9] and should "
        "be [4]"
    )
    assert _message(Critic(), {"a": torch.ones(2)}, tmp_path, strict=False).startswith(
        "'a.pt' does not fit Critic: it lacks "
    )


def test_no_advice_that_would_not_help(tmp_path: Path) -> None:
    """No suggestion is made for parts of a reparametrization, or for another network."""
    weight_norm = nn.utils.parametrizations.weight_norm
    normed = weight_norm(nn.Linear(3, 4)).state_dict()
    message = _message(APPLY["hook"](nn.Linear(3, 4)), normed, tmp_path)
    assert message.endswith(". 'weight' has spectral norm in the model and weight norm in the "
                            "checkpoint")  # fmt: skip
    hidden = {"weight_g": torch.ones(4, 1), "weight_v": torch.ones(4, 3), "b": torch.ones(4)}
    assert "Should" not in _message(nn.Linear(3, 4, bias=False), hidden, tmp_path)
    half = {"weight_v": torch.ones(4, 3)}
    assert "Should" not in _message(nn.Linear(3, 4, bias=False), half, tmp_path)
    assert "Should" not in _message(weight_norm(nn.Linear(3, 4, bias=False)), half, tmp_path)
    other = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4)).state_dict()
    model = nn.Sequential(APPLY["hook"](nn.Linear(3, 4)), nn.Linear(4, 4), nn.Linear(4, 1))
    assert "build the model without" not in _message(model, other, tmp_path)
    plain = nn.Linear(3, 4).state_dict()
    assert _message(weight_norm(nn.Linear(3, 4)), plain, tmp_path).endswith(
        ". The model has weight norm on 'weight' and the checkpoint has plain weights there: "
        "build the model without weight norm"
    )


def test_a_prefix_that_all_names_but_one_have(tmp_path: Path) -> None:
    """The counter of an averaged model beside ``module.`` is left out."""
    trained = trained_critic()
    state = prefixed(trained.state_dict(), "module.") | {"n_averaged": torch.tensor(3)}
    for options in ({}, {"prefix": "module."}):
        model = Critic("parametrization")
        loaded = _load(model, state, tmp_path, **options)
        assert loaded.notes[0] == "took 20 entries under 'module.', and left out 1 other"
        assert _equal(model, trained)


def test_what_else_there_is_where_the_nearest_does_not_fit(tmp_path: Path) -> None:
    """State dicts under numbers are found too, and shapes decide between equal names."""
    narrow, wide = trained_critic().state_dict(), Critic(ch=8).state_dict()
    torch.save({"nets": {0: wide, 1: narrow}}, tmp_path / "a.pt")
    assert load_checkpoint(Critic(), read_checkpoint(tmp_path / "a.pt")).key == "nets.1"
    torch.save({"model": wide, "other": nn.Linear(2, 2).state_dict()}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(Critic(), read_checkpoint(tmp_path / "a.pt"))
    assert str(caught.value).endswith(
        ". That is the state dict under 'model'; --key takes 'other' (2 tensors, has 0 of the 12 "
        "of Critic)"
    )
