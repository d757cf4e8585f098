"""Run a file in onnxruntime, and hold its outputs against those of the model."""

from .cases import (
    Case as Case,
    check_case as check_case,
    open_case as open_case,
    write_case as write_case,
)
from .dynamic_sizes import run_beyond_program as run_beyond_program, run_resized as run_resized
from .external_data import (
    count_weight_bytes as count_weight_bytes,
    find_stale_data as find_stale_data,
    save as save,
)
from .module_errors import name_called as name_called
from .module_scopes import find_using_modules as find_using_modules
from .parity import check_parity as check_parity, find_coarsest as find_coarsest
from .pictures import find_shown as find_shown
from .proof import Proof as Proof, differs as differs, require_same_network as require_same_network
from .session import open_graph as open_graph, ort as ort
from .tolerances import ProofSettings as ProofSettings
from .truth import Freezing as Freezing
from .verdicts import (
    describe_unconverged as describe_unconverged,
    explain_unconverged as explain_unconverged,
    is_imprecise as is_imprecise,
)
