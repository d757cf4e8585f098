"""Handwritten spectral norms that are registered as a parametrization."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import _SpectralNorm

from ..asking import ask
from ..code import code_of
from ..vectors import NORMS, fits, is_named_as_vector, proportion, small_state


def is_spectral_norm(link: nn.Module | None, weight: Tensor | None) -> bool:
    """Whether ``link`` of a chain is torch's spectral norm, or one that keeps its own vectors.

    Args:
        link: one module of a `torch.nn.utils.parametrize.ParametrizationList`.
        weight: what the chain starts from; None if that is several tensors.
    """
    if isinstance(link, _SpectralNorm):
        return True
    if link is None or weight is None or weight.ndim < 2:
        return False
    code = code_of(type(link))
    return (
        not code.is_torch
        and not NORMS.isdisjoint(code.names)
        and any(is_named_as_vector(n) and fits(n, t, weight) for n, t in small_state(link))
    )


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
