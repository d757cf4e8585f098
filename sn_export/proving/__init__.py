"""Run a file in onnxruntime, and hold its outputs against those of the model."""

from .cases import Case, check_case, opened_case, write_case
from .dynamic_sizes import references_beyond, resized_references
from .external_data import find_stale_data, save, weight_bytes
from .module_errors import called_name, type_name
from .module_scopes import using_modules
from .parity import check_parity, coarsest_of
from .pictures import find_shown
from .proof import Proof, differs, require_same_network
from .session import ort
from .tolerances import ProofSettings
from .truth import Freezing
from .verdicts import describe_unconverged, is_imprecise, unconverged_note

__all__ = [
    "Case",
    "Freezing",
    "Proof",
    "ProofSettings",
    "called_name",
    "check_case",
    "check_parity",
    "coarsest_of",
    "describe_unconverged",
    "differs",
    "find_shown",
    "find_stale_data",
    "is_imprecise",
    "opened_case",
    "ort",
    "references_beyond",
    "require_same_network",
    "resized_references",
    "save",
    "type_name",
    "unconverged_note",
    "using_modules",
    "weight_bytes",
    "write_case",
]
