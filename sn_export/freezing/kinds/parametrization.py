"""Spectral norm anywhere in a chain of parametrizations: torch's, or a link of one's own."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from ...running import SpectralNormLink, have_same_bits, run_without_trace
from ..info import Group, SpectralNormInfo
from ..introspection.candidates import (
    find_proportion,
    fits_weight,
    is_multiple,
    is_named_as_vector,
    is_rescaled,
    iter_small_state,
    mentions_norm,
    mentions_sigma,
)
from ..introspection.sandbox import compute_in_sandbox
from ..introspection.source_code import read_code
from ..sigma import stored_sigma
from .chain import ChainSite, list_chains, list_originals


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
        weight = compute_input(self.chain, norm)
        # A link of somebody's own need not keep the shape.
        used = weight if isinstance(norm, SpectralNormLink) else self.value()
        return self.make_norm_info(
            used,
            dim=getattr(norm, "dim", 0),
            eps=getattr(norm, "eps", None),
            n_power_iterations=getattr(norm, "n_power_iterations", None),
            sigma=_compute_sigma(norm, weight),
        )

    def make_matrix(self) -> Tensor | None:
        """Return what the chain's first SN normalises, a vector as one row."""
        norm = self.norm
        if not isinstance(norm, SpectralNormLink):
            return None  # a link of somebody's own need not take the norm of a matrix
        weight = compute_input(self.chain, norm)
        return weight[None] if weight.ndim == 1 else norm._reshape_weight_to_matrix(weight)


def find_parametrizations(path: str, module: nn.Module) -> list[ParametrizationSite]:
    """Return the sites of `torch.nn.utils.parametrizations.spectral_norm` in ``module``."""
    return [
        ParametrizationSite(path, module, tensor, chain, norm)
        for tensor, chain in list_chains(module)
        if (norm := find_spectral_norm_in(chain)) is not None
    ]


def _compute_sigma(norm: nn.Module, weight: Tensor) -> float:
    if not isinstance(norm, SpectralNormLink):
        return ask_sigma(norm, weight)
    if weight.ndim == 1:
        return float("nan") if weight.is_meta else float(torch.linalg.vector_norm(weight))
    matrix = norm._reshape_weight_to_matrix(weight)
    return stored_sigma(matrix, norm._u, norm._v)


def find_spectral_norm_in(chain: ParametrizationList) -> nn.Module | None:
    """Return the first link that is torch's spectral norm, or one that keeps its own vectors."""
    for link in chain._modules.values():
        if link is not None and (
            isinstance(link, SpectralNormLink)
            or any(_normalises(module, link, chain) for module in link.modules())
        ):
            return link
    return None


def _normalises(module: nn.Module, link: nn.Module, chain: ParametrizationList) -> bool:
    """Whether ``module``, which is ``link`` or a module within it, is a spectral norm."""
    if isinstance(module, SpectralNormLink):
        return True
    code = read_code(type(module))
    if code.is_torch:
        return False
    vectors = {} if not mentions_norm(code.names) else _select_vectors(iter_small_state(module))
    if vectors and chain.is_tensor and _fit(vectors, chain.original):
        return True
    # Parametrizations may keep the vectors at length one; then the code need not normalise.
    inner = ((name, c.original) for name, c in list_chains(module) if c.is_tensor)
    vectors |= _select_vectors((name, t) for name, t in inner if not t.requires_grad)
    if not vectors and (module is not link or not mentions_sigma(code.names)):
        return False
    try:
        return _divides(module, link, compute_input(chain, link), is_whole=not vectors)
    except Exception:  # an eval-mode forward would fail as well
        return False


def _select_vectors(state: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    return {name: t for name, t in state if is_named_as_vector(name)}


def _fit(vectors: dict[str, Tensor], weight: Tensor) -> bool:
    """Whether a vector could be a singular one of ``weight``, or of each matrix of a batch."""
    if weight.ndim < 2:
        return False
    if any(fits_weight(name, vector, weight) for name, vector in vectors.items()):
        return True
    batch, sides = weight.shape[:-2], weight.shape[-2:]
    return weight.ndim > 2 and any(
        v.shape == (*batch, side, *one)
        for v in vectors.values()
        for side in sides
        for one in ((), (1,))
    )


def _divides(module: nn.Module, link: nn.Module, weight: Tensor, is_whole: bool) -> bool:
    """Whether ``module`` divides what it is given by a number, or each matrix of it by its own.

    Its calls are recorded while ``link`` runs, which may hand it the weight in another shape, or
    take sigma from it and divide itself.

    Args:
        module: the module whose calls are recorded.
        link: what is run; it holds ``module``.
        weight: what ``link`` is given.
        is_whole: whether the factor has to be one number; weight norm has one for each row.
    """
    calls: list[tuple[Any, Any]] = []
    original = module.forward

    def record_call(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        calls.append((next(iter((*args, *kwargs.values())), None), result))
        return result

    def run() -> list[tuple[Any, Any]]:
        module.__dict__["forward"] = record_call
        calls.append((weight, link(weight)))
        return calls

    calls = compute_in_sandbox(run, link.modules())
    return any(_is_divided(given, result, is_whole) for given, result in calls)


def _is_divided(given: Any, result: Any, is_whole: bool) -> bool:
    value = next(iter(result), None) if isinstance(result, tuple) else result
    if not isinstance(given, Tensor) or not isinstance(value, Tensor) or value.shape != given.shape:
        return False
    if given.is_meta:
        return True
    if have_same_bits(given, value):
        return False
    if is_multiple(given, value) or (not is_whole and is_rescaled(given, value)):
        return True
    if given.ndim < 3:
        return False
    matrices = zip(given.flatten(0, -3), value.flatten(0, -3), strict=True)
    return all(is_multiple(one, other) for one, other in matrices)


def compute_input(chain: ParametrizationList, link: nn.Module) -> Tensor:
    """Return what ``link`` of ``chain`` is given: the links before it run, and leave no trace."""
    links = list(chain.children())
    before = links[: links.index(link)]

    def run() -> Tensor:
        inputs = list_originals(chain)
        for other in before:
            inputs = (other(*inputs),)
        return inputs[0].detach()

    if not before:
        return run()
    with torch.inference_mode(False), torch.no_grad():
        return run_without_trace(run, chain.modules())


def ask_sigma(link: nn.Module, weight: Tensor) -> float:
    """Return what ``link`` divides ``weight`` by in eval mode; NaN if it does something else."""
    if weight.is_meta:
        return math.nan
    value = compute_in_sandbox(lambda: link(weight), link.modules())
    if not isinstance(value, Tensor) or value.shape != weight.shape or value.dtype != weight.dtype:
        return math.nan
    with torch.no_grad():
        sigma = find_proportion(weight, value)
    return math.nan if sigma is None else sigma
