from .distributed import (
    find_parametrizations as find_parametrizations,
    find_spectral_norm as find_spectral_norm,
    frozen_parametrizations as frozen_parametrizations,
    frozen_spectral_norm as frozen_spectral_norm,
    gather_plain_state_dict as gather_plain_state_dict,
)
from .errors import (
    ExportError as ExportError,
    FreezeError as FreezeError,
    FrozenWeightChangedWarning as FrozenWeightChangedWarning,
    MissingRuntimeError as MissingRuntimeError,
    OutputNotExportedWarning as OutputNotExportedWarning,
    PrecisionLostWarning as PrecisionLostWarning,
    RandomInputsLeftOutWarning as RandomInputsLeftOutWarning,
    ReparametrizationNotAppliedWarning as ReparametrizationNotAppliedWarning,
    ReparametrizationNotRecognisedWarning as ReparametrizationNotRecognisedWarning,
    SnExportError as SnExportError,
    SpectralNormNotAppliedWarning as SpectralNormNotAppliedWarning,
    SpectralNormNotConvergedWarning as SpectralNormNotConvergedWarning,
    SpectralNormNotRecognisedWarning as SpectralNormNotRecognisedWarning,
    TracedDecisionWarning as TracedDecisionWarning,
)
from .exporting import (
    export_onnx as export_onnx,
)
from .freezing import (
    ParametrizationInfo as ParametrizationInfo,
    Registration as Registration,
    SpectralNormAdapter as SpectralNormAdapter,
    SpectralNormInfo as SpectralNormInfo,
    SpectralNormSuspect as SpectralNormSuspect,
    find_suspects as find_suspects,
    register_spectral_norm as register_spectral_norm,
)
from .proving import (
    check_case as check_case,
    check_parity as check_parity,
)
from .results import (
    Distance as Distance,
    Divergence as Divergence,
    ExportReport as ExportReport,
    FileInput as FileInput,
    FoldedInitializer as FoldedInitializer,
    Histogram as Histogram,
    ModuleParity as ModuleParity,
    OutputParity as OutputParity,
    ParityError as ParityError,
    ParityReport as ParityReport,
    Rounding as Rounding,
)
