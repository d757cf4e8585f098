"""Inspect the reparametrizations in a checkpoint, without model code."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..freezing import exact_sigma, stored_sigma
from ..text import name_dtype, quote_names
from .content import Checkpoint, StateDict
from .kinds import decide_weight_norm_dim, resolve_chain
from .lazy_tensors import get_float_spec, require_finite
from .read import read_checkpoint
from .reparametrizations import (
    Reparametrization,
    describe_handwritten_norms,
    find_reparametrizations,
)
from .spectral_norm import (
    TorchNorm,
    decide_dim,
    describe_length,
    find_fitting_dims,
    measure_vectors,
)
from .spelling import require_known

_CONVERGED = 1e-3


@dataclass(frozen=True)
class StoredLayer:
    """One reparametrized tensor, as it was found in a checkpoint.

    Attributes:
        module: qualified name of the module, ``""`` for the root.
        tensor: name of the tensor in it.
        kind: for spectral norm its spelling, as in `sn_export.find_spectral_norm`; for others the
            group, as in `sn_export.find_parametrizations`: ``"weight_norm"``, ``"orthogonal"``,
            ``"pruning"``, or ``"parametrization"`` for a chain whose links the keys do not tell.
        shape: its shape.
        dtype: its dtype, such as ``"float32"``.
        dim: for spectral norm the dimension of the rows of its matrix, for weight norm the one
            along which g has a value for each entry; None if there is none, or it is unknown.
        sigma: ``u^H W v`` of the stored vectors, by which the weight is divided; NaN if unknown,
            and for other groups than spectral norm.
        sigma_exact: the largest singular value; NaN if unknown.
        note: why something is unknown, or a further remark; may be empty.
        key: where in the checkpoint its state dict is.
        group: ``"spectral_norm"``, or the kind of another.
        spelling: ``"hook"`` or ``"parametrization"``.
        keys: the keys of its parts: ``{"g": "conv.weight_g", "v": "conv.weight_v"}``.
    """

    module: str
    tensor: str
    kind: str
    shape: tuple[int, ...]
    dtype: str
    dim: int | None
    sigma: float
    sigma_exact: float
    note: str
    key: str
    group: str
    spelling: str
    keys: Mapping[str, str]

    @property
    def shortfall(self) -> float:
        """How far the power iteration is from convergence: ``1 - sigma / sigma_exact``."""
        return 1 - self.sigma / self.sigma_exact if self.sigma_exact else math.nan

    @property
    def norm_in_use(self) -> float:
        """Spectral norm of the weight in use: 1 if converged. Applied again, it divides by this."""
        return self.sigma_exact / self.sigma if self.sigma else math.nan

    @property
    def meaning(self) -> str:
        """What removing spectral norm and applying it again would do; for others, the parts."""
        if self.group != "spectral_norm":
            made = f"made of {quote_names(self.keys)}"
            return f"{made}; {self.note}" if self.note else made
        if not math.isfinite(self.norm_in_use):
            return self.note
        if abs(self.shortfall) <= _CONVERGED:
            text = "converged; re-applied, it is the same only after u and v converged again"
        elif self.norm_in_use > 0:
            text = f"re-applied, the weight becomes {self.norm_in_use:.4g} times smaller"
        else:
            text = "never trained: u and v are not of this weight; re-applied, its sign changes"
        return f"{text}; {self.note}" if self.note else text


@dataclass(frozen=True)
class Inspection:
    """The reparametrizations of a checkpoint.

    Attributes:
        path: the checkpoint.
        format: ``"torch"``, ``"safetensors"``, ``"distributed"`` or ``"numpy"``.
        key: where in it the state dict is; ``""`` for the root, or for several.
        layers: one entry for each reparametrized tensor.
        tensors: number of entries in the state dict, or in all that were inspected.
        notes: further remarks, such as keys that look like handwritten spectral norm.
    """

    path: Path
    format: str
    key: str
    layers: tuple[StoredLayer, ...]
    tensors: int
    notes: tuple[str, ...]


def inspect_checkpoint(
    path: str | os.PathLike[str],
    *,
    key: str | None = None,
    dims: Mapping[str, int] | None = None,
    trust_pickle: bool = False,
    progress: Callable[[str, int], None] = lambda name, total: None,
) -> Inspection:
    """List the reparametrizations in a checkpoint, with their sigma as stored and exact.

    Args:
        path: the checkpoint, see `read_checkpoint`.
        key: where in the checkpoint the state dict is; None for all that have such tensors.
        dims: dims by name of the tensor, which the file alone does not tell.
        trust_pickle: see `read_checkpoint`.
        progress: called with the name of each tensor and how many there are.

    Raises:
        CheckpointError: if the checkpoint cannot be read, or a dim in ``dims`` does not fit.
    """
    checkpoint = read_checkpoint(path, trust_pickle=trust_pickle)
    chosen = _choose_states(checkpoint, key)
    sites = [(state, site) for state in chosen for site in _find_sites(state)]
    require_known(dims or {}, [site for _, site in sites])
    layers = []
    for state, site in sites:
        layers.append(_describe(site, state, dims or {}))
        progress(site.name, len(sites))
    return Inspection(
        checkpoint.path,
        checkpoint.format,
        chosen[0].key if len(chosen) == 1 else "",
        tuple(layers),
        sum(len(state.tensors) for state in chosen),
        (
            *checkpoint.notes,
            *(n for state in chosen for n in describe_handwritten_norms(state.tensors)),
        ),
    )


def _find_sites(state: StateDict) -> list[Reparametrization]:
    return find_reparametrizations(state.tensors, state.versions)


def _choose_states(checkpoint: Checkpoint, key: str | None) -> list[StateDict]:
    found = checkpoint.state_dicts()
    if key is not None or not found:
        return [checkpoint.choose(key, lambda one: True, "is a state dict")]
    return [one for one in found if _find_sites(one)] or found


def _describe(site: Reparametrization, state: StateDict, dims: Mapping[str, int]) -> StoredLayer:
    is_norm = site.group == "spectral_norm"
    dim: int | None = None
    sigma = exact = math.nan
    specs = {key: get_float_spec(state.tensors, key) for key in site.keys.values()}
    dtypes = [name_dtype(spec) for spec in specs.values() if spec is not None]
    if is_norm and (not site.blocked if site.links else "weight" in site.keys):
        dim, sigma, exact, note = _measure(site, state.tensors, dims)
        note = note or f"the last of {site.label}" * bool(site.links)
    else:
        note = _describe_broken([key for key in specs if specs[key] is not None], state.tensors)
    if site.group == "weight_norm" and not site.blocked:
        dim, more = _find_weight_norm_dim(site, state.tensors, dims)
        note = note or more
    note = site.blocked or note
    return StoredLayer(
        site.module,
        site.tensor,
        site.spelling if is_norm else site.group,
        site.shape,
        dtypes[0] if dtypes else "",
        dim,
        sigma,
        exact,
        note,
        state.key,
        site.group,
        site.spelling,
        site.keys,
    )


def _measure(
    site: Reparametrization, tensors: Mapping[str, Any], dims: Mapping[str, int]
) -> tuple[int | None, float, float, str]:
    """Return dim, sigma and exact sigma of a spectral norm, and a remark, which may be empty."""
    if broken := _describe_broken(site.keys.values(), tensors):
        return None, math.nan, math.nan, broken
    try:
        site, tensors = resolve_chain(site, tensors, dims)
        norm = TorchNorm(site, tensors)
    except CheckpointError as error:
        return None, math.nan, math.nan, str(error)
    try:
        dim = decide_dim(norm, dims)
    except CheckpointError as error:
        return None, math.nan, _measure_all_dims(norm), str(error)
    matrix = norm.make_matrix(dim)
    sigma = stored_sigma(matrix, norm.u, norm.find_right_vector(dim))
    note = "sigma is 0, so the weight in use is not finite" if sigma == 0 else ""
    length = measure_vectors(site, tensors)
    if sigma != 0 and length != 1:
        note = describe_length(length)
    return dim, sigma, exact_sigma(matrix), note


def _find_weight_norm_dim(
    site: Reparametrization, tensors: Mapping[str, Any], dims: Mapping[str, int]
) -> tuple[int | None, str]:
    """Return the dim of a weight norm, and a remark, which may be empty."""
    try:
        dim = decide_weight_norm_dim(site, tensors, dims)
    except CheckpointError as error:
        return None, str(error)
    return dim, "g is one number for the whole tensor (dim=None)" if dim is None else ""


def _describe_broken(keys: Iterable[str], tensors: Mapping[str, Any]) -> str:
    """Return a sentence on the first tensor that is not finite, or ``""``; reads one at a time."""
    for key in keys:
        try:
            require_finite(key, tensors[key])
        except CheckpointError:
            return f"'{key}' holds NaN or infinite values"
    return ""


def _measure_all_dims(norm: TorchNorm) -> float:
    """Return the largest singular value if it is the same for all dims that fit; otherwise NaN."""
    try:
        dims = find_fitting_dims(norm)
    except CheckpointError:
        return math.nan
    if len(norm.site.shape) == 2:  # a matrix and its transpose have one
        dims = dims[:1]
    first, *others = (exact_sigma(norm.make_matrix(dim)) for dim in dims)
    return first if all(math.isclose(one, first, rel_tol=1e-9) for one in others) else math.nan
