"""Freezing: the walk, the plan and the exact undo. It knows nothing of ONNX."""

from .adapters import Registration, SpectralNormAdapter, register_spectral_norm
from .context import (
    described,
    find_spectral_norm,
    find_suspects,
    frozen_spectral_norm,
    require_module,
)
from .exact import with_exact_sigma
from .site import SpectralNormInfo
from .suspects import SpectralNormSuspect

__all__ = [
    "Registration",
    "SpectralNormAdapter",
    "SpectralNormInfo",
    "SpectralNormSuspect",
    "described",
    "find_spectral_norm",
    "find_suspects",
    "frozen_spectral_norm",
    "register_spectral_norm",
    "require_module",
    "with_exact_sigma",
]
