"""Weight norm in a state dict: ``g * v / ||v||``, the norms taken over all dimensions but one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.parametrizations import _WeightNorm

from ..errors import CheckpointError
from ..text import quote_names
from .lazy_tensors import spec_of
from .reparametrizations import Kind, Reparametrization, aligned, is_finite, weight_norm_dims


def fitting_dims(site: Reparametrization, tensors: Mapping[str, Any]) -> list[int | None]:
    """Return the dims that the shape of g has room for; several if v has dimensions of size 1."""
    return weight_norm_dims(spec_of(tensors, site.keys["g"]).shape, site.shape)


def decide_dim(
    site: Reparametrization, tensors: Mapping[str, Any], dims: Mapping[str, int]
) -> int | None:
    """Return the dim of one site; None for one norm of the whole tensor.

    Where several fit, as for a convolution of one channel, they differ in the last bits of the
    result only. Then it is 0, which torch takes by default, unless ``dims`` says otherwise.

    Raises:
        CheckpointError: if ``dims`` names one that does not fit, or several fit and 0 does not.
    """
    fitting = fitting_dims(site, tensors)
    either = " or ".join(map(str, fitting))
    if site.name in dims:
        dim, ndim = dims[site.name], len(site.shape)
        if not -ndim <= dim < ndim or dim % ndim not in fitting:
            shape = list(spec_of(tensors, site.keys["g"]).shape)
            raise CheckpointError(
                f"'{site.name}' {list(site.shape)} with g of shape {shape} has dim {either}, got "
                f"--dim {site.name}={dim}"
            )
        return dim % ndim
    if len(fitting) == 1 or 0 in fitting:
        return fitting[0]
    raise CheckpointError(
        f"cannot tell the dim of '{site.name}' {list(site.shape)}: the shape of g fits {either}; "
        f"say which with --dim {site.name}={fitting[0]}"
    )


def notes_on_dims(
    sites: Sequence[Reparametrization], tensors: Mapping[str, Any], dims: Mapping[str, int]
) -> tuple[str, ...]:
    """Return a sentence about weight norms whose dim was taken to be torch's default."""
    taken = [
        site.name
        for site in sites
        if site.group == "weight_norm" and not site.blocked and site.name not in dims
        if len(fitting_dims(site, tensors)) > 1
    ]
    if not taken:
        return ()
    return (
        f"{quote_names(taken)}: the shapes fit several dims of weight norm, which differ in the "
        "last bits of the weight; 0 was taken, torch's default, and --dim takes another",
    )


def _plain_value(
    site: Reparametrization, tensors: Mapping[str, Any], dims: Mapping[str, int]
) -> Tensor:
    """Return the weight in use, as torch's class computes it.

    Raises:
        CheckpointError: if the dim cannot be told, torch cannot compute it, or a norm is 0.
    """
    g, v = (aligned(site.read(part, tensors)) for part in ("g", "v"))
    dim = decide_dim(site, tensors, dims)
    try:
        with torch.no_grad():
            value: Tensor = _WeightNorm(dim)(g, v)
    except RuntimeError as error:
        raise CheckpointError(
            f"torch cannot normalise '{site.name}': {str(error).splitlines()[0]}"
        ) from error
    if not is_finite(value):
        raise CheckpointError(
            f"a norm in '{site.keys['v']}' is 0 or too small to divide by, so the weight "
            f"'{site.name}' would not be finite"
        )
    return value


WEIGHT_NORM = Kind(
    hook=("_g", "_v"),
    parametrization=("original0", "original1"),
    plain_value=_plain_value,
    decide_dim=decide_dim,
)
