"""Freezing: the walk, the plan and the exact undo. It knows nothing of ONNX."""

from ..running.wrapped_models import unwrapped
from .adapters import Registration, SpectralNormAdapter, register_spectral_norm
from .exact import with_exact_sigma
from .find import described, find_parametrizations, find_spectral_norm, find_suspects
from .freeze import frozen_and_kept, frozen_parametrizations, frozen_spectral_norm
from .site import ParametrizationInfo, SpectralNormInfo, require_module
from .suspects import SpectralNormSuspect

__all__ = [
    "ParametrizationInfo",
    "Registration",
    "SpectralNormAdapter",
    "SpectralNormInfo",
    "SpectralNormSuspect",
    "described",
    "find_parametrizations",
    "find_spectral_norm",
    "find_suspects",
    "frozen_and_kept",
    "frozen_parametrizations",
    "frozen_spectral_norm",
    "register_spectral_norm",
    "require_module",
    "unwrapped",
    "with_exact_sigma",
]
