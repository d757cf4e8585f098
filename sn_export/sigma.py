"""Sigma as it is stored: u, v and the weight matrix, without a power iteration."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def stored_sigma(matrix: Tensor, u: Tensor, v: Tensor) -> float:
    """Return ``u^H W v``, the spectral norm that the stored singular vectors estimate.

    The estimate of Miyato et al., "Spectral Normalization for Generative Adversarial
    Networks" (arXiv:1802.05957), as `torch.nn.utils.spectral_norm` computes it.

    Args:
        matrix: the weight as a matrix of shape ``(h, w)``, any floating or complex dtype.
        u: left singular vector, shape ``(h,)``.
        v: right singular vector, shape ``(w,)``.

    Returns:
        The estimate (its real part for complex weights); NaN where there are no values
        to read, as on the meta device.
    """
    if any(t.device.type == "meta" for t in (matrix, u, v)):
        return math.nan
    with torch.no_grad():
        sigma = torch.vdot(u, torch.mv(matrix, v))
        return float(sigma.real if sigma.is_complex() else sigma)
