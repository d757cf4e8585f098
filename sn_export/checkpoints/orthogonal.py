"""Orthogonal weights in a state dict: a raw matrix, and the base that its map is multiplied by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.parametrizations import _OrthMaps, _Orthogonal

from ..errors import CheckpointError
from .reparametrizations import Kind, Reparametrization, aligned, is_finite


def _plain_value(
    site: Reparametrization, tensors: Mapping[str, Any], dims: Mapping[str, int]
) -> Tensor:
    """Return the weight in use, as torch's class computes it.

    Raises:
        CheckpointError: if torch cannot compute it, or it is not finite.
    """
    raw, base = (aligned(site.read(part, tensors)) for part in ("original", "0.base"))
    name = _map_of(site, raw)
    try:
        with torch.no_grad():
            link = _Orthogonal(raw, _OrthMaps[name])
            link._buffers["base"] = base
            value: Tensor = link(raw)
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"torch cannot make '{site.name}' orthogonal by {name}: {str(error).splitlines()[0]}"
        ) from error
    if not is_finite(value):
        raise CheckpointError(f"the orthogonal weight '{site.name}' would not be finite")
    return value


def _map_of(site: Reparametrization, raw: Tensor) -> str:
    """Return the map of one weight; the one that torch takes by default goes by its shape."""
    assert site.orthogonal_map is not None  # else the site would be blocked
    if site.orthogonal_map != "default":
        return site.orthogonal_map
    is_square = raw.shape[-2] == raw.shape[-1]
    return "matrix_exp" if is_square or raw.is_complex() else "householder"


ORTHOGONAL = Kind(hook=(), parametrization=("original", "0.base"), plain_value=_plain_value)
