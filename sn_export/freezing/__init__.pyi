from .block import (
    Block as Block,
    Planner as Planner,
    freeze_into as freeze_into,
    frozen_parametrizations as frozen_parametrizations,
    frozen_spectral_norm as frozen_spectral_norm,
)
from .edits import Edits as Edits
from .find import (
    BUDGET as BUDGET,
    add_exact_sigma as add_exact_sigma,
    describe_site as describe_site,
    describe_sites as describe_sites,
    find_parametrizations as find_parametrizations,
    find_spectral_norm as find_spectral_norm,
    find_suspects as find_suspects,
    find_unconverged as find_unconverged,
    make_norm_matrix as make_norm_matrix,
    measure_exact_sigma as measure_exact_sigma,
    select_unconverged as select_unconverged,
)
from .info import (
    Group as Group,
    ParametrizationInfo as ParametrizationInfo,
    SpectralNormInfo as SpectralNormInfo,
    UnconvergedSigma as UnconvergedSigma,
)
from .introspection.candidates import make_plain_name as make_plain_name
from .kinds.adapters import (
    Registration as Registration,
    SpectralNormAdapter as SpectralNormAdapter,
    register_spectral_norm as register_spectral_norm,
)
from .plan import (
    Plan as Plan,
    compute_value as compute_value,
)
from .selection import (
    Only as Only,
    Selection as Selection,
    Walk as Walk,
    walk as walk,
)
from .sigma import (
    exact_sigma as exact_sigma,
    exact_sigma_cost as exact_sigma_cost,
    stored_sigma as stored_sigma,
)
from .site import (
    Found as Found,
    Kind as Kind,
    Site as Site,
    require_module as require_module,
)
from .suspects import (
    SpectralNormSuspect as SpectralNormSuspect,
    warn_of_suspects as warn_of_suspects,
)
