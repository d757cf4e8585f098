"""Models that are spread over several ranks; `freezing` knows nothing of ranks."""

from .block import (
    Description as Description,
    find_parametrizations as find_parametrizations,
    find_spectral_norm as find_spectral_norm,
    frozen_parametrizations as frozen_parametrizations,
    frozen_spectral_norm as frozen_spectral_norm,
    gather_plain_state_dict as gather_plain_state_dict,
    refuse_sharded as refuse_sharded,
)
from .gathered_walk import find_sharded_units as find_sharded_units
from .sharded_model import GatheredNetwork as GatheredNetwork, lead_export as lead_export
