"""Variants of torch's own kinds: subclassed hooks, and spectral norm inside chains."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from fingerprint import assert_unchanged, contents, fingerprint, same_bits
from networks import Scale, seed_torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, spectral_norm
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm

from sn_export import find_spectral_norm, find_suspects, frozen_spectral_norm


class SoftHook(SpectralNorm):
    """max(1, sigma / coeff), which it also writes into ``weight_sigma`` in place, in eval too."""

    coeff = 0.2

    def compute_weight(self, module: nn.Module, do_power_iteration: bool) -> Tensor:
        weight = super().compute_weight(module, do_power_iteration)
        raw = cast(Tensor, getattr(module, self.name + "_orig"))
        sigma = (raw.flatten()[0] / weight.flatten()[0]).detach()
        factor = torch.clamp(sigma / self.coeff, min=1)
        cast(Tensor, getattr(module, self.name + "_sigma")).copy_(sigma)
        self.last = sigma  # an attribute of the hook, not of the module
        return raw / factor


class OperatorHook(SoftHook):
    """The norm of the convolution as an operator: vectors as large as images, of two shapes."""

    size = (1, 2, 5, 5)

    def compute_weight(self, module: nn.Module, do_power_iteration: bool) -> Tensor:
        raw = cast(Tensor, getattr(module, self.name + "_orig"))
        u, v = cast(Tensor, module.weight_u), cast(Tensor, module.weight_v)
        with torch.no_grad():
            if do_power_iteration:
                v.copy_(F.normalize(F.conv_transpose2d(u.view(1, 3, 3, 3), raw).flatten(), dim=0))
                u.copy_(F.normalize(F.conv2d(v.view(self.size), raw).flatten(), dim=0))
            sigma = u @ F.conv2d(v.view(self.size), raw).flatten()
            cast(Tensor, module.weight_sigma).copy_(sigma)
        return raw / torch.clamp(sigma / self.coeff, min=1)


def with_hook(kind: type[SoftHook], module: nn.Module) -> nn.Module:
    """Apply torch's hook and exchange it, as such packages do."""
    spectral_norm(module)
    module.register_buffer("weight_sigma", torch.ones(()))
    (key,) = module._forward_pre_hooks
    module._forward_pre_hooks[key] = kind("weight", eps=1e-12)
    if kind is OperatorHook:
        module.weight_u = F.normalize(torch.randn(27), dim=0)
        module.weight_v = F.normalize(torch.randn(50), dim=0)
    return module


class Bjorck(nn.Module):
    """Orthogonalisation by iteration."""

    def forward(self, weight: Tensor) -> Tensor:
        matrix = weight.flatten(1)
        for _ in range(3):
            matrix = 1.5 * matrix - 0.5 * matrix @ matrix.t() @ matrix
        return matrix.view_as(weight)


class Rows(nn.Module):
    """Reshapes and scales each row."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.rand(rows))

    def forward(self, weight: Tensor) -> Tensor:
        return (weight.flatten(1).t() * self.gain).t().reshape(weight.shape)


class Folded(nn.Module):
    """Makes the weight of a vector."""

    def forward(self, vector: Tensor) -> Tensor:
        return vector.view(3, 2, 3, 3)

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight.flatten()


class Cached(nn.Module):
    """Computes anew in train mode, and once in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.cache: Tensor | None = None
        self.calls: list[int] = []

    def train(self, mode: bool = True) -> Cached:
        self.cache = None
        return super().train(mode)

    def forward(self, weight: Tensor) -> Tensor:
        self.calls.append(1)
        if self.training:
            self.cache = None
            return weight * 0.5
        if self.cache is None:
            self.cache = weight * 0.5
        return self.cache


class Unit(nn.Module):
    """Keeps vectors at length one: a parametrization of u."""

    def forward(self, vector: Tensor) -> Tensor:
        dim = None if vector.ndim == 1 else -2
        return vector / torch.linalg.vector_norm(vector, dim=dim, keepdim=vector.ndim > 1)

    def right_inverse(self, vector: Tensor) -> Tensor:
        return vector


class OwnNorm(nn.Module):
    """A handwritten spectral norm, registered as a parametrization."""

    u: Tensor

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.register_buffer("u", F.normalize(torch.randn(rows), dim=0))

    def forward(self, weight: Tensor) -> Tensor:
        matrix = weight.flatten(1)
        with torch.no_grad():
            v = F.normalize(matrix.t() @ self.u, dim=0)
            self.u.copy_(F.normalize(matrix @ v, dim=0))
        return weight / (self.u.clone() @ matrix @ v)


class PowerIteration(nn.Module):
    """As in orthogonium: of a batch of matrices, by vectors that are under parametrizations."""

    u: Tensor
    v: Tensor

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.u = nn.Parameter(torch.randn(*shape[:-1], 1), requires_grad=False)
        self.v = nn.Parameter(torch.randn(*shape[:-2], shape[-1], 1), requires_grad=False)
        for name in ("u", "v"):
            parametrize.register_parametrization(self, name, Unit())

    def forward(self, weight: Tensor) -> Tensor:
        matrix = weight.flatten(1) if weight.ndim == 4 else weight
        for _ in range(2):
            self.v = matrix.mT @ self.u
            self.u = matrix @ self.v
        s = self.u.detach().mT @ matrix @ self.v.detach()
        return (matrix / (s + 1e-3)).view_as(weight)


class Kernel(nn.Module):
    """As orthogonium's block convolutions: the raw weight has another shape than the kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = PowerIteration(1, 3, 18)

    def forward(self, weight: Tensor) -> Tensor:
        return self.norm(weight).view(3, 2, 3, 3)


def chain(*links: Callable[[], nn.Module | None]) -> Callable[[], nn.Module]:
    """Register the links on a convolution; None stands for torch's spectral norm."""

    def build() -> nn.Module:
        module = nn.Conv2d(2, 3, 3)
        for make in links:
            link = make()
            if link is None:
                parametrizations.spectral_norm(module)
            else:
                parametrize.register_parametrization(module, "weight", link)
        return module

    return build


def norm() -> None:
    """Stand for torch's own link in a chain."""


def parametrized_vectors() -> nn.Module:
    module = chain(norm)()
    link = cast(Any, module).parametrizations.weight[0]
    parametrize.register_parametrization(link, "_u", Unit(), unsafe=True)
    return module


def behind_weight_norm() -> nn.Module:
    module = parametrizations.weight_norm(nn.Conv2d(2, 3, 3))
    return parametrize.register_parametrization(module, "weight", OwnNorm(3))


@dataclass(frozen=True)
class Case:
    build: Callable[[], nn.Module]
    kind: str = "parametrization"


CASES = {
    "soft": Case(lambda: with_hook(SoftHook, nn.Conv2d(2, 3, 3)), "hook"),
    "operator": Case(lambda: with_hook(OperatorHook, nn.Conv2d(2, 3, 3)), "hook"),
    "bjorck": Case(chain(norm, Bjorck)),
    "scaled-bjorck": Case(chain(Scale, norm, Bjorck, lambda: Rows(3))),
    "cached": Case(chain(norm, Cached)),
    "cached-first": Case(chain(Cached, norm)),
    "vectors": Case(parametrized_vectors),
    "own": Case(chain(lambda: OwnNorm(3))),
    "own-behind-weight-norm": Case(behind_weight_norm),
    "own-folded": Case(chain(Folded, lambda: OwnNorm(3))),
    "own-parametrized": Case(chain(lambda: PowerIteration(3, 18), Bjorck)),
    "own-bjorck": Case(chain(lambda: OwnNorm(3), Bjorck, Scale)),
}


def image() -> Tensor:
    return torch.randn(2, 2, 5, 5, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("state", ["new", "trained", "evaluated"])
@pytest.mark.parametrize("name", CASES)
def test_final_value_counts_and_everything_written_is_put_back(
    name: str, state: str, training: bool
) -> None:
    """Inside is what the next eval forward uses; buffers, caches and hook attributes stay."""
    seed_torch(0)
    model = CASES[name].build()
    if state == "trained":
        model(image()).square().sum().backward()
    if state == "evaluated":
        model.eval()(image())
    model.train(training)
    twin = CASES[name].build()
    twin.load_state_dict(model.state_dict())
    with torch.no_grad():
        expected = twin.eval()(image())
    hooks = [vars(hook).copy() for hook in model._forward_pre_hooks.values()]
    before = fingerprint(model)
    with frozen_spectral_norm(model):
        assert sorted(model.state_dict()) == ["bias", "weight"]
        assert type(model) is nn.Conv2d
        state_before = {key: contents(value) for key, value in model.state_dict().items()}
        with torch.no_grad():
            assert same_bits(model(image()), expected)
        assert state_before == {k: contents(v) for k, v in model.state_dict().items()}
    assert_unchanged(before, model)
    assert [vars(hook) for hook in model._forward_pre_hooks.values()] == hooks


@pytest.mark.parametrize("name", CASES)
def test_listed_by_the_kind_of_torch_that_carries_it(name: str) -> None:
    """Each is listed once, under torch's kind, with a number for sigma, and only looked at."""
    model = CASES[name].build()
    before = fingerprint(model)
    (info,) = find_spectral_norm(model)
    assert find_suspects(model) == []
    assert_unchanged(before, model)
    assert (info.name, info.kind) == ("weight", CASES[name].kind)
    assert math.isfinite(info.sigma)
    assert info.sigma > 0


def test_batch_of_matrices_with_parametrized_vectors() -> None:
    """Each matrix of a batch is divided by its own norm, so the whole has no one sigma."""
    model = nn.Conv1d(2, 3, 4)
    parametrize.register_parametrization(model, "weight", PowerIteration(3, 2, 4))
    before = fingerprint(model)
    (info,) = find_spectral_norm(model)
    assert (info.kind, math.isnan(info.sigma)) == ("parametrization", True)
    with frozen_spectral_norm(model):
        frozen = model.weight
        assert list(model.state_dict()) == ["weight", "bias"]
    assert_unchanged(before, model)
    assert same_bits(frozen, model.eval().weight)


class BatchedIteration(PowerIteration):
    """Of a weight with as many leading dimensions as there are."""

    def forward(self, weight: Tensor) -> Tensor:
        for _ in range(2):
            self.v = weight.mT @ self.u
            self.u = weight @ self.v
        return weight / (self.u.detach().mT @ weight @ self.v.detach() + 1e-12)


class BatchedBjorck(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 1.5 * weight - 0.5 * weight @ weight.mT @ weight


class Convolved(nn.Module):
    """As BCOP: a convolution kernel made of a batch of orthogonal matrices, in another shape."""

    def forward(self, weight: Tensor) -> Tensor:
        first, second, last = weight.flatten(0, -3)[:3]
        kernel = torch.stack([first @ second, first @ last], -1)
        return kernel[..., None, :].expand(*kernel.shape[:2], 2, 2)


class Holding(nn.Module):
    """Holds the power iteration as a child, and goes on with what that gives."""

    def __init__(self, child: nn.Module) -> None:
        super().__init__()
        self.child = child

    def forward(self, weight: Tensor) -> Tensor:
        matrix = weight.flatten(-2) if weight.ndim == 4 and len(weight) == 3 else weight
        matrix = matrix.flatten(1) if matrix.ndim == 3 and len(weight) == 3 else matrix
        normalised = cast(Tensor, self.child(matrix))
        return (1.5 * normalised - 0.5 * normalised @ normalised.mT @ normalised).view_as(weight)


class Dividing(Holding):
    """Is told sigma by the child, and divides itself."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight / cast(Tensor, self.child(weight.flatten(1)))


class Sigma(OwnNorm):
    def forward(self, weight: Tensor) -> Tensor:
        return (weight / super().forward(weight)).mean()


class Raw(nn.Module):
    """A kernel that is made of a batch of matrices."""

    weight: Tensor

    def __init__(self, *links: nn.Module, shape: tuple[int, ...] = (2, 2, 3, 3)) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape))
        for link in links:
            parametrize.register_parametrization(self, "weight", link, unsafe=True)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight)


DEEP_CASES: dict[str, Callable[[], nn.Module]] = {
    "batched": lambda: Raw(BatchedIteration(2, 2, 3, 3), BatchedBjorck(), Convolved()),
    "batched-3": lambda: Raw(BatchedIteration(3, 4, 3), BatchedBjorck(), shape=(3, 4, 3)),
    "held": lambda: Raw(Holding(BatchedIteration(2, 2, 3, 3)), Convolved()),
    "held-own": chain(lambda: Holding(OwnNorm(3))),
    "held-torch": chain(lambda: Holding(_SpectralNorm(torch.randn(3, 18)))),
    "held-sigma": chain(lambda: Dividing(Sigma(3))),
    "held-twice": chain(lambda: nn.Sequential(Holding(Holding(PowerIteration(3, 18))))),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", DEEP_CASES)
def test_batches_and_children_of_links_are_found_and_frozen(name: str, training: bool) -> None:
    """A chain with a power iteration on a batch, or within a link, is listed and frozen whole."""
    seed_torch(0)
    model = DEEP_CASES[name]().train(training)
    twin = copy.deepcopy(model).eval()
    before = fingerprint(model)
    (info,) = find_spectral_norm(model)
    assert (info.name, info.kind) == ("weight", "parametrization")
    assert find_suspects(model) == []
    assert_unchanged(before, model)
    with frozen_spectral_norm(model), torch.no_grad():
        assert "weight" in model._parameters
        assert same_bits(cast(Tensor, model.weight), cast(Tensor, twin.weight))
    assert_unchanged(before, model)


class Reflection(nn.Module):
    """A Householder reflection: its vector has a fitting name and size, and a norm."""

    u: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("u", torch.randn(3))

    def forward(self, weight: Tensor) -> Tensor:
        u = F.normalize(self.u, dim=0)
        return weight - 2 * torch.einsum("i,j,j...->i...", u, u, weight)


def unit_reflection() -> nn.Module:
    link = Reflection()
    link.u = nn.Parameter(link._buffers.pop("u"), requires_grad=False)
    return parametrize.register_parametrization(link, "u", Unit())


@pytest.mark.parametrize(
    "build",
    [chain(Folded, Reflection), chain(unit_reflection)],
    ids=["behind", "parametrized"],
)
def test_a_link_that_does_not_divide_is_no_spectral_norm(build: Callable[[], nn.Module]) -> None:
    """A vector of a fitting name and size does not tell, where the link is asked."""
    model = build()
    before = fingerprint(model)
    assert find_spectral_norm(model) == []
    assert find_suspects(model) == []
    assert_unchanged(before, model)


def test_sigma_of_an_own_link_is_what_it_divides_by() -> None:
    """Behind another link, sigma is still that of the tensor which arrives."""
    model = chain(Scale, lambda: OwnNorm(3))()
    (info,) = find_spectral_norm(model)
    scale, own = cast(Any, model).parametrizations.weight
    input_of_link = scale(cast(Any, model).parametrizations.weight.original).detach()
    before = own.u.clone()
    value = own(input_of_link)
    own.u.copy_(before)
    assert info.sigma == pytest.approx(float((input_of_link / value).mean()), rel=1e-5)


def test_cached_value_counts_in_eval() -> None:
    """What an eval forward reads from a cache is frozen, also if the raw weight moved on."""
    model = chain(norm, Cached)().eval()
    with torch.no_grad():
        model(image())
        cast(Any, model).parametrizations.weight.original.mul_(3.0)
        expected = model(image())
        with frozen_spectral_norm(model):
            assert same_bits(model(image()), expected)


class ReadsInCache(nn.Linear):
    """As orthogonium's convolutions: an eval forward reads the weight in torch's cache."""

    def forward(self, x: Tensor) -> Tensor:
        with nullcontext() if self.training else parametrize.cached():
            return F.linear(x, self.weight, self.bias)


def test_vectors_that_a_forward_reads_in_the_cache() -> None:
    """Power iteration reads cached vectors, which do not move: the frozen weight is that one."""
    model = parametrize.register_parametrization(ReadsInCache(3, 4), "weight", PowerIteration(4, 3))
    model.eval()
    x = torch.randn(2, 3)
    with torch.no_grad():
        cached = copy.deepcopy(model)(x)
        assert not torch.equal(cached, F.linear(x, copy.deepcopy(model).weight, model.bias))
    before = fingerprint(model)
    with torch.no_grad(), frozen_spectral_norm(model):
        assert torch.equal(model(x), cached)
    assert_unchanged(before, model)


def test_a_norm_that_gives_another_shape() -> None:
    """The list shows the tensor that the network uses."""
    model = nn.Conv2d(2, 3, 3)
    model.weight = nn.Parameter(model.weight.detach().view(1, 3, 18))
    parametrize.register_parametrization(model, "weight", Kernel(), unsafe=True)
    (info,) = find_spectral_norm(model)
    assert info.shape == (3, 2, 3, 3)
