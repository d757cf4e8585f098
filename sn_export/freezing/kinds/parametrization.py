"""`torch.nn.utils.parametrizations.spectral_norm`, anywhere in a chain of parametrizations."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import _SpectralNorm

from ...preserving import without_trace
from ...sigma import stored_sigma
from ..site import Group, SpectralNormInfo
from .chain import ChainSite, chains
from .link import asked_sigma, is_spectral_norm


class ParametrizationSite(ChainSite):
    """A tensor computed by a chain with spectral norm in it; the whole chain counts."""

    __slots__ = ()
    group: Group = "spectral_norm"

    def describe(self) -> SpectralNormInfo:
        """Return what `find_spectral_norm` lists; sigma is that of the chain's first SN."""
        norm = self._norm()
        weight = self._input_of(norm)
        return self.norm_info(
            weight,
            dim=getattr(norm, "dim", 0),
            eps=getattr(norm, "eps", None),
            n_power_iterations=getattr(norm, "n_power_iterations", None),
            sigma=_sigma(norm, weight),
        )

    def matrix(self) -> Tensor | None:
        """Return what the chain's first SN normalises, a vector as one row."""
        norm = self._norm()
        if not isinstance(norm, _SpectralNorm):
            return None  # a link of somebody's own need not take the norm of a matrix
        weight = self._input_of(norm)
        return weight[None] if weight.ndim == 1 else norm._reshape_weight_to_matrix(weight)

    def _norm(self) -> nn.Module:
        start = self.originals[0] if self.chain.is_tensor else None
        return next(m for m in self.chain.children() if is_spectral_norm(m, start))

    def _input_of(self, norm: nn.Module) -> Tensor:
        links = list(self.chain.children())
        before = links[: links.index(norm)]

        def run() -> Tensor:
            inputs: tuple[Tensor, ...] = self.originals
            for link in before:
                inputs = (link(*inputs),)
            return inputs[0].detach()

        if not before:
            return run()
        with torch.no_grad():
            return without_trace(run, self.chain.modules())


def find_parametrizations(path: str, module: nn.Module) -> Iterable[ParametrizationSite]:
    """Return the sites of `torch.nn.utils.parametrizations.spectral_norm` in ``module``."""
    return _sites(path, module) if "parametrizations" in module._modules else ()


def _sites(path: str, module: nn.Module) -> Iterator[ParametrizationSite]:
    for tensor, chain in chains(module):
        start = chain._parameters.get("original", chain._buffers.get("original"))
        if any(is_spectral_norm(link, start) for link in chain._modules.values()):
            yield ParametrizationSite(path, module, tensor, chain)


def _sigma(norm: nn.Module, weight: Tensor) -> float:
    if not isinstance(norm, _SpectralNorm):
        return asked_sigma(norm, weight)
    if weight.ndim == 1:
        return float("nan") if weight.is_meta else float(torch.linalg.vector_norm(weight))
    matrix = norm._reshape_weight_to_matrix(weight)
    return stored_sigma(matrix, norm._u, norm._v)
