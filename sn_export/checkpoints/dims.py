"""Which dimension of a stored weight became the rows of its matrix; keys do not say it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..text import quote_names
from .stored_norms import StoredNorm
from .torch_norm import TorchNorm

# After a training step u = normalize(W v) or v = normalize(W^H u) held exactly, and a step of
# the optimizer later still nearly; along a wrong dim the two are strangers.
_NEAR = 0.1
_CLEARER = 10.0


def decide_dim(norm: TorchNorm, dims: Mapping[str, int]) -> int:
    """Return the dim of one site.

    By the shapes of u and v, and where several dims fit, as for square weights, by the one
    for which the vectors are each other's image under the weight.

    Args:
        norm: the tensors of the site.
        dims: dims that the caller knows, by qualified name of the tensor.

    Raises:
        CheckpointError: if no dim fits, or several do and the vectors cannot tell.
    """
    fitting = fitting_dims(norm)
    site = norm.site
    if site.name in dims:
        ndim = len(site.shape)
        dim = dims[site.name]
        if not -ndim <= dim < ndim or dim % ndim not in fitting:
            raise CheckpointError(
                f"'{site.name}' {list(site.shape)} with u of {norm.u.numel()} elements has dim "
                f"{_either(fitting)}, got --dim {site.name}={dim}"
            )
        return dim % ndim
    if len(fitting) == 1:
        return fitting[0]
    (best, dim), (second, _) = sorted((_residual(norm, d), d) for d in fitting)[:2]
    if best < _NEAR and second > _CLEARER * best:
        return dim
    raise CheckpointError(
        f"cannot tell the dim of '{site.name}' {list(site.shape)}: its shape and vectors fit "
        f"{_either(fitting)}; say which with --dim {site.name}={fitting[0]}"
    )


def require_fitting(
    dims: Mapping[str, int], sites: Sequence[StoredNorm], tensors: Mapping[str, Any]
) -> None:
    """Raise a CheckpointError for a ``--dim`` that is not possible, also where none is needed."""
    require_known(dims, sites)
    for site in sites:
        if site.name in dims:
            decide_dim(TorchNorm(site, tensors), dims)


def require_known(dims: Mapping[str, int], sites: Sequence[StoredNorm]) -> None:
    """Raise a CheckpointError for a ``--dim`` of a tensor that is not there."""
    names = [site.name for site in sites]
    for name in dims:
        if name not in names:
            raise CheckpointError(
                f"--dim {name}={dims[name]} names no tensor under spectral norm; there are "
                f"{quote_names(names) or 'none'}"
            )


def fitting_dims(norm: TorchNorm) -> list[int]:
    """Return the dims for which u and v have the lengths of rows and columns.

    Raises:
        CheckpointError: if there is none.
    """
    shape, u, v = norm.site.shape, norm.u, norm.v
    total = math.prod(shape)
    fitting = [
        dim
        for dim, size in enumerate(shape)
        if u.shape == (size,) and (v is None or v.shape == (total // max(size, 1),))
    ]
    if not fitting:
        columns = "" if v is None else f" and v has shape {list(v.shape)}"
        raise CheckpointError(
            f"the vectors of '{norm.site.name}' fit no dim of its shape {list(shape)}: u has "
            f"shape {list(u.shape)}{columns}"
        )
    return fitting


def _residual(norm: TorchNorm, dim: int) -> float:
    matrix = norm.matrix(dim)
    u = norm.u
    with torch.no_grad():
        if norm.normalised is not None or norm.v is None:
            # v is lost; its image is as long as the sigma that was divided by.
            assert norm.normalised is not None  # one of the two is always there
            sigma = norm.weight.norm() / norm.normalised.norm()
            length = torch.linalg.vector_norm(torch.mv(matrix.mH, u))
            return float((length / sigma - 1).abs())
        return min(
            _distance(u, torch.mv(matrix, norm.v)), _distance(norm.v, torch.mv(matrix.mH, u))
        )


def _distance(vector: Tensor, image: Tensor) -> float:
    length = torch.linalg.vector_norm(image)
    distance = float(torch.linalg.vector_norm(vector - image / length))
    return distance if math.isfinite(distance) else math.inf


def _either(dims: list[int]) -> str:
    return " or ".join(map(str, dims))
