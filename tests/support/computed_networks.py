"""Networks that compute their weights inside forward, where no hook or parametrization shows."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _iterate(matrix: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    v = F.normalize(u @ matrix, dim=1)
    u = F.normalize(v @ matrix.t(), dim=1)
    return (v @ matrix.t() @ u.t()).squeeze(), u, v


class MixinConv(nn.Conv2d):
    """The BigGAN lineage: a method gives W / sigma, and writes the buffers in train mode."""

    always = False  # whether eval mode iterates too

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_buffer("u0", torch.randn(1, self.weight.shape[0]))
        self.register_buffer("sv0", torch.ones(1))

    def W_(self) -> Tensor:
        matrix = self.weight.view(self.weight.shape[0], -1)
        sigma, u, _ = _iterate(matrix, self.u0)
        if self.training or self.always:
            with torch.no_grad():
                self.u0[:] = u
                self.sv0[:] = sigma
        return self.weight / sigma

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.W_(), self.bias, self.stride, self.padding)


class IteratingConv(MixinConv):
    """A variant that writes its buffers in eval mode too."""

    always = True


class InlineLinear(nn.Module):
    """A spectral norm written out in forward, with names of its own."""

    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(outer, inner) / 4)
        self.offset = nn.Parameter(torch.zeros(outer))
        self.register_buffer("left", torch.randn(1, outer))

    def forward(self, x: Tensor) -> Tensor:
        sigma, _, _ = _iterate(self.kernel, self.left)
        return F.linear(x, self.kernel / sigma, self.offset)


class StandardisedConv(nn.Conv2d):
    """Weight standardisation: each filter has mean 0 and variance 1."""

    def forward(self, x: Tensor) -> Tensor:
        mean = self.weight.mean(dim=(1, 2, 3), keepdim=True)
        std = self.weight.std(dim=(1, 2, 3), keepdim=True)
        return F.conv2d(x, (self.weight - mean) / (std + 1e-5), self.bias, padding=self.padding)


class EqualisedConv(nn.Conv2d):
    """Equalised learning rate: a constant times the weight."""

    def forward(self, x: Tensor) -> Tensor:
        gain = (self.weight.shape[1] * self.weight.shape[2] ** 2) ** -0.5
        return F.conv2d(x, self.weight * gain, self.bias, padding=self.padding)


class DemodulatedConv(nn.Conv2d):
    """Style modulation and demodulation: the weight depends on the input."""

    def forward(self, x: Tensor) -> Tensor:
        style = 1 + x.mean(dim=(0, 2, 3)).view(1, -1, 1, 1)
        weight = self.weight * style
        weight = weight * torch.rsqrt(weight.square().sum(dim=(1, 2, 3), keepdim=True) + 1e-8)
        return F.conv2d(x, weight, self.bias, padding=self.padding)


class Tied(nn.Module):
    """One normalised weight computed once and used twice, and one computed in two places."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.conv = MixinConv(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.conv.W_()
        x = F.conv2d(F.conv2d(x, weight, padding=1).relu(), weight, padding=1)
        y: Tensor = self.conv(x)
        return y


def stack(layer: type[nn.Conv2d], narrow: int = 64, wide: int = 256) -> nn.Sequential:
    """Conv-ReLU-Conv of the sizes that real generators have."""
    return nn.Sequential(
        layer(narrow, wide, 3, padding=1), nn.ReLU(), layer(wide, narrow, 3, padding=1)
    )
