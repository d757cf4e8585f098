"""The kinds of reparametrizations: weight norm, orthogonality, pruning, chains, and their table.

Each kind lets torch's own class compute the weight in use. For weight norm that is ``g * v /
||v||``, with norms over all dimensions but one; for an orthogonal weight the map of a raw matrix,
times a base; for a pruned one the raw weight times its mask.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import CustomFromMask

from ..errors import CheckpointError
from ..running import OrthogonalLink, OrthogonalMaps, WeightNormLink
from ..text import quote_names
from .lazy_tensors import Entry, align_memory, get_spec, is_finite
from .reparametrizations import Reparametrization, find_weight_norm_dims
from .spectral_norm import (
    TorchNorm,
    compute_normalised,
    decide_dim,
    describe_difference,
    join_dims,
    make_vectors,
    require_fitting_dim,
)

Values = Callable[[Reparametrization, Mapping[str, Any], Mapping[str, int]], Any]


def list_stored_parts(
    site: Reparametrization, tensors: Mapping[str, Any], dims: Mapping[str, int]
) -> list[Entry]:
    """Return the parts as they are stored, in the order of ``site.keys``."""
    return [
        Entry(get_spec(tensors, key), partial(site.read, part, tensors))
        for part, key in site.keys.items()
    ]


@dataclass(frozen=True)
class Kind:
    """The spellings of one group; the functions take the site, the state dict and known dims.

    Attributes:
        hook: ends of the keys under torch's hook, such as ``("_g", "_v")``.
        parametrization: ends of the keys under torch's parametrization; empty if there is none.
        plain_value: returns the weight that an eval-mode forward uses, as torch computes it.
        parts: returns an `Entry` for each end.
        decide_dim: returns the dim, or raises a CheckpointError if a given one does not fit.
        refuse: returns why torch's other spelling would compute something else; ``""`` if it
            computes the same. It takes no dims.
    """

    hook: tuple[str, ...]
    parametrization: tuple[str, ...]
    plain_value: Values
    parts: Values = list_stored_parts
    decide_dim: Values = lambda site, tensors, dims: None
    refuse: Callable[[Reparametrization, Mapping[str, Any]], str] = lambda site, tensors: ""


def _find_dims(site: Reparametrization, tensors: Mapping[str, Any]) -> list[int | None]:
    """Return the dims that the shape of g allows; several if v has dimensions of size 1."""
    return find_weight_norm_dims(get_spec(tensors, site.keys["g"]).shape, site.shape)


def decide_weight_norm_dim(
    site: Reparametrization, tensors: Mapping[str, Any], dims: Mapping[str, int]
) -> int | None:
    """Return the dim of one site; None for one norm of the whole tensor.

    If several fit, as for a convolution of one channel, their results differ in the last bits
    alone. Then the dim is 0, torch's default, unless ``dims`` gives another one.

    Raises:
        CheckpointError: if the one in ``dims`` does not fit, or several fit and 0 does not.
    """
    fitting = _find_dims(site, tensors)
    if site.name in dims:
        parts = f"g of shape {list(get_spec(tensors, site.keys['g']).shape)}"
        return require_fitting_dim(site, dims[site.name], fitting, parts)
    if len(fitting) == 1 or 0 in fitting:
        return fitting[0]
    raise CheckpointError(
        f"cannot tell the dim of '{site.name}' {list(site.shape)}: the shape of g fits "
        f"{join_dims(fitting)}; say which with --dim {site.name}={fitting[0]}"
    )


def describe_assumed_dims(
    sites: Sequence[Reparametrization], tensors: Mapping[str, Any], dims: Mapping[str, int]
) -> tuple[str, ...]:
    """Return a sentence about weight norms whose dim could be another than the default, taken."""
    taken = [
        site.name
        for site in sites
        if site.group == "weight_norm" and not site.blocked and site.name not in dims
        if len(_find_dims(site, tensors)) > 1
    ]
    if not taken:
        return ()
    return (
        f"{quote_names(taken)}: the shapes fit several dims of weight norm, which differ in the "
        "last bits of the weight; 0 was taken, torch's default, and --dim takes another",
    )


def _normalise(
    site: Reparametrization, tensors: Mapping[str, Any], dims: Mapping[str, int]
) -> Tensor:
    """Return the weight in use, as torch's class computes it.

    Raises:
        CheckpointError: if the dim cannot be told, torch cannot compute it, or a norm is 0.
    """
    g, v = (align_memory(site.read(part, tensors)) for part in ("g", "v"))
    dim = decide_weight_norm_dim(site, tensors, dims)
    try:
        with torch.no_grad():
            value: Tensor = WeightNormLink(dim)(g, v)
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


def _make_orthogonal(
    site: Reparametrization, tensors: Mapping[str, Any], dims: Mapping[str, int]
) -> Tensor:
    """Return the weight in use, as torch's class computes it.

    Raises:
        CheckpointError: if torch cannot compute it, or it is not finite.
    """
    raw, base = (align_memory(site.read(part, tensors)) for part in ("original", "0.base"))
    name = _find_map(site, raw)
    try:
        with torch.no_grad():
            link = OrthogonalLink(raw, OrthogonalMaps[name])
            link._buffers["base"] = base
            value: Tensor = link(raw)
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"torch cannot make '{site.name}' orthogonal by {name}: {str(error).splitlines()[0]}"
        ) from error
    if not is_finite(value):
        raise CheckpointError(f"the orthogonal weight '{site.name}' would not be finite")
    return value


def _find_map(site: Reparametrization, raw: Tensor) -> str:
    """Return the name of the map of one weight; for ``"default"`` torch's choice by its shape."""
    assert site.orthogonal_map is not None  # else the site would be blocked
    if site.orthogonal_map != "default":
        return site.orthogonal_map
    is_square = raw.shape[-2] == raw.shape[-1]
    return "matrix_exp" if is_square or raw.is_complex() else "householder"


def _prune(site: Reparametrization, tensors: Mapping[str, Any], dims: Mapping[str, int]) -> Tensor:
    """Return the weight in use, as torch's class computes it.

    Raises:
        CheckpointError: if the mask has another shape, or a value is not finite.
    """
    weight, mask = (align_memory(site.read(part, tensors)) for part in ("weight", "mask"))
    if mask.shape != weight.shape:
        raise CheckpointError(
            f"'{site.keys['mask']}' is {list(mask.shape)} and should be {list(weight.shape)}"
        )
    module = nn.Module()
    module.weight_orig, module.weight_mask = weight, mask
    method = CustomFromMask(mask)
    method._tensor_name = "weight"
    value: Tensor = method.apply_mask(module).detach()  # type: ignore[no-untyped-call]
    return value


def resolve_chain(
    site: Reparametrization, tensors: Mapping[str, Any], dims: Mapping[str, int]
) -> tuple[Reparametrization, Mapping[str, Any]]:
    """Return the last link of a chain, and its tensors: its ``weight`` is the value of the others.

    A site that is no chain is returned as it is.

    Raises:
        CheckpointError: if that value cannot be computed.
    """
    held = tensors
    for link, following in pairwise(site.links):
        link = replace(link, orthogonal_map=site.orthogonal_map)
        value = _KINDS[link.group].plain_value(link, held, dims)
        held = {key: tensors[key] for key in following.keys.values() if key != site.name}
        held[site.name] = value
    return (site.links or (site,))[-1], held


def find_kind(site: Reparametrization) -> Kind:
    """Return the kind of a site that is not blocked."""
    return _CHAIN if site.links else _KINDS[site.group]


_SPECTRAL_NORM = Kind(
    hook=("_orig", "_u", "_v"),
    parametrization=("original", "0._u", "0._v"),
    plain_value=compute_normalised,
    parts=make_vectors,
    decide_dim=lambda site, tensors, dims: decide_dim(TorchNorm(site, tensors), dims),
    refuse=describe_difference,
)
_KINDS: dict[str, Kind] = {
    "spectral_norm": _SPECTRAL_NORM,
    "weight_norm": Kind(
        hook=("_g", "_v"),
        parametrization=("original0", "original1"),
        plain_value=_normalise,
        decide_dim=decide_weight_norm_dim,
    ),
    "orthogonal": Kind(
        hook=(), parametrization=("original", "0.base"), plain_value=_make_orthogonal
    ),
    "pruning": Kind(hook=("_orig", "_mask"), parametrization=(), plain_value=_prune),
}
_CHAIN = Kind(
    hook=(),
    parametrization=(),
    plain_value=lambda site, tensors, dims: _SPECTRAL_NORM.plain_value(
        *resolve_chain(site, tensors, dims), dims
    ),
    decide_dim=lambda site, tensors, dims: _SPECTRAL_NORM.decide_dim(
        *resolve_chain(site, tensors, dims), dims
    ),
)
