"""Networks as vocoders and speech models have them: weight norm, mixed with spectral norm."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from cli_networks import APPLY, Kind
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.weight_norm import WeightNorm


def _weight_norm_hook(module: nn.Module, dim: int | None = 0) -> nn.Module:
    WeightNorm.apply(module, "weight", dim)  # type: ignore[arg-type]  # without its deprecation
    return module


WEIGHT_NORM: dict[str, Callable[..., Any]] = {
    "plain": lambda module, **options: module,
    "hook": _weight_norm_hook,
    "parametrization": parametrizations.weight_norm,
}


class Generator(nn.Module):
    """A small generator of HiFi-GAN: convolutions, transposed ones, a last one of one channel."""

    def __init__(self, kind: Kind = "hook") -> None:
        super().__init__()
        norm = WEIGHT_NORM[kind]
        self.conv_pre = norm(nn.Conv1d(4, 8, 7, padding=3))
        self.ups = nn.ModuleList([norm(nn.ConvTranspose1d(8, 4, 4, 2, padding=1))])
        self.conv_post = norm(nn.Conv1d(4, 1, 7, padding=3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_pre(x)
        for up in self.ups:
            x = up(F.leaky_relu(x, 0.1))
        return torch.tanh(self.conv_post(F.leaky_relu(x)))


class Scale(nn.Module):
    """One scale of HiFi-GAN's discriminators; its last weight fits several dims of weight norm."""

    def __init__(self, norm: Callable[..., Any]) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            [norm(nn.Conv2d(1, 4, (5, 1), (3, 1), (2, 0))), norm(nn.Conv2d(4, 6, (5, 1)))]
        )
        self.conv_post = norm(nn.Conv2d(6, 1, (3, 1), padding=(1, 0)))

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = F.leaky_relu(conv(x), 0.1)
        return torch.flatten(self.conv_post(x), 1)


class Discriminators(nn.Module):
    """Spectral norm on the first scale and weight norm on the others, as HiFi-GAN has it."""

    def __init__(self, kind: Kind = "hook") -> None:
        super().__init__()
        norms: Sequence[Callable[..., Any]] = (APPLY[kind], WEIGHT_NORM[kind])
        self.discriminators = nn.ModuleList(Scale(norm) for norm in norms)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([one(x) for one in self.discriminators], 1)


class Position(nn.Module):
    """The positional convolution of wav2vec and HuBERT, with its weight norm along ``dim``."""

    def __init__(self, kind: Kind = "hook", dim: int | None = 2) -> None:
        super().__init__()
        self.conv = WEIGHT_NORM[kind](nn.Conv1d(8, 8, 4, padding=2, groups=2), dim=dim)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.conv(x)[..., :-1])


class Whole(Position):
    """The same with one norm for the whole weight."""

    def __init__(self, kind: Kind = "hook") -> None:
        super().__init__(kind, None)


NETWORKS: dict[str, tuple[Callable[[Kind], nn.Module], tuple[int, ...]]] = {
    "generator": (Generator, (2, 4, 6)),
    "discriminators": (Discriminators, (2, 1, 20, 2)),
    "position": (Position, (2, 8, 6)),
    "whole": (Whole, (2, 8, 6)),
}
