"""Freezing: the walk, the plan and the exact undo. It knows nothing of ONNX."""

from .context import find_spectral_norm, frozen_spectral_norm, require_module
from .site import SpectralNormInfo

__all__ = [
    "SpectralNormInfo",
    "find_spectral_norm",
    "frozen_spectral_norm",
    "require_module",
]
