"""What looks like spectral norm and is not known is named; what does not is left in peace."""

from __future__ import annotations

import math
import warnings
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from fingerprint import assert_unchanged, fingerprint, same_bits
from handwritten_networks import (
    HelpedDense,
    InlineConv2d,
    SNConv2d,
    SpectralNormConv,
    TorchHelpedConv2d,
    Wrapper,
    l2normalize,
    operator_norm,
)
from networks import KINDS, net
from torch import Tensor, nn
from torch.nn.utils import spectral_norm

from sn_export import (
    SpectralNormNotRecognisedWarning,
    SpectralNormSuspect,
    find_spectral_norm,
    find_suspects,
    frozen_spectral_norm,
)


class OverwritingWrapper(nn.Module):
    """Divides the layer's own parameter by sigma in every forward: there is no raw weight."""

    u: Tensor

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.register_buffer("u", torch.randn(cast(Tensor, module.weight).shape[0]))

    def forward(self, x: Tensor) -> Any:
        weight = cast(nn.Parameter, self.module.weight)
        matrix = weight.data.flatten(1)
        v = l2normalize(matrix.t() @ self.u)
        self.u = l2normalize(matrix @ v)
        weight.data = weight.data / (self.u @ matrix @ v)
        return self.module(x)


class PairLinear(nn.Linear):
    """Returns the weight with its sigma, and forward scales the output by hand."""

    weight_u: Tensor

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.register_buffer("weight_u", torch.randn(outputs))

    def compute(self) -> tuple[Tensor, Tensor]:
        v = l2normalize(self.weight.t() @ self.weight_u)
        return self.weight, torch.linalg.vector_norm(self.weight @ v)

    def forward(self, x: Tensor) -> Tensor:
        weight, sigma = self.compute()
        return F.linear(x, weight) / sigma + self.bias


class HelpedResidual(HelpedDense):
    """The weight is used without its helper as well."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x @ self.weight.t()


class HelpedPenalty(TorchHelpedConv2d):
    """Reads what its helper, torch's own link, keeps."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * cast(Tensor, self.sn._u).norm()


class SNDense(nn.Module):
    """The weight is used raw as well, so it cannot be exchanged for one that is divided."""

    u0: Tensor

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs))
        self.register_buffer("u0", torch.randn(outputs))

    def sn_weight(self) -> Tensor:
        v = l2normalize(self.weight.t() @ self.u0)
        return self.weight / torch.linalg.vector_norm(self.weight @ v)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.sn_weight().t() + 0.1 * (x @ self.weight.t())


class ResidualConv2d(SNConv2d):
    """Overrides forward, and goes on with two others, of which torch's uses the weight raw."""

    def forward(self, x: Tensor) -> Tensor:
        padded = F.pad(x, (0, 1))
        return super().forward(padded) + nn.Conv2d.forward(self, padded)


class PaddedInline(InlineConv2d):
    """The forward that it overrides computes the weight inline, and cannot be exchanged."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(F.pad(input, (0, 1)))


def closed_hook() -> nn.Module:
    """A pre-hook that needs the input, so that it cannot be asked without one."""
    layer = nn.Linear(3, 4)
    weight = layer._parameters.pop("weight")
    layer.register_parameter("weight_orig", weight)
    layer.register_buffer("weight_u", torch.randn(4))

    def hook(module: Any, inputs: Any) -> None:
        u, raw = module.weight_u.to(inputs[0].dtype), module.weight_orig
        module.weight = raw / torch.linalg.vector_norm(l2normalize(raw.t() @ u))

    layer.register_forward_pre_hook(hook)
    return layer


class FollowingHook(SpectralNormConv):
    """Asserts on its input, and then uses it: none that is made up tells the weight."""

    def __call__(self, module: nn.Module, inputs: Any) -> None:
        super().__call__(module, inputs)
        module.weight = cast(Tensor, module.weight) * (0.5 if inputs[0].shape[0] == 1 else 1.0)


SUSPECTS = {
    "overwriting": (
        lambda: OverwritingWrapper(nn.Linear(3, 4)),
        "OverwritingWrapper: 'u' fits the singular vectors of 'module.weight'",
    ),
    "pair": (
        lambda: PairLinear(3, 4),
        "PairLinear: 'weight_u' fits the singular vectors of 'weight'",
    ),
    "helper": (
        lambda: HelpedResidual(3, 4),
        "HelpedResidual: 'u' fits the singular vectors of 'weight'",
    ),
    "torch-helper": (
        lambda: HelpedPenalty(2, 3, 2),
        "HelpedPenalty: '_u' fits the singular vectors of 'weight'",
    ),
    "raw-use": (lambda: SNDense(3, 4), "SNDense: 'u0' fits the singular vectors of 'weight'"),
    "raw-base": (
        lambda: ResidualConv2d(2, 3, 2),
        "ResidualConv2d: 'u0' fits the singular vectors of 'weight'",
    ),
    "inline-base": (
        lambda: PaddedInline(2, 3, 2),
        "PaddedInline: 'u' fits the singular vectors of 'weight'",
    ),
    "prehook": (closed_hook, "Linear: a pre-hook, and 'weight_orig' with 'weight_u'"),
    "operator": (
        lambda: operator_norm(nn.Conv2d(3, 4, 3, padding=1), FollowingHook()),
        "Conv2d: a pre-hook, and 'weight_orig' with 'weight_u'",
    ),
}


@pytest.mark.parametrize("name", SUSPECTS)
def test_what_is_not_known_is_named_and_left_alone(name: str) -> None:
    """find and the block warn once, by name and reason, and the module works inside as before."""
    build, reason = SUSPECTS[name]
    model = nn.Sequential(net("hook"), nn.ModuleDict({"own": build()})).eval()
    text = (
        f"'1.own' ({reason}) looks like a spectral norm that is not known, and is left as it is. "
        "Describe it by an adapter, see sn_export.register_spectral_norm"
    )
    before = fingerprint(model)
    with pytest.warns(SpectralNormNotRecognisedWarning) as caught:
        found = find_spectral_norm(model)
    assert [str(w.message) for w in caught] == [text]
    assert caught[0].filename == __file__
    assert [info.name for info in found] == ["0.conv.weight", "0.head.weight"]
    (suspect,) = find_suspects(model)
    assert suspect.module == "1.own"
    assert f"{suspect.class_name}: {suspect.reason}" == reason
    with pytest.warns(SpectralNormNotRecognisedWarning) as caught, frozen_spectral_norm(model):
        assert list(cast(nn.Module, model[1]).state_dict())
    assert [str(w.message) for w in caught] == [text]
    assert caught[0].filename == __file__
    assert_unchanged(before, model)


def test_a_warning_that_is_an_error_leaves_the_model_alone() -> None:
    """Where warnings are errors, entering fails before anything is changed."""
    model = nn.Sequential(net("parametrization"), PairLinear(3, 4))
    before = fingerprint(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(SpectralNormNotRecognisedWarning), frozen_spectral_norm(model):
            pass
    assert_unchanged(before, model)


def test_many_are_counted() -> None:
    """Five are named, the rest is counted."""
    model = nn.Sequential(*[PairLinear(3, 3) for _ in range(7)])
    left = "and 2 more look like spectral norms that are not known, and are left as they are"
    with pytest.warns(SpectralNormNotRecognisedWarning, match=left):
        find_spectral_norm(model)
    assert all(isinstance(suspect, SpectralNormSuspect) for suspect in find_suspects(model))


def test_a_suspect_that_is_the_model_itself() -> None:
    """The root has no path to be named by."""
    with pytest.warns(SpectralNormNotRecognisedWarning, match=r"^the model itself \(PairLinear: "):
        find_spectral_norm(PairLinear(3, 3))


# ------------------------------------------------------------------ no spectral norm


class VectorQuantizer(nn.Module):
    """A codebook with exponential moving averages, whose shapes fit singular vectors."""

    cluster_size: Tensor
    embed_avg: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(4, 3))
        self.register_buffer("cluster_size", torch.ones(4))
        self.register_buffer("embed_avg", torch.randn(4, 3))

    def codes(self) -> Tensor:
        return self.embedding / self.cluster_size[:, None].sqrt()

    def forward(self, x: Tensor) -> Tensor:
        return self.codes()[torch.cdist(x, self.codes()).argmin(1)]


class EqualizedLinear(nn.Module):
    """The weight times a constant, with one output, where a constant fits a vector of one."""

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, 3))
        self.register_buffer("scale", torch.tensor([1 / math.sqrt(3)]))

    def scaled_weight(self) -> Tensor:
        return self.weight * self.scale

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.scaled_weight())


class WeightNormLinear(nn.Module):
    """Weight norm by hand, one output, all parameters frozen by the user."""

    def __init__(self) -> None:
        super().__init__()
        self.v = nn.Parameter(torch.randn(1, 3), requires_grad=False)
        self.g = nn.Parameter(torch.ones(1), requires_grad=False)

    def weight(self) -> Tensor:
        return self.g * self.v / self.v.norm()

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight())


class SNNLayer(nn.Linear):
    """A spiking neuron: v is a voltage, and nothing here is normalised."""

    def __init__(self) -> None:
        super().__init__(3, 4)
        self.register_buffer("v", torch.zeros(4))

    def charge(self) -> Tensor:
        return cast(Tensor, self.v) * 0.9

    def forward(self, x: Tensor) -> Tensor:
        return (F.linear(x, self.weight, self.bias) + self.charge() > 1).float()


class SpectralConv1d(nn.Module):
    """A layer of a Fourier neural operator."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.randn(3, 4, 2, dtype=torch.cfloat))
        self.register_buffer("modes", torch.arange(2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bix,iox->box", torch.fft.rfft(x)[..., :2], self.weights).abs()


class StandardizedConv2d(nn.Conv2d):
    """Weight standardisation: computed in forward, but no multiple of the weight."""

    def standardized(self) -> Tensor:
        mean = self.weight.mean(dim=(1, 2, 3), keepdim=True)
        return (self.weight - mean) / (self.weight.std(dim=(1, 2, 3), keepdim=True) + 1e-5)

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.standardized(), self.bias)


class SNResBlock(nn.Module):
    """Named after spectral norm, which torch's own hook does in its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = spectral_norm(nn.Conv2d(2, 2, 3, padding=1))
        self.gain = nn.Parameter(torch.ones(2, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gain * cast(Tensor, self.conv(x))


class SNGP(nn.Module):
    """Named after spectral norm, which it has; its random features have shapes that fit vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = spectral_norm(nn.Linear(3, 4))
        self.register_buffer("frequencies", torch.randn(4, 8))
        self.register_buffer("b", torch.rand(8))
        self.beta = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.beta(torch.cos(self.hidden(x) @ self.frequencies + self.b))
        return y


class Masked(nn.Linear):
    """Methods that no look must call, on a layer with a buffer of a fitting shape."""

    calls = 0

    def __init__(self) -> None:
        super().__init__(3, 4)
        self.register_buffer("shift", torch.ones(4))

    def save(self) -> Tensor:
        type(self).calls += 1
        return self.weight

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.save(), cast(Tensor, self.shift))


def low_rank() -> nn.Module:
    """A pre-hook that adds two factors, which are named like vectors and are none."""
    layer = nn.Linear(24, 24)
    weight = layer._parameters.pop("weight")
    layer.register_parameter("weight_orig", weight)
    layer.register_buffer("weight_u", torch.randn(24, 12))
    layer.register_buffer("weight_v", torch.randn(12, 24))

    def hook(module: Any, inputs: Any) -> None:
        module.weight = module.weight_orig + module.weight_u @ module.weight_v

    layer.register_forward_pre_hook(hook)
    return layer


class Scaled(nn.Module):
    """Normalises by a vector that is named so, beside a parameter that is no matrix."""

    def __init__(self, parameter: Tensor) -> None:
        super().__init__()
        self.gain = nn.Parameter(parameter, requires_grad=False)
        self.register_buffer("u", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * F.normalize(x * cast(Tensor, self.u))


class Tagged(nn.BatchNorm2d):
    """A subclass of torch's that adds nothing."""


INNOCENT = {
    "codebook": VectorQuantizer,
    "equalized": EqualizedLinear,
    "weight-norm": WeightNormLinear,
    "spiking": SNNLayer,
    "fourier": SpectralConv1d,
    "standardized": lambda: StandardizedConv2d(2, 3, 3),
    "block": SNResBlock,
    "features": SNGP,
    "masked": Masked,
    "low-rank": low_rank,
    "batch-norm": lambda: Tagged(4),
    "scaled by a vector": lambda: Scaled(torch.ones(4)),
    "scaled by integers": lambda: Scaled(torch.ones(4, 3, dtype=torch.int)),
    "scaled by nothing": lambda: Scaled(torch.ones(4, 0)),
    "attention": lambda: nn.TransformerEncoderLayer(4, 2, 8),
    "lstm": lambda: nn.LSTM(3, 4, proj_size=2),
    "bilinear": lambda: nn.Bilinear(3, 3, 1),
}


@pytest.mark.parametrize("name", INNOCENT)
def test_ordinary_modules_are_neither_claimed_nor_suspected(name: str) -> None:
    """Modules without spectral norm of their own are not found, not warned of, not called."""
    model = nn.Sequential(cast(Any, INNOCENT[name])())
    before = fingerprint(model)
    classes = [type(module) for module in model.modules()]
    found = find_spectral_norm(model)
    assert {info.kind for info in found} <= {"hook"}
    assert find_suspects(model) == []
    with frozen_spectral_norm(model):
        assert [type(module) for module in model.modules()] == classes
    assert_unchanged(before, model)
    assert Masked.calls == 0


@pytest.mark.parametrize("kind", KINDS)
def test_torchs_own_kinds_are_not_suspected(kind: str) -> None:
    """Every kind of torch's, frozen or not, and inside a model of the user's, is no suspect."""
    model = nn.Sequential(net(kind))
    assert find_suspects(model) == []
    with frozen_spectral_norm(model):
        assert find_suspects(model) == []


def test_frozen_handwritten_layers_are_not_suspected() -> None:
    """Inside a block, nested blocks have nothing to say about what the outer one froze."""
    layers = [Wrapper(nn.Conv2d(1, 2, 2)), SNConv2d(2, 2, 2), InlineConv2d(2, 2, 2)]
    model = nn.Sequential(*layers)
    with frozen_spectral_norm(model), frozen_spectral_norm(model):
        assert find_suspects(model) == []
        assert find_spectral_norm(model) == []


def test_suspects_work_inside_as_outside() -> None:
    """What is left as it is goes on computing its own weight, bit for bit."""
    model = nn.Sequential(PairLinear(3, 4)).eval()
    x = torch.randn(2, 3)
    expected = model(x)
    with pytest.warns(SpectralNormNotRecognisedWarning), frozen_spectral_norm(model):
        assert same_bits(model(x), expected)
