"""Small networks for the tests: spectral norm of every kind on modules of every kind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.spectral_norm import SpectralNorm, spectral_norm

Apply = Callable[..., nn.Module]


class Scale(nn.Module):
    """A parametrization with a parameter and a buffer of its own."""

    offset: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(1.25))
        self.register_buffer("offset", torch.tensor(0.5))

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.factor.to(weight.dtype) + self.offset.to(weight.dtype)


class Noise(nn.Module):
    """A parametrization that draws a random number in train mode and counts its calls."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, weight: Tensor) -> Tensor:
        self.calls += 1
        return weight + 0.01 * torch.randn(()).to(weight.dtype) if self.training else weight


class SoftSpectralNorm(SpectralNorm):
    """Divides only where sigma is above a bound, and logs sigma in a buffer, also in eval."""

    bound = 0.5

    def compute_weight(self, module: nn.Module, do_power_iteration: bool) -> Tensor:
        super().compute_weight(module, do_power_iteration)
        weight = cast(Tensor, getattr(module, self.name + "_orig"))
        u, v = getattr(module, self.name + "_u"), getattr(module, self.name + "_v")
        sigma = torch.dot(u, torch.mv(self.reshape_weight_to_matrix(weight), v))
        with torch.no_grad():
            getattr(module, self.name + "_sigma").copy_(sigma)
        return weight / torch.clamp(sigma / self.bound, min=1)


def soft_spectral_norm(module: nn.Module, name: str = "weight", **options: Any) -> nn.Module:
    """Apply `SoftSpectralNorm` the way such subclasses are applied in the wild."""
    weight = cast(Tensor, getattr(module, name))
    spectral_norm(module, name, **options)
    module.register_buffer(name + "_sigma", weight.new_ones(()))
    for key, hook in module._forward_pre_hooks.items():
        if isinstance(hook, SpectralNorm) and hook.name == name:
            soft = SoftSpectralNorm(name, hook.n_power_iterations, hook.dim, hook.eps)
            module._forward_pre_hooks[key] = soft
    return module


def seed_torch(seed: int) -> None:
    """Seed the CPU generator alone: `torch.manual_seed` looks for accelerators each time."""
    torch.default_generator.manual_seed(seed)


def _chain(*links: str) -> Apply:
    def apply(module: nn.Module, name: str = "weight", **options: Any) -> nn.Module:
        for link in links:
            if link == "sn":
                parametrizations.spectral_norm(module, name, **options)
            elif link == "weight_norm":
                parametrizations.weight_norm(module, name)
            else:
                other = Scale() if link == "scale" else Noise()
                parametrize.register_parametrization(module, name, other)
        return module

    return apply


KINDS: dict[str, Apply] = {
    "hook": spectral_norm,
    "subclass": soft_spectral_norm,
    "parametrization": parametrizations.spectral_norm,
    "chain-first": _chain("sn", "scale"),
    "chain-last": _chain("scale", "sn"),
    "chain-middle": _chain("noise", "sn", "scale"),
    "chain-weight-norm": _chain("weight_norm", "sn"),
    "chain-twice": _chain("sn", "noise", "sn"),
}
HOOKS = ("hook", "subclass")
# The same network without spectral norm, and under each of torch's two kinds.
APPLY: dict[str, Apply] = {
    "plain": lambda module, name="weight", **options: module,
    "hook": spectral_norm,
    "parametrization": parametrizations.spectral_norm,
}
# A vector has no u and v, and weight_norm and Scale are for real matrices.
MATRIX_ONLY = ("chain-weight-norm",)


class Custom(nn.Module):
    """A plain module whose parameter has a name of its own, beside a bias and a buffer."""

    shift: Tensor

    def __init__(self, shape: tuple[int, ...] = (4, 3)) -> None:
        super().__init__()
        self.label = "custom"
        self.first = nn.Parameter(torch.randn(shape[0]))
        self.kernel = nn.Parameter(torch.randn(shape))
        self.register_buffer("shift", torch.randn(shape[0]))

    def forward(self, x: Tensor) -> Tensor:
        product = x @ self.kernel.t() if self.kernel.ndim > 1 else x * self.kernel
        return product * self.first + self.shift


@dataclass(frozen=True)
class Case:
    """A module without spectral norm, the tensors to put under it, and example inputs."""

    build: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Tensor, ...]]
    tensors: tuple[str, ...] = ("weight",)
    options: dict[str, Any] = field(default_factory=dict)
    kinds: tuple[str, ...] = tuple(KINDS)
    kwargs: dict[str, Any] = field(default_factory=dict)

    def make(self, kind: str, seed: int = 0) -> nn.Module:
        """Build the module with every tensor under spectral norm of ``kind``."""
        seed_torch(seed)
        module = self.build()
        for tensor in self.tensors:
            KINDS[kind](module, tensor, **self.options)
        return module

    def plain(self) -> nn.Module:
        """Build the module that never had spectral norm."""
        seed_torch(0)
        return self.build()

    def run(self, module: nn.Module) -> tuple[Tensor, ...]:
        """Return the tensors that ``module`` computes from inputs that are always the same."""
        generator = torch.get_rng_state()
        seed_torch(7)
        inputs = self.inputs()
        torch.set_rng_state(generator)
        return tensors_of(module(*inputs, **self.kwargs))


def tensors_of(outputs: Any) -> tuple[Tensor, ...]:
    """Flatten nested outputs into their tensors."""
    if isinstance(outputs, Tensor):
        return (outputs,)
    if isinstance(outputs, (tuple, list)):
        return tuple(t for output in outputs for t in tensors_of(output))
    return ()


def _randn(*shape: int, dtype: torch.dtype | None = None) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (torch.randn(shape, dtype=dtype),)


def _sequence() -> tuple[Tensor, ...]:
    return (torch.randn(3, 2, 4),)


def _attention() -> tuple[Tensor, ...]:
    x = torch.randn(3, 2, 4)
    return x, x, x


def _linear(dtype: torch.dtype) -> Case:
    kinds = tuple(KINDS) if not dtype.is_complex else ("hook", "parametrization", "chain-last")
    return Case(lambda: nn.Linear(3, 4, dtype=dtype), _randn(2, 3, dtype=dtype), kinds=kinds)


def _channels_last() -> nn.Module:
    return nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


_NO_WEIGHT_NORM = tuple(kind for kind in KINDS if kind not in MATRIX_ONLY)

CASES: dict[str, Case] = {
    "linear": Case(lambda: nn.Linear(3, 4), _randn(2, 3)),
    "linear-no-bias": Case(lambda: nn.Linear(3, 4, bias=False), _randn(2, 3)),
    "conv1d": Case(lambda: nn.Conv1d(3, 4, 2), _randn(2, 3, 5)),
    "conv2d": Case(lambda: nn.Conv2d(3, 4, 2), _randn(2, 3, 4, 4)),
    "conv3d": Case(lambda: nn.Conv3d(3, 4, 2), _randn(2, 3, 3, 3, 3)),
    "conv-transpose1d": Case(lambda: nn.ConvTranspose1d(3, 4, 2), _randn(2, 3, 5)),
    "conv-transpose2d": Case(lambda: nn.ConvTranspose2d(3, 4, 2), _randn(2, 3, 3, 3)),
    "conv-transpose3d": Case(lambda: nn.ConvTranspose3d(3, 4, 2), _randn(2, 3, 2, 2, 2)),
    "embedding": Case(lambda: nn.Embedding(5, 3), lambda: (torch.arange(4),)),
    "bilinear": Case(lambda: nn.Bilinear(3, 2, 4), lambda: (torch.randn(2, 3), torch.randn(2, 2))),
    "lstm": Case(
        lambda: nn.LSTM(4, 3, bidirectional=True),
        _sequence,
        ("weight_hh_l0", "weight_hh_l0_reverse"),
    ),
    "gru": Case(lambda: nn.GRU(4, 3, num_layers=2), _sequence, ("weight_ih_l0", "weight_hh_l1")),
    "attention": Case(
        lambda: nn.MultiheadAttention(4, 2),
        _attention,
        ("in_proj_weight",),
        kwargs={"need_weights": False},
    ),
    "custom": Case(Custom, _randn(2, 3), ("kernel",)),
    "custom-vector": Case(lambda: Custom((3,)), _randn(2, 3), ("kernel",), kinds=_NO_WEIGHT_NORM),
    "several": Case(Custom, _randn(2, 3), ("first", "kernel"), kinds=_NO_WEIGHT_NORM),
    "options": Case(
        lambda: nn.Conv2d(3, 4, 2),
        _randn(2, 3, 4, 4),
        options={"dim": 1, "eps": 1e-4, "n_power_iterations": 3},
    ),
    "channels-last": Case(_channels_last, _randn(2, 3, 4, 4)),
    "float16": _linear(torch.float16),
    "bfloat16": _linear(torch.bfloat16),
    "float64": _linear(torch.float64),
    "complex64": _linear(torch.complex64),
}
PAIRS = [(kind, name) for name, case in CASES.items() for kind in case.kinds]
# What happened to the model, and the mode it is in.
MOMENTS = [("new", "train"), ("trained", "train"), ("trained", "eval"), ("loaded", "eval")]


def bring_to(state: str, model: nn.Module, kind: str, case: Case) -> None:
    """Bring a new model, in place, into a state that real models are found in."""
    if state == "trained":
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        for _ in range(2):
            optimizer.zero_grad()
            torch.stack([t.abs().sum() for t in case.run(model)]).sum().backward()
            optimizer.step()
    elif state == "loaded":
        case.run(model)
        model.load_state_dict(case.make(kind, seed=1).state_dict())


def raw(module: nn.Module, kind: str, tensor: str = "weight") -> nn.Parameter:
    """Return the parameter that the optimizer sees behind ``tensor``."""
    if kind in HOOKS:
        return cast(nn.Parameter, module._parameters[tensor + "_orig"])
    return cast(nn.Parameter, next(module.parametrizations[tensor].parameters()))  # type: ignore[index,union-attr]


class Net(nn.Module):
    """A small convolutional network with normalisation, dropout and two spectral norms."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3)
        self.norm = nn.BatchNorm2d(3)
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(12, 2)
        KINDS[kind](self.conv)
        KINDS[kind](self.head)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.norm(self.conv(x)))
        return cast(Tensor, self.head(self.drop(hidden).flatten(1)))


def net(kind: str, seed: int = 0) -> Net:
    """Build `Net`, the same one for the same seed."""
    seed_torch(seed)
    return Net(kind)


def images(seed: int = 3) -> Tensor:
    """Return a batch for `Net` without touching the global generator."""
    return torch.randn(5, 1, 4, 4, generator=torch.Generator().manual_seed(seed))
