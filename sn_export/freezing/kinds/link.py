"""Handwritten spectral norms that are registered as a parametrization."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.parametrize import ParametrizationList

from ...preserving import without_trace
from ..asking import ask
from ..code import code_of
from ..vectors import NORMS, fits, is_multiple, is_named_as_vector, proportion, small_state
from .chain import originals_of


def spectral_norm_in(chain: ParametrizationList) -> nn.Module | None:
    """Return the first link that is torch's spectral norm, or one that keeps its own vectors."""
    for link in chain._modules.values():
        if link is not None and (isinstance(link, _SpectralNorm) or _is_handwritten(link, chain)):
            return link
    return None


def _is_handwritten(link: nn.Module, chain: ParametrizationList) -> bool:
    code = code_of(type(link))
    if code.is_torch or NORMS.isdisjoint(code.names):
        return False
    vectors = {name: t for name, t in small_state(link) if is_named_as_vector(name)}
    if not vectors:
        return False
    if chain.is_tensor and _fit(vectors, chain.original):
        return True
    try:
        weight = arriving(chain, link)
        return _fit(vectors, weight) and _divides(link, weight)
    except Exception:  # an eval-mode forward would fail as well
        return False


def _fit(vectors: dict[str, Tensor], weight: Tensor) -> bool:
    return weight.ndim >= 2 and any(fits(name, t, weight) for name, t in vectors.items())


def _divides(link: nn.Module, weight: Tensor) -> bool:
    value = ask(lambda: link(weight), link.modules())
    return isinstance(value, Tensor) and is_multiple(weight, value)


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
    value = ask(lambda: link(weight), link.modules())
    if not isinstance(value, Tensor) or value.shape != weight.shape or value.dtype != weight.dtype:
        return math.nan
    with torch.no_grad():
        sigma = proportion(weight, value)
    return math.nan if sigma is None else sigma
