"""Handwritten spectral norms that are registered as a parametrization."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.parametrize import ParametrizationList

from ...running import without_trace
from ..introspection.sandbox import compute_in_sandbox
from ..introspection.singular_vectors import (
    NORMS,
    fits,
    is_multiple,
    is_named_as_vector,
    proportion,
    small_state,
)
from ..introspection.source_code import code_of
from .chain import chains, originals_of


def spectral_norm_in(chain: ParametrizationList) -> nn.Module | None:
    """Return the first link that is torch's spectral norm, or one that keeps its own vectors."""
    for link in chain._modules.values():
        if link is not None and (isinstance(link, _SpectralNorm) or _is_handwritten(link, chain)):
            return link
    return None


def _is_handwritten(link: nn.Module, chain: ParametrizationList) -> bool:
    code = code_of(type(link))
    if code.is_torch:
        return False
    vectors = {} if NORMS.isdisjoint(code.names) else _named(small_state(link))
    if vectors and chain.is_tensor and _fit(vectors, chain.original):
        return True
    # Where the vectors are kept at length one by parametrizations, its own code need not do it.
    inner = ((name, c.original) for name, c in chains(link) if c.is_tensor)
    vectors |= _named((name, t) for name, t in inner if not t.requires_grad)
    if not vectors:
        return False
    try:
        weight = arriving(chain, link)
        return _fit(vectors, weight) and _divides(link, weight)
    except Exception:  # an eval-mode forward would fail as well
        return False


def _named(state: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    return {name: t for name, t in state if is_named_as_vector(name)}


def _fit(vectors: dict[str, Tensor], weight: Tensor) -> bool:
    if weight.ndim < 2:
        return False
    if any(fits(name, vector, weight) for name, vector in vectors.items()):
        return True
    batch = {name: v for name, v in vectors.items() if v.ndim == 3 and len(v) == len(weight) > 0}
    return weight.ndim == 3 and any(fits(name, v[0], weight[0]) for name, v in batch.items())


def _divides(link: nn.Module, weight: Tensor) -> bool:
    value = compute_in_sandbox(lambda: link(weight), link.modules())
    if not isinstance(value, Tensor) or value.shape != weight.shape:
        return False
    return is_multiple(weight, value) or (weight.ndim == 3 and all(map(is_multiple, weight, value)))


def arriving(chain: ParametrizationList, link: nn.Module) -> Tensor:
    """Return what ``link`` of ``chain`` is given: the links before it run, and leave no trace."""
    links = list(chain.children())
    before = links[: links.index(link)]

    def run() -> Tensor:
        inputs = originals_of(chain)
        for other in before:
            inputs = (other(*inputs),)
        return inputs[0].detach()

    if not before:
        return run()
    with torch.inference_mode(False), torch.no_grad():
        return without_trace(run, chain.modules())


def asked_sigma(link: nn.Module, weight: Tensor) -> float:
    """Return what ``link`` divides ``weight`` by in eval mode; NaN if it does something else."""
    if weight.is_meta:
        return math.nan
    value = compute_in_sandbox(lambda: link(weight), link.modules())
    if not isinstance(value, Tensor) or value.shape != weight.shape or value.dtype != weight.dtype:
        return math.nan
    with torch.no_grad():
        sigma = proportion(weight, value)
    return math.nan if sigma is None else sigma
