"""Bounds of the spectral norm from the literature, each with small layers of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from networks import seed_torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


def transfer_matrices(kernel: Tensor, size: int = 5) -> Tensor:
    """The matrices of a circular convolution in the Fourier domain."""
    return torch.fft.fft2(kernel, (size, size)).permute(2, 3, 0, 1)


class FFTConv2d(nn.Conv2d):
    """Sedghi, Gupta, Long 2019: the exact norm of a circular convolution, anew in each forward."""

    def sigma(self) -> Tensor:
        return torch.linalg.svdvals(transfer_matrices(self.weight)).amax()

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight / self.sigma(), self.bias)


class FFTLink(nn.Module):
    """The same as a parametrization."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight / torch.linalg.svdvals(transfer_matrices(weight)).amax()


def gram_iteration(matrix: Tensor, steps: int = 4) -> Tensor:
    """Delattre et al. 2023: a bound that falls with each squaring, by Frobenius norms."""
    rescaling = matrix.new_zeros((), dtype=torch.float32)
    for _ in range(steps):
        norm = torch.linalg.matrix_norm(matrix).amax()
        matrix = matrix / norm
        rescaling = 2 * rescaling + 2 * norm.log()
        matrix = matrix.mH @ matrix
    largest = torch.linalg.matrix_norm(matrix).amax()
    return ((largest.log() + rescaling) / 2**steps).exp()


class GramConv2d(nn.Conv2d):
    def normalised(self) -> Tensor:
        return self.weight / gram_iteration(transfer_matrices(self.weight))

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.normalised(), self.bias)


class GramLink(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / gram_iteration(weight.flatten(1))


class ConvexPotentialLayer(nn.Module):
    """CPL, Meunier et al. 2022: x - 2 / sigma^2 W^T relu(W x + b), with u kept."""

    u: Tensor

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(inner, width))
        self.bias = nn.Parameter(torch.zeros(inner))
        self.register_buffer("u", F.normalize(torch.randn(width), dim=0))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            v = F.normalize(self.kernel @ self.u, dim=0)
            u = F.normalize(self.kernel.t() @ v, dim=0)
            if self.training:
                self.u.copy_(u)
        h = 2 / (v @ self.kernel @ u) ** 2
        return x - h * F.relu(F.linear(x, self.kernel, self.bias)) @ self.kernel


class SDPBasedLipschitzLinear(nn.Module):
    """SLL, Araujo et al. 2023: a diagonal from the row sums of |W W^T|; no vectors."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inner, width))
        self.bias = nn.Parameter(torch.zeros(inner))
        self.q = nn.Parameter(torch.randn(inner))

    def forward(self, x: Tensor) -> Tensor:
        q = self.q.exp()
        t = 2 / ((self.weight @ self.weight.t()).abs() * q / q[:, None]).sum(1)
        return x - (t * F.relu(F.linear(x, self.weight, self.bias))) @ self.weight


class AOLLinear(nn.Linear):
    """Almost orthogonal, Prach and Lampert 2022: columns divided by a bound each."""

    def forward(self, x: Tensor) -> Tensor:
        scale = (self.weight.t() @ self.weight).abs().sum(0).rsqrt()
        return F.linear(x, self.weight * scale, self.bias)


class GroupedConv2d(nn.Conv2d):
    """Each group of a convolution has its norm and its vector."""

    u: Tensor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        rows = self.out_channels // self.groups
        self.register_buffer("u", F.normalize(torch.randn(self.groups, rows, 1), dim=1))

    def normalised(self) -> Tensor:
        matrices = self.weight.view(self.groups, -1, self.weight[0].numel())
        with torch.no_grad():
            v = F.normalize(matrices.mT @ self.u, dim=1)
            if self.training:
                self.u.copy_(F.normalize(matrices @ v, dim=1))
        sigma = torch.linalg.vector_norm(matrices @ v, dim=1, keepdim=True)
        return (matrices / sigma).view_as(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.normalised(), self.bias)


class HeadedLinear(nn.Linear):
    """Each head of a projection has its norm; vectors in one tensor, inline in the forward."""

    u: Tensor
    v: Tensor

    def __init__(self, inputs: int, outputs: int, heads: int = 2) -> None:
        super().__init__(inputs, outputs)
        self.heads = heads
        self.register_buffer("u", torch.randn(heads, outputs // heads, 1))
        self.register_buffer("v", torch.randn(heads, inputs, 1))

    def forward(self, x: Tensor) -> Tensor:
        heads = self.weight.view(self.heads, -1, self.in_features)
        if self.training:
            with torch.no_grad():
                self.v.copy_(F.normalize(heads.mT @ self.u, dim=1))
                self.u.copy_(F.normalize(heads @ self.v, dim=1))
        sigma = self.u.mT @ heads @ self.v
        return F.linear(x, (heads / sigma).view_as(self.weight), self.bias)


class ProjectedLinear(nn.Linear):
    """Query, key and value in one weight, each with its norm; a plural names their vectors."""

    us: Tensor

    def __init__(self, size: int) -> None:
        super().__init__(size, 3 * size)
        self.register_buffer("us", F.normalize(torch.randn(3, size), dim=1))

    def forward(self, x: Tensor) -> Tensor:
        parts = []
        for index, part in enumerate(self.weight.chunk(3)):
            with torch.no_grad():
                v = F.normalize(part.mT @ self.us[index], dim=0)
                u = F.normalize(part @ v, dim=0)
                if self.training:
                    self.us[index] = u
            parts.append(part / torch.dot(u, part @ v))
        return F.linear(x, torch.cat(parts), self.bias)


class HeadedLink(nn.Module):
    """The same as a parametrization."""

    u: Tensor

    def __init__(self, heads: int, rows: int) -> None:
        super().__init__()
        self.register_buffer("u", F.normalize(torch.randn(heads, rows, 1), dim=1))

    def forward(self, weight: Tensor) -> Tensor:
        heads = weight.view(len(self.u), -1, weight.shape[-1])
        v = F.normalize(heads.detach().mT @ self.u, dim=1)
        if self.training:
            self.u.copy_(F.normalize(heads.detach() @ v, dim=1))
        return (heads / torch.linalg.vector_norm(heads @ v, dim=1, keepdim=True)).view_as(weight)


class SoftLinear(nn.Linear):
    """Soft: divided by sigma where that is above a bound, in the way of i-ResNet."""

    weight_u: Tensor

    def __init__(self, inputs: int, outputs: int, bound: float = 0.9) -> None:
        super().__init__(inputs, outputs)
        self.bound = bound
        self.register_buffer("weight_u", F.normalize(torch.randn(outputs), dim=0))

    def bounded(self) -> Tensor:
        v = F.normalize(self.weight.detach().t() @ self.weight_u, dim=0)
        sigma = torch.linalg.vector_norm(self.weight @ v)
        return self.weight / torch.clamp(sigma / self.bound, min=1.0)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.bounded(), self.bias)


class ScaledLinear(SoftLinear):
    """A learned scale: of sigma that is divided by, the network learns how much to have."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.gamma = nn.Parameter(torch.tensor(0.7))

    def bounded(self) -> Tensor:
        v = F.normalize(self.weight.detach().t() @ self.weight_u, dim=0)
        return self.weight * (self.gamma / torch.linalg.vector_norm(self.weight @ v))


class LipschitzLinear(nn.Linear):
    """Liu et al. 2022: rows bounded by a learned constant, in the infinity norm."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.c = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        scale = (F.softplus(self.c) / self.weight.abs().sum(1)).clamp(max=1)
        return F.linear(x, self.weight * scale[:, None], self.bias)


class FantasticFourConv2d(nn.Conv2d):
    """Singla and Feizi 2021: the least of the norms of four unfoldings, with vectors of each."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for i, matrix in enumerate(self.unfoldings()):
            self.register_buffer(f"u{i}", torch.randn(matrix.shape[0]))

    def unfoldings(self) -> list[Tensor]:
        w = self.weight
        orders = [(0, 1, 2, 3), (1, 0, 2, 3), (0, 2, 1, 3), (0, 3, 1, 2)]
        return [
            w.permute(order).reshape(w.shape[order[0]] * w.shape[order[1]], -1)
            if i > 1
            else w.permute(order).flatten(1)
            for i, order in enumerate(orders)
        ]

    def normalised(self) -> Tensor:
        sigmas = []
        for i, matrix in enumerate(self.unfoldings()):
            u = cast(Tensor, getattr(self, f"u{i}"))
            v = F.normalize(matrix.detach().t() @ u, dim=0)
            if self.training:
                u.copy_(F.normalize(matrix.detach() @ v, dim=0))
            sigmas.append(torch.linalg.vector_norm(matrix @ v))
        return self.weight / torch.stack(sigmas).amin()

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.normalised(), self.bias)


class AveragedLinear(nn.Linear):
    """Keeps a running mean of sigma and no vectors."""

    sigma: Tensor

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.register_buffer("sigma", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.sigma.lerp_(torch.linalg.matrix_norm(self.weight, 2), 0.1)
        return F.linear(x, self.weight / self.sigma, self.bias)


class Iteration(nn.Module):
    """The batched power iteration of AOC and BCOP, with its vectors in parameters."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.u = nn.Parameter(torch.randn(*shape[:-1], 1), requires_grad=False)

    def forward(self, weight: Tensor) -> Tensor:
        with torch.no_grad():
            v = F.normalize(weight.mT @ self.u, dim=-2)
            u = F.normalize(weight @ v, dim=-2)
            if self.training:
                self.u.copy_(u)
        return weight / (u.mT @ weight @ v)


class BlockOrthogonal(nn.Module):
    """AOC, Boissin et al. 2025: Bjoerck on a batch of matrices, folded into one kernel."""

    def forward(self, weight: Tensor) -> Tensor:
        for _ in range(3):
            weight = 1.5 * weight - 0.5 * weight @ weight.mT @ weight
        first, second = weight[:2]
        return torch.stack([first @ second, first @ second.mT], -1)[..., None]


def linked(layer: nn.Module, *links: nn.Module) -> nn.Module:
    for link in links:
        parametrize.register_parametrization(layer, "weight", link, unsafe=True)
    return layer


class Kernel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight)


@dataclass(frozen=True)
class Variant:
    """A layer, and whether the block freezes it; what it does not freeze has to be named."""

    build: Callable[[], nn.Module]
    is_found: bool = True
    is_image: bool = False

    def make(self) -> nn.Module:
        seed_torch(0)
        return self.build()

    def x(self) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        shape = (2, 3, 5, 5) if self.is_image else (4, 3)
        return torch.randn(shape, generator=generator)


VARIANTS: dict[str, Variant] = {
    "fft-conv": Variant(lambda: FFTConv2d(3, 4, 3), is_image=True),
    "fft-link": Variant(lambda: linked(nn.Conv2d(3, 4, 3), FFTLink()), is_image=True),
    "gram-conv": Variant(lambda: GramConv2d(3, 4, 3), is_image=True),
    "gram-link": Variant(lambda: linked(nn.Linear(3, 4), GramLink())),
    "aoc": Variant(lambda: linked(Kernel(), Iteration(2, 3, 3), BlockOrthogonal()), is_image=True),
    "cpl": Variant(lambda: ConvexPotentialLayer(3, 5), is_found=False),
    "sll": Variant(lambda: SDPBasedLipschitzLinear(3, 5), is_found=False),
    "aol": Variant(lambda: AOLLinear(3, 4), is_found=False),
    "lipschitz-rows": Variant(lambda: LipschitzLinear(3, 4), is_found=False),
    "per-group": Variant(lambda: GroupedConv2d(3, 6, 3, groups=3), is_image=True),
    "per-head": Variant(lambda: HeadedLinear(3, 4)),
    "per-projection": Variant(lambda: ProjectedLinear(3)),
    "per-head-link": Variant(lambda: linked(nn.Linear(3, 4), HeadedLink(2, 2))),
    "soft": Variant(lambda: SoftLinear(3, 4, 0.3)),
    "soft-below": Variant(lambda: SoftLinear(3, 4, 30.0)),
    "learned-scale": Variant(lambda: ScaledLinear(3, 4)),
    "fantastic-four": Variant(lambda: FantasticFourConv2d(3, 4, 3), is_image=True),
    "running-sigma": Variant(lambda: AveragedLinear(3, 4)),
}
