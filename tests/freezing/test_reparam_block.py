"""The block on weight norm, orthogonal, pruning and parametrizations of one's own: exact, too."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import onnx
import pytest
import torch
from export_models import bare_export
from fingerprint import all_same_bits, assert_unchanged, fingerprint, same_bits
from networks import Custom, Scale
from reparam_networks import (
    PAIRS,
    REPARAMETRIZATIONS,
    Cut,
    Dropped,
    hooked,
    make,
    mixed,
    pruned,
    registered,
    reparametrize,
)
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm

from sn_export import (
    FreezeError,
    find_parametrizations,
    find_spectral_norm,
    frozen_parametrizations,
    frozen_spectral_norm,
)

each_pair = pytest.mark.parametrize(("how", "name"), PAIRS)
each_how = pytest.mark.parametrize("how", REPARAMETRIZATIONS)


@each_pair
def test_outputs_keys_and_classes_are_those_of_the_plain_network(how: str, name: str) -> None:
    """Inside, outputs have the bits of eval mode, keys and classes are plain; then all is back."""
    model, case = make(how, name)
    model.eval()
    with torch.no_grad():
        expected = case.run(model)
    plain = case.plain()
    before = fingerprint(model)
    with frozen_parametrizations(model) as frozen, torch.no_grad():
        assert frozen is model
        assert all_same_bits(case.run(model), expected)
        assert list(model.state_dict()) == list(plain.state_dict())
        assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
        assert not any(getattr(model, tensor).requires_grad for tensor in case.tensors)
    assert_unchanged(before, model)


@each_pair
def test_training_mode_and_gradients_come_back(how: str, name: str) -> None:
    """A model in train mode with gradients is bit for bit as it was, also after an exception."""
    model, case = make(how, name)
    torch.stack([t.abs().float().sum() for t in case.run(model)]).sum().backward()
    before = fingerprint(model)
    with pytest.raises(KeyError), frozen_parametrizations(model):
        model.state_dict()
        raise KeyError
    assert_unchanged(before, model)


@each_how
def test_values_after_loading_are_the_loaded_ones(how: str) -> None:
    """A checkpoint loaded without a forward since is what counts, not an attribute left behind."""
    model, case = make(how, "linear")
    other, _ = make(how, "linear", seed=1)
    case.run(model)
    if how == "orthogonal" or "chain" in how:
        other.train(model.training)
    model.load_state_dict(other.state_dict())
    model.eval(), other.eval()
    before = fingerprint(model)
    with torch.no_grad(), frozen_parametrizations(model):
        inside = case.run(model)
    assert_unchanged(before, model)
    assert all_same_bits(inside, case.run(other))


@each_how
def test_spectral_norm_alone_leaves_the_others(how: str) -> None:
    """`frozen_spectral_norm` leaves every other reparametrization as it is, and lists none."""
    model, _ = make(how, "linear")
    before = fingerprint(model)
    with frozen_spectral_norm(model):
        assert_unchanged(before, model)
    with frozen_parametrizations(model, only="spectral_norm"):
        assert_unchanged(before, model)


@each_how
def test_listing_says_kind_shape_and_dtype(how: str) -> None:
    """Each tensor is listed with its kind, and nothing changes by that."""
    model, case = make(how, "lstm")
    before = fingerprint(model)
    infos = find_parametrizations(model)
    assert_unchanged(before, model)
    assert [info.name for info in infos] == list(case.tensors)
    assert {info.kind for info in infos} == {REPARAMETRIZATIONS[how][0]}
    assert {(info.shape, info.dtype) for info in infos} == {((12, 3), "float32")}


def test_other_shape_and_dtype() -> None:
    """A chain that changes shape and dtype is frozen, and listed, as what it ends in."""
    model = registered(Cut, unsafe=True)(nn.Linear(3, 4, bias=False), "weight").eval()
    x = torch.randn(2, 3, dtype=torch.float64)
    expected = model(x)
    before = fingerprint(model)
    (info,) = find_parametrizations(model)
    assert (info.shape, info.dtype) == ((2, 3), "float64")
    with frozen_parametrizations(model):
        assert type(model.weight) is nn.Parameter
        assert same_bits(model(x), expected.detach())
    assert_unchanged(before, model)


def test_parametrized_buffer_stays_a_buffer() -> None:
    """A buffer under a parametrization is a plain buffer inside, with no gradient to speak of."""
    model = registered(Scale)(nn.BatchNorm1d(3), "running_var").eval()
    plain = nn.BatchNorm1d(3)
    x = torch.randn(5, 3)
    with torch.no_grad():
        expected = model(x)
    before = fingerprint(model)
    with frozen_parametrizations(model):
        assert set(model._buffers) == set(plain._buffers)
        assert same_bits(model(x).detach(), expected)
    assert_unchanged(before, model)


def test_random_parametrization_draws_nothing_outside() -> None:
    """A parametrization that is random in eval mode is one draw, which no generator notices."""
    model = registered(Dropped)(nn.Linear(6, 6), "weight").eval()
    x = torch.randn(2, 6)
    before = fingerprint(model)
    with frozen_parametrizations(model):
        first = model(x)
        assert same_bits(model(x), first)
        assert 0 < int((model.weight == 0).sum()) < 36
    assert_unchanged(before, model)


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_inside_cached(mode: bool) -> None:
    """Where torch caches parametrizations, the cached tensor counts, and the cache stays."""
    model = parametrizations.spectral_norm(nn.Linear(3, 4)).train(mode)
    with parametrize.cached():
        before = fingerprint(model)
        with frozen_parametrizations(model):
            pass
        assert_unchanged(before, model)
        assert not parametrize._cache
        in_use = model.weight
        before = fingerprint(model)
        model.eval()
        with frozen_parametrizations(model):
            assert same_bits(model.weight, in_use.detach())
        assert model.weight is in_use
    model.train(mode)
    assert_unchanged(before, model)


class Nested(nn.Module):
    """A parametrization that holds a layer under weight norm, and reads its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = parametrizations.weight_norm(nn.Linear(3, 4))

    def forward(self, weight: Tensor) -> Tensor:
        inner: Tensor = self.inner.weight
        return weight + inner


def test_parametrization_inside_a_parametrization() -> None:
    """A chain whose own module is parametrized is frozen whole, and alone where asked to be."""
    model = registered(Nested)(nn.Linear(3, 4), "weight").eval()
    expected = model.weight.detach()
    before = fingerprint(model)
    with parametrize.cached(), frozen_parametrizations(model):
        assert not parametrize._cache
        assert same_bits(model.weight, expected)
    assert_unchanged(before, model)
    with frozen_parametrizations(model, only="weight_norm"):
        assert list(model.state_dict()) == [
            "bias",
            "parametrizations.weight.original",
            "parametrizations.weight.0.inner.weight",
            "parametrizations.weight.0.inner.bias",
        ]
        assert same_bits(model.weight, expected)
    assert_unchanged(before, model)


def test_global_pruning() -> None:
    """Masks of `prune.global_unstructured` over several layers, biases too."""
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)).eval()
    keys = list(model.state_dict())
    prune.global_unstructured(
        [(model[0], "bias"), (model[0], "weight"), (model[2], "weight")],
        pruning_method=prune.L1Unstructured,
        amount=0.5,
    )
    x = torch.randn(3, 4)
    expected = model(x).detach()
    before = fingerprint(model)
    with frozen_parametrizations(model):
        assert list(model.state_dict()) == keys
        assert sum(int((p == 0).sum()) for p in model.parameters()) == 18
        assert same_bits(model(x).detach(), expected)
    assert_unchanged(before, model)


def test_pruned_original_of_spectral_norm() -> None:
    """Pruning below a chain counts to the chain; alone, it is frozen inside it."""
    model = parametrizations.spectral_norm(nn.Linear(4, 5)).eval()
    prune.l1_unstructured(model.parametrizations.weight, "original", 0.5)  # type: ignore[union-attr]
    other = parametrizations.spectral_norm(nn.Linear(4, 5)).eval()
    prune.l1_unstructured(other.parametrizations.weight, "original", 0.5)  # type: ignore[union-attr]
    model.load_state_dict(other.state_dict())
    expected = other.weight.detach()
    before = fingerprint(model)
    for block in (frozen_parametrizations(model), frozen_spectral_norm(model)):
        with block:
            assert list(model.state_dict()) == ["weight", "bias"]
            assert same_bits(model.weight, expected)
        assert_unchanged(before, model)
    with frozen_parametrizations(model, only="pruning"):
        assert "parametrizations.weight.original" in model.state_dict()
        assert same_bits(model.weight.detach(), expected)
    assert_unchanged(before, model)


def test_spectral_norm_of_a_pruned_original() -> None:
    """A chain on what a mask multiplies: spectral norm alone is exact, both together refused."""
    model = pruned(nn.Linear(4, 5)).eval()
    parametrizations.spectral_norm(model, "weight_orig")
    x = torch.randn(2, 4)
    expected = model(x).detach()
    before = fingerprint(model)
    with frozen_spectral_norm(model):
        assert "weight_orig" in model._parameters
        assert same_bits(model(x).detach(), expected)
    model(x)
    with pytest.raises(FreezeError, match="'weight': its pruning hook finds no parameter"):
        frozen_parametrizations(model).__enter__()
    after = fingerprint(model)
    assert [d for d in before.differences(after) if " weight" not in d] == []


def _hook_on_hook(how: str) -> tuple[nn.Module, str]:
    model = nn.Linear(4, 5)
    if how == "spectral norm on weight_v":
        spectral_norm(hooked(model), "weight_v")
        return model, "weight_v"
    if how == "pruning on weight_v":
        pruned(hooked(model), "weight_v")
        return model, "weight_v"
    if how == "weight norm on weight_orig":
        hooked(pruned(model), "weight_orig")
        return model, "weight_orig"
    pruned(spectral_norm(model), "weight_orig")
    return model, "weight_orig"


@pytest.mark.parametrize(
    "how",
    [
        "spectral norm on weight_v",
        "pruning on weight_v",
        "weight norm on weight_orig",
        "pruning on weight_orig",
    ],
)
def test_hook_on_a_hook_is_refused(how: str) -> None:
    """A hook that computes from another's tensor, one forward late, is one clear FreezeError."""
    model, inner = _hook_on_hook(how)
    before = fingerprint(model)
    with pytest.raises(FreezeError, match=r"Remove (one of the two hooks|whatever renamed it)"):
        frozen_parametrizations(model).__enter__()
    with pytest.raises(FreezeError, match=f"'{inner}': .*one forward behind"):
        frozen_parametrizations(model, only=inner).__enter__()
    assert_unchanged(before, model)


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda: parametrizations.orthogonal(nn.Linear(3, 4)).half(), "not ?implemented.*half"),
        (lambda: registered(lambda: Failing())(nn.Linear(3, 3), "weight"), "out of order"),
        (lambda: hooked(nn.Linear(3, 3)).to("meta"), "meta device"),
        (lambda: pruned(nn.Linear(3, 3)).to("meta"), "meta device"),
    ],
    ids=["orthogonal-half", "failing", "hook-meta", "pruned-meta"],
)
def test_what_cannot_be_computed_is_a_freeze_error(build: Any, reason: str) -> None:
    """What an eval forward could not compute either is an error with the tensor's name."""
    Failing.fails = False
    model = build()
    Failing.fails = True
    before = fingerprint(model)
    with pytest.raises(FreezeError, match=f"(?i)cannot freeze 'weight': .*{reason}"):
        frozen_parametrizations(model).__enter__()
    assert_unchanged(before, model)


class Failing(nn.Module):
    """Works when it is registered, and not any more later."""

    fails = False

    def forward(self, weight: Tensor) -> Tensor:
        if self.fails:
            raise ArithmeticError("out of order")
        return weight


def _in_place(link: VectorsInParameters, u: Tensor) -> None:
    link.u.data.copy_(u)


def _by_other_memory(link: VectorsInParameters, u: Tensor) -> None:
    link.u.data = u


def _by_its_right_inverse(link: VectorsInParameters, u: Tensor) -> None:
    link.u = cast(nn.Parameter, u)


class VectorsInParameters(nn.Module):
    """Iterates in eval mode too, and keeps its vector as a parameter, as orthogonium does."""

    def __init__(self, write: Callable[[VectorsInParameters, Tensor], None]) -> None:
        super().__init__()
        self.write = write
        self.u = nn.Parameter(torch.ones(4, 1), requires_grad=False)
        if write is _by_its_right_inverse:
            parametrize.register_parametrization(self, "u", Inverted())

    def forward(self, weight: Tensor) -> Tensor:
        v = weight.detach().t() @ self.u.detach()
        self.write(self, nn.functional.normalize(weight.detach() @ v, dim=0))
        return weight / (self.u.detach().t() @ weight @ nn.functional.normalize(v, dim=0))


class Inverted(nn.Module):
    """Lets a parametrized tensor be assigned."""

    def forward(self, value: Tensor) -> Tensor:
        return nn.functional.normalize(value, dim=0)

    def right_inverse(self, value: Tensor) -> Tensor:
        return value


@pytest.mark.parametrize("write", [_in_place, _by_other_memory, _by_its_right_inverse])
@pytest.mark.parametrize("limit", [2**29, 0])
def test_a_link_that_writes_its_parameters(
    write: Any, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Looking, freezing and leaving put back parameters that a chain writes in its forward."""
    monkeypatch.setattr("sn_export.running.tensor_memory.LARGE", limit)
    model = nn.Linear(3, 4)
    link = VectorsInParameters(write)
    parametrize.register_parametrization(model, "weight", link, unsafe=True)
    parametrizations.spectral_norm(model)
    twin = copy.deepcopy(model)
    before = fingerprint(model)
    assert [info.kind for info in find_parametrizations(model)] == ["spectral_norm"]
    assert [info.name for info in find_spectral_norm(model)] == ["weight"]
    for freeze in (frozen_spectral_norm, frozen_parametrizations):
        with freeze(model):
            weight = model.weight.clone()
        assert_unchanged(before, model)
    assert same_bits(weight, twin.eval().weight.detach())


def test_subclasses_of_the_hooks_are_asked() -> None:
    """A pruning method that applies its mask in another way gives the value; what it logs goes."""

    class Softened(prune.L1Unstructured):
        def apply_mask(self, module: nn.Module) -> Tensor:
            self.calls = getattr(self, "calls", 0) + 1
            masked: Tensor = super().apply_mask(module)
            return 0.5 * masked + 0.5 * getattr(module, self._tensor_name + "_orig")

    model = nn.Linear(4, 4)
    Softened.apply(model, "weight", 0.5)
    model.eval()
    x = torch.randn(2, 4)
    expected = model(x).detach()
    before = fingerprint(model)
    hook = next(iter(model._forward_pre_hooks.values()))
    calls = hook.calls  # type: ignore[attr-defined]
    with frozen_parametrizations(model):
        assert same_bits(model(x).detach(), expected)
    assert hook.calls == calls  # type: ignore[attr-defined]
    assert_unchanged(before, model)


def test_everything_at_once() -> None:
    """All kinds in one model, two of them on one module, in nested blocks of each kind."""
    model = mixed()
    x = torch.randn(5, 2, 3)
    expected = model(x).detach()
    model.train()
    before = fingerprint(model)
    with frozen_parametrizations(model):
        model.eval()
        assert same_bits(model(x).detach(), expected)
        assert find_parametrizations(model) == []
        model.train()
    assert_unchanged(before, model)
    with (
        frozen_parametrizations(model, "weight_norm"),
        frozen_spectral_norm(model),
        frozen_parametrizations(model, ["pruning", "orthogonal"]),
        frozen_parametrizations(model),
    ):
        assert find_parametrizations(model) == []
    assert_unchanged(before, model)


@each_how
def test_on_top_of_each_other_in_a_module(how: str) -> None:
    """Another kind on another tensor of the same module: both frozen, each alone, all restored."""
    model = Custom()
    reparametrize(how, model, "kernel")
    parametrizations.spectral_norm(model, "first")
    model.eval()
    x = torch.randn(2, 3)
    expected = model(x).detach()
    for only in (None, "kernel", "first", "spectral_norm", REPARAMETRIZATIONS[how][0]):
        before = fingerprint(model)
        with frozen_parametrizations(model, only):
            pass
        assert_unchanged(before, model)
        with frozen_parametrizations(model, only):  # what is not frozen may write to itself
            assert same_bits(model(x).detach(), expected)


@pytest.mark.parametrize("how", ["orthogonal", "weight_norm", "weight_norm hook", "pruned"])
def test_exported_graph_is_the_plain_one(how: str, tmp_path: Path) -> None:
    """Exported inside the block, also what no exporter knows is one node with its weight."""
    model, _ = make(how, "linear")
    model.eval()
    before = fingerprint(model)
    with frozen_parametrizations(model):
        bare_export(model, (torch.ones(2, 3),), tmp_path / "model.onnx", "torchscript")
        weight = model.weight.detach().clone()
    assert_unchanged(before, model)
    graph = onnx.load(tmp_path / "model.onnx").graph
    assert [node.op_type for node in graph.node] == ["Gemm"]
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
    assert same_bits(torch.from_numpy(stored["weight"].copy()), weight)
