"""Lists of what a block would freeze, of models in one process or on every rank of several."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeVar, cast

import torch
from torch import nn

from ..freezing import (
    BUDGET,
    Found,
    Only,
    ParametrizationInfo,
    Selection,
    Site,
    SpectralNormInfo,
    UnconvergedSigma,
    Walk,
    add_exact_sigma,
    compute_value,
    describe_site,
    exact_sigma_cost,
    norm_matrix,
    require_module,
    unconverged_among,
    warn_of_suspects,
)
from .fsdp import Unit
from .gathered_walk import find_gathered, sharded_units

Info = TypeVar("Info")


def find_spectral_norm(model: nn.Module) -> list[SpectralNormInfo]:
    """List the tensors that `frozen_spectral_norm` would freeze, in the order of the modules.

    For a model under `torch.distributed.fsdp.fully_shard` it is called on every rank.

    Args:
        model: any module. It is not changed; no power iteration is run.

    Returns:
        One `SpectralNormInfo` for each tensor.

    Raises:
        TypeError: if ``model`` is not a `torch.nn.Module`.
        FreezeError: if spectral norm sits where it cannot be read, as in a ScriptModule, or an
            adapter fails.

    Warns:
        SpectralNormNotRecognisedWarning: if a module looks like a handwritten spectral norm that
            is not known (`find_suspects`); it is not in the list.
    """
    infos = _describe(
        require_module(model), Selection("spectral_norm"), lambda site: site.describe()
    )
    return [cast(SpectralNormInfo, info) for info in infos]


def find_parametrizations(model: nn.Module, only: Only = None) -> list[ParametrizationInfo]:
    """List the tensors that `frozen_parametrizations` would freeze, in the order of the modules.

    For a model under `torch.distributed.fsdp.fully_shard` it is called on every rank.

    Args:
        model: any module. It is not changed; no power iteration is run.
        only: as for `frozen_parametrizations`.

    Returns:
        One `ParametrizationInfo` for each tensor.

    Raises:
        TypeError: if ``model`` is not a `torch.nn.Module`, or ``only`` holds no strings.
        ValueError: if a name in ``only`` fits nothing.
        FreezeError: if a tensor cannot be computed, or an adapter fails.

    Warns:
        SpectralNormNotRecognisedWarning: if a module looks like a handwritten spectral norm that
            is not known (`find_suspects`), and spectral norm is asked for; it is not in the list.
    """
    selection = Selection(only)
    return _describe(
        require_module(model), selection, lambda site: site.outline(compute_value(site))
    )


class Description(NamedTuple):
    """What is known of the reparametrizations of a model.

    Attributes:
        frozen: the tensors that are frozen.
        unconverged: those whose stored sigma is far below the true one.
    """

    frozen: tuple[SpectralNormInfo | ParametrizationInfo, ...]
    unconverged: tuple[UnconvergedSigma, ...]


def describe_sharded(model: nn.Module, only: Only, sigma_exact: bool) -> Description:
    """Return what would be frozen in a sharded model, without a warning; a collective call.

    Args:
        model: the model.
        only: as for `frozen_parametrizations`.
        sigma_exact: compute the largest singular values too, of the first matrices that together
            take seconds.
    """
    unconverged: list[UnconvergedSigma] = []
    left = BUDGET

    def describe(site: Site) -> SpectralNormInfo | ParametrizationInfo:
        nonlocal left
        info, matrix = describe_site(site), norm_matrix(site)
        unconverged.extend(unconverged_among([info], matrix))
        if sigma_exact:
            (info,) = add_exact_sigma([info], matrix, left)
            left -= sum(exact_sigma_cost(tuple(one.shape)) for one in matrix.values())
        return info

    frozen = _describe(model, Selection(only), describe, warns=False)
    return Description(tuple(frozen), tuple(unconverged))


def _describe(
    model: nn.Module,
    selection: Selection,
    describe: Callable[[Site], Info],
    warns: bool = True,
) -> list[Info]:
    infos: dict[int, Info] = {}

    def take(site: Site, unit: Unit | None = None) -> None:
        infos[id(site)] = describe(site)

    def find(walk: Walk) -> list[Found]:
        return selection.find(model, (), walk)

    units = sharded_units(model)
    found = find_gathered(model, units, take, find) if units else selection.find(model)
    if warns and selection.includes_spectral_norm:
        warn_of_suspects(model, found, stacklevel=3)
    sites = [site for _, module_sites in found for site in module_sites]
    if not units:
        with torch.inference_mode(False), torch.no_grad():
            for site in sites:
                take(site)
    return [infos[id(site)] for site in sites]
