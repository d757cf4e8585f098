"""Exact export of PyTorch models with spectral normalisation to ONNX."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .cases import check_case
    from .errors import (
        ExportError,
        FreezeError,
        FrozenWeightChangedWarning,
        OutputNotExportedWarning,
        ReparametrizationNotAppliedWarning,
        ReparametrizationNotRecognisedWarning,
        SnExportError,
        SpectralNormNotAppliedWarning,
        SpectralNormNotRecognisedWarning,
        TracedDecisionWarning,
    )
    from .exporting import export_onnx
    from .freezing import (
        ParametrizationInfo,
        Registration,
        SpectralNormAdapter,
        SpectralNormInfo,
        SpectralNormSuspect,
        find_parametrizations,
        find_spectral_norm,
        find_suspects,
        frozen_parametrizations,
        frozen_spectral_norm,
        register_spectral_norm,
    )
    from .parity import check_parity
    from .results import (
        Divergence,
        ExportReport,
        FoldedInitializer,
        Histogram,
        ModuleParity,
        OutputParity,
        ParityError,
        ParityReport,
    )

__all__ = [
    # Freezing
    "frozen_spectral_norm",
    "find_spectral_norm",
    "SpectralNormInfo",
    "find_suspects",
    "SpectralNormSuspect",
    "frozen_parametrizations",
    "find_parametrizations",
    "ParametrizationInfo",
    # Spectral norm of your own
    "register_spectral_norm",
    "SpectralNormAdapter",
    "Registration",
    # Exporting
    "export_onnx",
    "ExportReport",
    "FoldedInitializer",
    # Proving
    "check_parity",
    "check_case",
    "ParityReport",
    "OutputParity",
    "Histogram",
    "Divergence",
    "ModuleParity",
    # Errors
    "SnExportError",
    "FreezeError",
    "ExportError",
    "ParityError",
    # Warnings
    "FrozenWeightChangedWarning",
    "OutputNotExportedWarning",
    "ReparametrizationNotAppliedWarning",
    "ReparametrizationNotRecognisedWarning",
    "SpectralNormNotAppliedWarning",
    "SpectralNormNotRecognisedWarning",
    "TracedDecisionWarning",
]

_HOMES = {
    "cases": ("check_case",),
    "errors": (
        "ExportError",
        "FreezeError",
        "FrozenWeightChangedWarning",
        "OutputNotExportedWarning",
        "ReparametrizationNotAppliedWarning",
        "ReparametrizationNotRecognisedWarning",
        "SnExportError",
        "SpectralNormNotAppliedWarning",
        "SpectralNormNotRecognisedWarning",
        "TracedDecisionWarning",
    ),
    "exporting": ("export_onnx",),
    "freezing": (
        "ParametrizationInfo",
        "Registration",
        "SpectralNormAdapter",
        "SpectralNormInfo",
        "SpectralNormSuspect",
        "find_parametrizations",
        "find_spectral_norm",
        "find_suspects",
        "frozen_parametrizations",
        "frozen_spectral_norm",
        "register_spectral_norm",
    ),
    "parity": ("check_parity",),
    "results": (
        "Divergence",
        "ExportReport",
        "FoldedInitializer",
        "Histogram",
        "ModuleParity",
        "OutputParity",
        "ParityError",
        "ParityReport",
    ),
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for: ``sn-export --help`` needs no torch."""
    for module, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f".{module}", __name__), name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
