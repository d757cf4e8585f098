"""Exact export of PyTorch models with spectral normalisation to ONNX."""

from .errors import (
    ExportError,
    FreezeError,
    FrozenWeightChangedWarning,
    ParityError,
    SnExportError,
    SpectralNormNotAppliedWarning,
)
from .exporting import ExportReport, export_onnx
from .freezing import SpectralNormInfo, find_spectral_norm, frozen_spectral_norm
from .parity import OutputParity, ParityReport, check_parity

__all__ = [
    # Freezing
    "frozen_spectral_norm",
    "find_spectral_norm",
    "SpectralNormInfo",
    # Exporting
    "export_onnx",
    "ExportReport",
    # Proving
    "check_parity",
    "ParityReport",
    "OutputParity",
    # Errors
    "SnExportError",
    "FreezeError",
    "ExportError",
    "ParityError",
    # Warnings
    "FrozenWeightChangedWarning",
    "SpectralNormNotAppliedWarning",
]
