"""Freezing: the walk, the plan and the exact undo. It knows nothing of ONNX."""

from .context import find_spectral_norm, frozen_spectral_norm, require_module
from .exact import with_exact_sigma
from .site import SpectralNormInfo

__all__ = [
    "SpectralNormInfo",
    "find_spectral_norm",
    "frozen_spectral_norm",
    "require_module",
    "with_exact_sigma",
]
