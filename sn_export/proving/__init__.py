"""Run a file in onnxruntime, and hold its outputs against those of the model."""

from .cases import Case, check_case, open_case, write_case
from .dynamic_sizes import run_beyond_program, run_resized
from .external_data import count_weight_bytes, find_stale_data, save
from .module_errors import name_called
from .module_scopes import find_using_modules
from .parity import check_parity, find_coarsest
from .pictures import find_shown
from .proof import Proof, differs, require_same_network
from .session import ort
from .tolerances import ProofSettings
from .truth import Freezing
from .verdicts import describe_unconverged, explain_unconverged, is_imprecise

__all__ = [
    "Case",
    "Freezing",
    "Proof",
    "ProofSettings",
    "check_case",
    "check_parity",
    "count_weight_bytes",
    "describe_unconverged",
    "differs",
    "explain_unconverged",
    "find_coarsest",
    "find_shown",
    "find_stale_data",
    "find_using_modules",
    "is_imprecise",
    "name_called",
    "open_case",
    "ort",
    "require_same_network",
    "run_beyond_program",
    "run_resized",
    "save",
    "write_case",
]
