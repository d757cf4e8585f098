"""What the spectral norms in a checkpoint are like, without model code."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import CheckpointError
from ..freezing import exact_sigma, stored_sigma
from ..text import dtype_name
from .content import Checkpoint, StateDict
from .dims import decide_dim, fitting_dims, require_known
from .read import read_checkpoint
from .stored_norms import find_sites, handwritten_notes
from .torch_norm import TorchNorm

_CONVERGED = 1e-3


@dataclass(frozen=True)
class StoredLayer:
    """One tensor under spectral norm, as it was found in a checkpoint.

    Attributes:
        module: qualified name of the module, ``""`` for the root.
        tensor: name of the tensor in it.
        kind: ``"hook"`` or ``"parametrization"``.
        shape: its shape.
        dtype: its dtype, such as ``"float32"``.
        dim: the dimension that became the rows of its matrix; None if that cannot be told.
        sigma: ``u^H W v`` from the stored vectors, which the weight is divided by; NaN if
            unknown.
        sigma_exact: the largest singular value; NaN if unknown.
        note: why something is unknown, or what else there is to say; may be empty.
        key: where in the checkpoint its state dict is.
    """

    module: str
    tensor: str
    kind: str
    shape: tuple[int, ...]
    dtype: str
    dim: int | None
    sigma: float
    sigma_exact: float
    note: str = ""
    key: str = ""

    @property
    def shortfall(self) -> float:
        """How far the power iteration is from converged: ``1 - sigma / sigma_exact``."""
        return 1 - self.sigma / self.sigma_exact if self.sigma_exact else math.nan

    @property
    def norm_in_use(self) -> float:
        """Spectral norm of the weight in use, 1 if converged; re-applying divides by it."""
        return self.sigma_exact / self.sigma if self.sigma else math.nan

    @property
    def meaning(self) -> str:
        """What removing spectral norm and applying it again would do to this weight."""
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
    """The spectral norms of a checkpoint.

    Attributes:
        path: the checkpoint.
        format: ``"torch"``, ``"safetensors"`` or ``"distributed"``.
        key: where in it the state dict is; ``""`` for the root, or for several.
        layers: one for each tensor under spectral norm.
        tensors: number of entries in the state dict, or in all that were looked at.
        notes: what else there is to say, such as keys that look like handwritten spectral norm.
    """

    path: Path
    format: str
    key: str
    layers: tuple[StoredLayer, ...]
    tensors: int
    notes: tuple[str, ...] = ()


def inspect_checkpoint(
    path: str | os.PathLike[str],
    *,
    key: str | None = None,
    dims: Mapping[str, int] | None = None,
    trust_pickle: bool = False,
    progress: Callable[[str, int], None] = lambda name, total: None,
) -> Inspection:
    """Return what the spectral norms in a checkpoint are like.

    Args:
        path: the checkpoint, see `read_checkpoint`.
        key: where in the checkpoint the state dict is; None for all that have spectral norm.
        dims: dims of square weights by name, where their vectors cannot tell.
        trust_pickle: see `read_checkpoint`.
        progress: called with the name of each tensor and how many there are.

    Raises:
        CheckpointError: if the checkpoint cannot be read, or a spectral norm in it is
            incomplete.
    """
    checkpoint = read_checkpoint(path, trust_pickle=trust_pickle)
    chosen = _chosen(checkpoint, key)
    sites = [(state, site) for state in chosen for site in find_sites(state.tensors)]
    require_known(dims or {}, [site for _, site in sites])
    layers = []
    for state, site in sites:
        layers.append(_describe(TorchNorm(site, state.tensors), dims or {}, state.key))
        progress(site.name, len(sites))
    return Inspection(
        checkpoint.path,
        checkpoint.format,
        chosen[0].key if len(chosen) == 1 else "",
        tuple(layers),
        sum(len(state.tensors) for state in chosen),
        (*checkpoint.notes, *(n for state in chosen for n in handwritten_notes(state.tensors))),
    )


def _chosen(checkpoint: Checkpoint, key: str | None) -> list[StateDict]:
    found = checkpoint.state_dicts()
    if key is not None or not found:
        return [checkpoint.choose(key, lambda one: True, "is a state dict")]
    return [one for one in found if find_sites(one.tensors)] or found


def _describe(norm: TorchNorm, dims: Mapping[str, int], key: str) -> StoredLayer:
    site = norm.site
    dim: int | None = None
    sigma = exact = math.nan
    note = site.blocked
    tensors = {site.weight: norm.weight, site.u: norm.u, site.v or "": norm.v}
    broken = [k for k, t in tensors.items() if t is not None and not torch.isfinite(t).all()]
    if broken:
        note = f"'{broken[0]}' holds NaN or infinite values"
    else:
        try:
            dim = decide_dim(norm, dims)
        except CheckpointError as error:
            note = str(error)
            exact = _exact_for_all(norm)
    if dim is not None:
        matrix = norm.matrix(dim)
        sigma = stored_sigma(matrix, norm.u, norm.right_vector(dim))
        exact = exact_sigma(matrix)
        if sigma == 0:
            note = "sigma is 0, so the weight in use is not finite"
    return StoredLayer(
        site.module,
        site.tensor,
        site.kind,
        site.shape,
        dtype_name(norm.weight),
        dim,
        sigma,
        exact,
        note,
        key,
    )


def _exact_for_all(norm: TorchNorm) -> float:
    """Return the largest singular value where all dims that fit agree on it."""
    try:
        values = [exact_sigma(norm.matrix(dim)) for dim in fitting_dims(norm)]
    except CheckpointError:
        return math.nan
    return values[0] if all(math.isclose(v, values[0], rel_tol=1e-12) for v in values) else math.nan
