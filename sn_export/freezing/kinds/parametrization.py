"""`torch.nn.utils.parametrizations.spectral_norm`, anywhere in a chain of parametrizations."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.parametrize import ParametrizationList

from ..info import Group, SpectralNormInfo
from ..sigma import stored_sigma
from .chain import ChainSite, chains
from .chain_link import asked_sigma, input_of_link, spectral_norm_in


class ParametrizationSite(ChainSite):
    """A tensor computed by a chain with spectral norm in it; the whole chain counts."""

    __slots__ = ("norm",)
    group: Group = "spectral_norm"

    def __init__(
        self,
        path: str,
        module: nn.Module,
        tensor: str,
        chain: ParametrizationList,
        norm: nn.Module,
    ) -> None:
        super().__init__(path, module, tensor, chain)
        self.norm = norm  # the first in the chain

    def describe(self) -> SpectralNormInfo:
        """Return what `find_spectral_norm` lists; sigma is that of the chain's first SN."""
        norm = self.norm
        weight = input_of_link(self.chain, norm)
        return self.norm_info(
            weight,
            dim=getattr(norm, "dim", 0),
            eps=getattr(norm, "eps", None),
            n_power_iterations=getattr(norm, "n_power_iterations", None),
            sigma=_sigma(norm, weight),
        )

    def matrix(self) -> Tensor | None:
        """Return what the chain's first SN normalises, a vector as one row."""
        norm = self.norm
        if not isinstance(norm, _SpectralNorm):
            return None  # a link of somebody's own need not take the norm of a matrix
        weight = input_of_link(self.chain, norm)
        return weight[None] if weight.ndim == 1 else norm._reshape_weight_to_matrix(weight)


def find_parametrizations(path: str, module: nn.Module) -> list[ParametrizationSite]:
    """Return the sites of `torch.nn.utils.parametrizations.spectral_norm` in ``module``."""
    return [
        ParametrizationSite(path, module, tensor, chain, norm)
        for tensor, chain in chains(module)
        if (norm := spectral_norm_in(chain)) is not None
    ]


def _sigma(norm: nn.Module, weight: Tensor) -> float:
    if not isinstance(norm, _SpectralNorm):
        return asked_sigma(norm, weight)
    if weight.ndim == 1:
        return float("nan") if weight.is_meta else float(torch.linalg.vector_norm(weight))
    matrix = norm._reshape_weight_to_matrix(weight)
    return stored_sigma(matrix, norm._u, norm._v)
