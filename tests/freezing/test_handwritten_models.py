"""Handwritten spectral norm in models: shared, nested, moved, edited, exported, refused."""

from __future__ import annotations

import copy
import threading
import warnings
from pathlib import Path
from typing import Any, cast

import onnx
import pytest
import torch
from faults import Fault, damage, fault_while_entering, fault_while_leaving
from fingerprint import assert_unchanged, fingerprint, same_bits
from handwritten_networks import (
    CASES,
    BufferWrapper,
    HelpedDense,
    InlineConv2d,
    PropertyLinear,
    SNConv2d,
    SNLinear,
    UpdatingDense,
    Wrapper,
    old_spectral_norm,
)
from networks import seed_torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, spectral_norm
from torch.utils.hooks import RemovableHandle

from sn_export import (
    FreezeError,
    FrozenWeightChangedWarning,
    SpectralNormNotRecognisedWarning,
    export_onnx,
    find_spectral_norm,
    frozen_spectral_norm,
)

PICKED = (
    *("wrapper-conv", "wrapper-buffers", "prehook", "biggan-conv", "inline", "raw-name"),
    "helped-torch",
)
picked = pytest.mark.parametrize("name", PICKED)


class Critic(nn.Module):
    """All families in one network, beside torch's own."""

    def __init__(self) -> None:
        super().__init__()
        self.first = Wrapper(nn.Conv2d(1, 2, 3))
        self.second = SNConv2d(2, 2, 3)
        self.third = nn.Sequential(InlineConv2d(2, 2, 1), BufferWrapper(nn.Conv2d(2, 2, 1)))
        self.old = old_spectral_norm(nn.Linear(8, 4))
        self.hook = spectral_norm(nn.Linear(4, 4))
        self.chain = parametrizations.spectral_norm(nn.Linear(4, 4))
        self.last = SNLinear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.third(self.second(self.first(x)))).flatten(1)
        return cast(Tensor, self.last(self.chain(self.hook(self.old(hidden)))))


def critic() -> Critic:
    seed_torch(0)
    return Critic()


def images() -> Tensor:
    return torch.randn(3, 1, 6, 6, generator=torch.Generator().manual_seed(0))


def test_all_families_in_one_network() -> None:
    """Each weight is frozen by the kind that knows it, and training goes on from the same bits."""
    model = critic()
    model(images()).sum().backward()
    twin = copy_of(model)
    with torch.no_grad():
        expected = twin.eval()(images())
    assert [(i.name, i.kind) for i in find_spectral_norm(model)] == [
        ("first.module.weight", "wrapper"),
        ("second.weight", "mixin"),
        ("third.0.weight", "mixin"),
        ("third.1.layer.weight", "wrapper"),
        ("old.weight", "prehook"),
        ("hook.weight", "hook"),
        ("chain.weight", "parametrization"),
        ("last.weight", "mixin"),
    ]
    before = fingerprint(model)
    with frozen_spectral_norm(model):
        endings = {key.rpartition(".")[2] for key in model.state_dict()}
        assert endings == {"weight", "bias"}
        with torch.no_grad():
            assert same_bits(model(images()), expected)
    assert_unchanged(before, model)


def copy_of(model: Critic) -> Critic:
    """A network of its own with the same state."""
    twin = Critic()
    twin.load_state_dict(model.state_dict())
    return twin


def test_what_else_a_wrapper_holds_stays() -> None:
    """Inside, a wrapper keeps the buffers and parameters that are no singular vectors."""
    wrapper = Wrapper(nn.Linear(3, 4))
    wrapper.register_buffer("seen", torch.zeros(7, dtype=torch.long))
    wrapper.gain = nn.Parameter(torch.ones(5))
    with frozen_spectral_norm(wrapper):
        assert set(wrapper.state_dict()) == {"gain", "seen", "module.weight", "module.bias"}


def test_watching_a_forward_is_silent() -> None:
    """What stands for the input is no tensor to torch, which would warn of it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for name in ("updating", "updating-optional", "operator", "biggan-conv", "property"):
            find_spectral_norm(CASES[name].make())
    assert caught == []


def test_shared_wrapper_is_frozen_once() -> None:
    """A wrapper that stands in two places comes back in both."""
    shared = Wrapper(nn.Conv2d(2, 2, 3, padding=1))
    model = nn.Sequential(shared, nn.ReLU(), nn.ModuleDict({"again": shared})["again"])
    before = fingerprint(model)
    with frozen_spectral_norm(model):
        assert list(model.state_dict()) == [
            f"{i}.module.{n}" for i in (0, 2) for n in ("weight", "bias")
        ]
        assert len(find_spectral_norm(model)) == 0
    assert_unchanged(before, model)


def test_helper_of_two_layers_goes_on_for_the_other() -> None:
    """A helper that a frozen layer shares with one that cannot be frozen still divides there."""

    class Sum(HelpedDense):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + x @ self.weight.t()

    model = nn.Sequential(HelpedDense(4, 4), Sum(4, 4)).eval()
    cast(Any, model[1]).normalise = model[0].normalise
    x = torch.randn(2, 4)
    with torch.no_grad():
        expected = model(x)
    before = fingerprint(model)
    with pytest.warns(SpectralNormNotRecognisedWarning, match="'1'"), frozen_spectral_norm(model):
        assert list(model.state_dict()) == [
            *("0.weight", "0.bias"),
            *("1.weight", "1.bias", "1.normalise.u"),
        ]
        with torch.no_grad():
            assert same_bits(model(x), expected)
    assert_unchanged(before, model)


def test_layer_in_two_wrappers_has_one_weight() -> None:
    """Two wrappers around one layer both leave its frozen weight alone."""
    layer = nn.Linear(3, 4)
    first = CASES["wrapper-linear"].make()
    layer = cast(nn.Linear, first.module)
    model = nn.ModuleList([first, Wrapper(layer)]).eval()
    x = torch.randn(2, 3)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        expected = twin[0](x)
    before = fingerprint(model)
    with frozen_spectral_norm(model), torch.no_grad():
        assert same_bits(model[0](x), expected)
        assert same_bits(model[1](x), expected)
    assert_unchanged(before, model)


def test_wrapped_block_with_wrapped_layers() -> None:
    """A wrapper around a module of one's own leaves its other layers to their own sites."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 3))
            self.inner = Wrapper(nn.Linear(3, 3))

        def forward(self, x: Tensor) -> Tensor:
            return cast(Tensor, self.inner(x @ self.weight))

    model = Wrapper(Block()).eval()
    x = torch.randn(2, 3)
    with torch.no_grad():
        expected = copy.deepcopy(model)(x)
    before = fingerprint(model)
    with frozen_spectral_norm(model), torch.no_grad():
        assert list(model.state_dict()) == [
            "module.weight",
            "module.inner.module.weight",
            "module.inner.module.bias",
        ]
        assert same_bits(model(x), expected)
    assert_unchanged(before, model)


def test_other_parametrizations_of_a_mixin_stay() -> None:
    """A parametrized bias stays parametrized on the instance, which has a class of its own."""
    model = PropertyLinear(3, 4)
    parametrize.register_parametrization(model, "bias", nn.ReLU())
    x = torch.randn(2, 3)
    with torch.no_grad():
        expected = copy.deepcopy(model).eval()(x)
    before = fingerprint(model)
    with frozen_spectral_norm(model), torch.no_grad():
        assert list(model.state_dict()) == ["weight", "parametrizations.bias.original"]
        assert same_bits(model.eval()(x), expected)
        model.train()
    assert_unchanged(before, model)


def test_classes_are_not_registered_with_the_user() -> None:
    """The class of a frozen instance is not announced to the user's own registry of classes."""
    seen: list[str] = []

    class Registered(SNLinear):
        def __init_subclass__(cls) -> None:
            seen.append(cls.__name__)

    model = Registered(3, 4)
    with frozen_spectral_norm(model):
        assert isinstance(model, Registered)
        for name in ("__module__", "__qualname__", "__doc__"):
            assert getattr(type(model), name) == getattr(Registered, name)
        assert repr(model).startswith("Registered(in_features=3")
    assert type(model) is Registered
    assert seen == []


def test_a_method_that_is_given_the_weight_takes_other_tensors() -> None:
    """Inside it returns the frozen weight for that, and what it always did for another tensor."""

    class SNLinear(nn.Linear):
        def normalise(self, matrix: Tensor) -> Tensor:
            return matrix / torch.linalg.matrix_norm(matrix, 2)

        def forward(self, input: Tensor) -> Tensor:
            return F.linear(input, self.normalise(self.weight), self.bias)

    model, other = SNLinear(3, 4), torch.randn(4, 3)
    expected = model.normalise(other)
    with frozen_spectral_norm(model):
        assert model.normalise(model.weight) is model.weight
        assert same_bits(model.normalise(other), expected)


@picked
def test_edits_and_moves_are_discarded_with_a_warning(name: str) -> None:
    """Loading a state dict or halving the model inside is undone, and said."""
    case = CASES[name]
    model = case.make()
    before = fingerprint(model)
    with pytest.warns(FrozenWeightChangedWarning, match="changed inside"):  # noqa: SIM117
        with frozen_spectral_norm(model), torch.no_grad():
            layer = model.get_submodule(case.layer)
            cast(Tensor, layer._parameters[case.tensor]).mul_(2)
    assert_unchanged(before, model)
    with pytest.warns(FrozenWeightChangedWarning, match="moved"), frozen_spectral_norm(model):
        model.half()
    after = fingerprint(model)
    assert {d.split(":")[0] for d in before.differences(after)} <= {"0"}
    assert all(p.dtype == torch.float32 for p in model.parameters())


@picked
def test_another_thread_is_refused(name: str) -> None:
    """While one thread holds the model frozen, another is told so."""
    model = nn.Sequential(CASES[name].make())
    errors: list[str] = []

    def intrude() -> None:
        try:
            with frozen_spectral_norm(model):
                pass
        except FreezeError as error:
            errors.append(str(error))

    with frozen_spectral_norm(model):
        thread = threading.Thread(target=intrude)
        thread.start()
        thread.join()
    assert len(errors) == 1
    assert "a block in another thread holds it frozen" in errors[0]


@pytest.mark.parametrize("name", ["wrapper-conv", "prehook", "biggan-conv", "updating"])
def test_meta_device_is_refused(name: str) -> None:
    """Without values there is nothing to freeze, which is said by the name of the tensor."""
    case = CASES[name]
    model = case.make().to("meta")
    (info,) = find_spectral_norm(model)
    assert info.name == case.name
    with (
        pytest.raises(FreezeError, match=f"'{case.name}': it is on the meta device"),
        frozen_spectral_norm(model),
    ):
        pass


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@picked
def test_dtypes(name: str, dtype: torch.dtype) -> None:
    """In any floating dtype the value is that of the next eval forward, bit for bit."""
    case = CASES[name]
    model = case.make().to(dtype).eval()
    x = case.x().to(dtype)
    with torch.no_grad():
        expected = copy.deepcopy(model)(x)
    before = fingerprint(model)
    with frozen_spectral_norm(model), torch.no_grad():
        assert same_bits(model(x), expected)
    assert_unchanged(before, model)


@picked
def test_frozen_by_the_user_is_found_too(name: str) -> None:
    """requires_grad_(False) on the whole model, as in a generator step, changes nothing."""
    case = CASES[name]
    model = case.make().requires_grad_(False)
    (info,) = find_spectral_norm(model)
    assert info.name == case.name
    plain = case.plain().state_dict()
    before = fingerprint(model)
    with frozen_spectral_norm(model):
        assert list(model.get_submodule(case.layer).state_dict()) == list(plain)
    assert_unchanged(before, model)


@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
def test_exported_graph_is_the_plain_one(exporter: Any, tmp_path: Path) -> None:
    """A network in train mode exports to its layers alone, and is as it was."""
    model = critic()
    before = fingerprint(model)
    report = export_onnx(model, (images(),), tmp_path / "critic.onnx", exporter=exporter)
    before.facts["next hook id"] = RemovableHandle.next_id  # exporters register hooks
    assert_unchanged(before, model)
    graph = onnx.load(tmp_path / "critic.onnx").graph
    kinds = {node.op_type for node in graph.node}
    assert kinds <= {"Conv", "Gemm", "Relu", "Flatten", "Reshape", "Constant"}
    shapes = {i.name: tuple(i.dims) for i in graph.initializer}
    assert shapes["first.module.weight"] == (2, 1, 3, 3)
    assert shapes["last.weight"] == (1, 4)
    assert not any(name.endswith(("_u", "_v", "_bar", "u0", "sv0")) for name in shapes)
    assert len(report.frozen) == 8


@pytest.mark.parametrize("way", ["trace", "export", "functional"])
@pytest.mark.parametrize("name", ["wrapper-conv", "biggan-conv", "raw-name", "updating"])
def test_tools_of_torch_work_inside(name: str, way: str) -> None:
    """Tracing, exporting and functional calls inside see a plain network."""
    case = CASES[name]
    model = case.make().eval()
    x = case.x()
    with frozen_spectral_norm(model), torch.no_grad():
        expected = model(x)
        if way == "trace":
            run: Any = torch.jit.trace(model, (x,))
        elif way == "export":
            run = torch.export.export(model, (x,)).module()
        else:
            state = {key: value * 2 for key, value in model.state_dict().items()}
            assert same_bits(torch.func.functional_call(model, state, (x,)), expected * 2)
            return
        torch.testing.assert_close(run(x), expected)


# The files that run the user's code; interrupts in the others are tested with torch's kinds.
ASKING = (
    "sandbox.py",
    "candidates.py",
    "wrapper.py",
    "prehook.py",
    "mixin.py",
    "child_norm.py",
    "handwritten.py",
)


def fault_model(name: str) -> nn.Module:
    seed_torch(0)
    builds = {
        "wrapper": lambda: Wrapper(nn.Linear(2, 2)),
        "prehook": lambda: old_spectral_norm(nn.Linear(2, 2)),
        "mixin": lambda: UpdatingDense(2, 2),
        "inline": lambda: InlineConv2d(1, 2, 1),
        "helped": lambda: HelpedDense(2, 2),
    }
    return nn.Sequential(builds[name]())


@pytest.mark.parametrize("name", ["wrapper", "prehook", "mixin", "inline", "helped"])
def test_interrupt_at_any_step_of_entering_changes_nothing(name: str) -> None:
    """Whichever line that asks the user's code is interrupted, the model is unchanged."""
    model = fault_model(name)
    before = fingerprint(model)
    fault_while_entering(model, Fault())  # what is read once for each class is read here
    dry = Fault()
    fault_while_entering(model, dry)
    failures: list[str] = []
    steps = [step for step in dry.steps() if dry.places[step - 1][0].endswith(ASKING)]
    for step in steps:
        fault = Fault(KeyboardInterrupt, step)
        fault_while_entering(model, fault)
        assert fault.struck
        failures += damage(fault, before, model)
    assert len(steps) > 50
    assert failures == []


@pytest.mark.parametrize("name", ["wrapper", "mixin", "helped"])
def test_interrupt_at_any_step_of_leaving_restores_first(name: str) -> None:
    """Whichever line of leaving is interrupted, the model is restored before that is raised."""
    model = fault_model(name)
    before = fingerprint(model)
    dry = Fault()
    fault_while_leaving(model, dry)
    failures: list[str] = []
    for step in dry.steps():
        fault = Fault(KeyboardInterrupt, step)
        if not fault_while_leaving(model, fault):
            failures.append(f"{fault.struck}: the interrupt was lost")
        failures += damage(fault, before, model)
    assert len(dry.steps()) > 30
    assert failures == []
