"""True sigma: what the stored singular vectors only estimate."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from torch import Tensor, nn

from ..sigma import exact_sigma, exact_sigma_cost
from .kinds import SPECTRAL_NORM
from .plan import walk
from .site import Kind, ParametrizationInfo, SpectralNormInfo

BUDGET = 1e11  # multiplications for all tensors together: seconds


def with_exact_sigma(
    model: nn.Module,
    infos: Sequence[SpectralNormInfo | ParametrizationInfo],
    budget: float = BUDGET,
    kinds: Iterable[Kind] = SPECTRAL_NORM,
) -> tuple[SpectralNormInfo | ParametrizationInfo, ...]:
    """Return ``infos`` with the largest singular value of each weight matrix.

    The cheapest come first, so that a few huge tensors do not keep the others from theirs.

    Args:
        model: the model that ``infos`` tell about. It is not changed.
        infos: what `find_spectral_norm` returned.
        budget: multiplications for all tensors together. What does not fit keeps None, as do
            tensors whose sigma is no norm of a matrix, and those on the meta device.
        kinds: the implementations of spectral norm to look for.
    """
    matrices: dict[str, Tensor] = {}
    for _, sites in walk(model, kinds):
        for site in sites:
            matrix = site.matrix()
            if matrix is not None and matrix.ndim == 2 and not matrix.is_meta:
                matrices[site.name] = matrix
    found: dict[str, float] = {}
    spent = 0.0
    for name, matrix in sorted(matrices.items(), key=lambda entry: _cost(entry[1])):
        spent += _cost(matrix)
        if spent > budget:
            break
        found[name] = exact_sigma(matrix)
    return tuple(
        replace(info, sigma_exact=found.get(info.name))
        if isinstance(info, SpectralNormInfo)
        else info
        for info in infos
    )


def _cost(matrix: Tensor) -> float:
    return exact_sigma_cost(tuple(matrix.shape))
