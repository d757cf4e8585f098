"""Lists of what a block would freeze, and of what it would miss; sigma stored and true."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import cast, overload

import torch
from torch import Tensor, nn

from .info import ParametrizationInfo, SpectralNormInfo, UnconvergedSigma
from .kinds import SPECTRAL_NORM
from .plan import compute_value
from .selection import Only, Selection, walk
from .sigma import exact_sigma, exact_sigma_cost, least_sigma
from .site import Site, require_module
from .suspects import SpectralNormSuspect, find_suspects_in, warn_of_suspects

BUDGET = 1e11  # multiplications for all tensors together: seconds
QUICK_BUDGET = 5e8  # likewise: a fraction of a second
FAR = 0.5  # of the true sigma: one forward in train mode reaches more, from any start


def find_spectral_norm(model: nn.Module) -> list[SpectralNormInfo]:
    """List what `frozen_spectral_norm` would freeze, as `sn_export.find_spectral_norm` does."""
    found = list(walk(require_module(model), SPECTRAL_NORM))
    warn_of_suspects(model, found, stacklevel=2)
    return [cast(SpectralNormInfo, site.describe()) for _, sites in found for site in sites]


def find_parametrizations(model: nn.Module, only: Only = None) -> list[ParametrizationInfo]:
    """List what `frozen_parametrizations` would freeze; see `sn_export.find_parametrizations`."""
    selection = Selection(only)
    found = selection.find(require_module(model))
    if selection.includes_spectral_norm:
        warn_of_suspects(model, found, stacklevel=2)
    with torch.inference_mode(False), torch.no_grad():
        return [site.make_info(compute_value(site)) for _, sites in found for site in sites]


@overload
def describe_sites(model: nn.Module) -> list[SpectralNormInfo]: ...
@overload
def describe_sites(
    model: nn.Module, only: Only
) -> list[SpectralNormInfo] | list[SpectralNormInfo | ParametrizationInfo]: ...
def describe_sites(
    model: nn.Module, only: Only = "spectral_norm"
) -> list[SpectralNormInfo] | list[SpectralNormInfo | ParametrizationInfo]:
    """Return what `find_spectral_norm` returns, and the same of other kinds, without a warning.

    Args:
        model: any module.
        only: as for `frozen_parametrizations`.

    Returns:
        A `SpectralNormInfo` for each tensor under spectral norm, a `ParametrizationInfo` for
        each other one.
    """
    with torch.inference_mode(False), torch.no_grad():
        return [describe_site(site) for _, sites in Selection(only).find(model) for site in sites]


def find_suspects(model: nn.Module) -> list[SpectralNormSuspect]:
    """List the modules that look like a handwritten spectral norm that is not known.

    `frozen_spectral_norm` leaves them as they are. `register_spectral_norm` makes one known.

    Args:
        model: any module. It is not changed.

    Returns:
        One `SpectralNormSuspect` for each module, in the order of ``named_modules``.

    Raises:
        TypeError: if ``model`` is not a `torch.nn.Module`.
        FreezeError: if spectral norm sits where it cannot be read, as in a ScriptModule, or an
            adapter fails.
    """
    return find_suspects_in(model, walk(require_module(model), SPECTRAL_NORM))


def describe_site(site: Site) -> SpectralNormInfo | ParametrizationInfo:
    """Return the record of `describe_sites` for one tensor."""
    return site.describe() if site.group == "spectral_norm" else site.make_info(compute_value(site))


def measure_exact_sigma(
    model: nn.Module,
    infos: Sequence[SpectralNormInfo | ParametrizationInfo],
    budget: float = BUDGET,
) -> tuple[SpectralNormInfo | ParametrizationInfo, ...]:
    """Return ``infos`` with the largest singular value of each weight matrix.

    The cheapest come first, so that a few huge tensors do not keep the others from theirs.

    Args:
        model: the model that ``infos`` tell about. It is not changed.
        infos: what `find_spectral_norm` returned.
        budget: multiplications for all tensors together. What does not fit keeps None, as do
            tensors whose sigma is no norm of a matrix, and those on the meta device.
    """
    return add_exact_sigma(infos, _collect_matrices(model), budget)


def add_exact_sigma(
    infos: Sequence[SpectralNormInfo | ParametrizationInfo],
    matrices: Mapping[str, Tensor],
    budget: float,
) -> tuple[SpectralNormInfo | ParametrizationInfo, ...]:
    """Return what `measure_exact_sigma` returns, given the weight matrices by name."""
    found = _compute_exact_sigmas(matrices, budget)
    return tuple(
        replace(info, sigma_exact=found.get(info.name))
        if isinstance(info, SpectralNormInfo)
        else info
        for info in infos
    )


def find_unconverged(
    model: nn.Module, infos: Iterable[SpectralNormInfo | ParametrizationInfo] | None = None
) -> tuple[UnconvergedSigma, ...]:
    """Return the tensors whose stored sigma is far below the true one.

    That happens where power iteration never ran: the vectors are as drawn, sigma is near zero, and
    the weight that is divided by it is huge.

    Args:
        model: any module. It is not changed; no power iteration of its own is run.
        infos: what `describe_sites` returned, where that is known.

    Raises:
        FreezeError: as `find_spectral_norm`.
    """
    infos = describe_sites(model) if infos is None else infos
    return select_unconverged(infos, _collect_matrices(model))


def select_unconverged(
    infos: Iterable[SpectralNormInfo | ParametrizationInfo], matrices: Mapping[str, Tensor]
) -> tuple[UnconvergedSigma, ...]:
    """Return what `find_unconverged` returns, given the weight matrices by name."""
    stored = {
        info.name: info.sigma
        for info in infos
        if isinstance(info, SpectralNormInfo)
        and info.is_applied
        and info.name in matrices
        and math.isfinite(info.sigma)
    }
    least = {name: least_sigma(matrices[name], stored[name]) for name in stored}
    far = {name: matrices[name] for name in stored if stored[name] < FAR * least[name]}
    exact = _compute_exact_sigmas(far, QUICK_BUDGET)
    return tuple(
        UnconvergedSigma(name, stored[name], exact.get(name, least[name]), name in exact)
        for name in far
    )


def _collect_matrices(model: nn.Module) -> dict[str, Tensor]:
    """Return the weight matrices under spectral norm that have a norm, by name of the tensor."""
    found = {}
    for _, sites in walk(model, SPECTRAL_NORM):
        for site in sites:
            found.update(make_norm_matrix(site))
    return found


def make_norm_matrix(site: Site) -> dict[str, Tensor]:
    """Return the weight matrix of one tensor by its name; nothing if that has no norm."""
    matrix = site.make_matrix()
    has_norm = matrix is not None and matrix.ndim == 2 and not matrix.is_meta
    return {site.name: matrix} if matrix is not None and has_norm else {}


def _compute_exact_sigmas(matrices: Mapping[str, Tensor], budget: float) -> dict[str, float]:
    found: dict[str, float] = {}
    spent = 0.0
    for name, matrix in sorted(matrices.items(), key=lambda entry: _estimate_cost(entry[1])):
        spent += _estimate_cost(matrix)
        if spent > budget:
            break
        found[name] = exact_sigma(matrix)
    return found


def _estimate_cost(matrix: Tensor) -> float:
    return exact_sigma_cost(tuple(matrix.shape))
