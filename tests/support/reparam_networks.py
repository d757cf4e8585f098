"""Modules under every reparametrization of torch but spectral norm, and under some of one's own."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from networks import CASES, Case, Noise, Scale, seed_torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils.weight_norm import weight_norm

Apply = Callable[[nn.Module, str], nn.Module]


class Product(nn.Module):
    """Two original tensors, one of which is trained in vain."""

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return left * right

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        return weight, torch.full_like(weight, 0.75)


class Cut(nn.Module):
    """Another shape and dtype than the original's, which only ``unsafe`` allows."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight[:2].double()


class Dropped(nn.Module):
    """Draws a random mask in every forward pass, also in eval mode."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight * (torch.rand_like(weight) > 0.5)


def hooked(module: nn.Module, name: str = "weight") -> nn.Module:
    """Apply `torch.nn.utils.weight_norm`, which says that it is old."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return weight_norm(module, name)


def registered(*links: Callable[[], nn.Module], unsafe: bool = False) -> Apply:
    """Return what registers a chain of parametrizations."""

    def apply(module: nn.Module, name: str = "weight") -> nn.Module:
        for link in links:
            parametrize.register_parametrization(module, name, link(), unsafe=unsafe)
        return module

    return apply


def pruned(module: nn.Module, name: str = "weight") -> nn.Module:
    """Apply one pruning mask."""
    return prune.l1_unstructured(module, name, 0.4)


def pruned_twice(module: nn.Module, name: str = "weight") -> nn.Module:
    """Apply two pruning masks, which torch keeps in a container."""
    prune.random_unstructured(module, name, 0.3)
    return prune.ln_structured(module, name, 0.5, n=2, dim=0)


REPARAMETRIZATIONS: dict[str, tuple[str, Apply]] = {
    "weight_norm hook": ("weight_norm", hooked),
    "weight_norm": ("weight_norm", parametrizations.weight_norm),
    "orthogonal": ("orthogonal", parametrizations.orthogonal),
    "orthogonal in a chain": ("orthogonal", registered(Scale)),
    "two originals": ("parametrization", registered(Product)),
    "chain": ("parametrization", registered(Noise, Scale)),
    "pruned": ("pruning", pruned),
    "pruned twice": ("pruning", pruned_twice),
}


def reparametrize(how: str, module: nn.Module, name: str = "weight") -> nn.Module:
    """Put a tensor under one of `REPARAMETRIZATIONS`."""
    if how == "orthogonal in a chain":
        parametrizations.orthogonal(module, name)
    return REPARAMETRIZATIONS[how][1](module, name)


NAMES = (
    "linear",
    "linear-no-bias",
    "conv2d",
    "conv-transpose2d",
    "embedding",
    "bilinear",
    "lstm",
    "gru",
    "attention",
    "custom",
    "channels-last",
    "float64",
    "float16",
    "bfloat16",
)
# By torch: masks are chosen from a view that only contiguous tensors have, and there is no
# Householder product of half precision.
UNSUPPORTED = {
    *((how, "channels-last") for how in ("pruned", "pruned twice")),
    *((how, n) for how in REPARAMETRIZATIONS for n in ("float16", "bfloat16") if "ortho" in how),
}
PAIRS = [
    (how, name) for how in REPARAMETRIZATIONS for name in NAMES if (how, name) not in UNSUPPORTED
]


def make(how: str, name: str, seed: int = 0) -> tuple[nn.Module, Case]:
    """Build a case of `networks.CASES` with its tensors under a reparametrization."""
    case = CASES[name]
    seed_torch(seed)
    module = case.build()
    for tensor in case.tensors:
        reparametrize(how, module, tensor)
    return module, case


class Mixed(nn.Module):
    """One layer of each kind, and two kinds on one module."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = parametrizations.spectral_norm(nn.Linear(3, 4))
        self.turn = parametrizations.orthogonal(nn.Linear(4, 4))
        self.old = hooked(nn.Linear(4, 4))
        self.scaled = registered(Scale)(nn.Linear(4, 4), "weight")
        self.sparse = pruned(nn.Linear(4, 4))
        self.memory = nn.GRU(4, 4)
        hooked(self.memory, "weight_hh_l0")
        nn.utils.spectral_norm(self.memory, "weight_ih_l0")

    def forward(self, x: Tensor) -> Tensor:
        x = self.sparse(self.scaled(self.old(self.turn(self.norm(x)))))
        y: Tensor = self.memory(x)[0]
        return y


KIND_OF = {
    "norm.weight": "spectral_norm",
    "turn.weight": "orthogonal",
    "old.weight": "weight_norm",
    "scaled.weight": "parametrization",
    "sparse.weight": "pruning",
    "memory.weight_ih_l0": "spectral_norm",
    "memory.weight_hh_l0": "weight_norm",
}


def mixed(seed: int = 0) -> Mixed:
    """Build `Mixed`, the same one for the same seed."""
    seed_torch(seed)
    return Mixed().eval()
