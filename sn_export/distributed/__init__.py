"""Models that are spread over several ranks; `freezing` knows nothing of ranks."""

from .block import (
    Description,
    find_parametrizations,
    find_spectral_norm,
    frozen_parametrizations,
    frozen_spectral_norm,
    gather_plain_state_dict,
    refuse_sharded,
)
from .gathered_walk import find_sharded_units
from .sharded_model import GatheredNetwork, lead_export

__all__ = [
    "Description",
    "GatheredNetwork",
    "find_parametrizations",
    "find_sharded_units",
    "find_spectral_norm",
    "frozen_parametrizations",
    "frozen_spectral_norm",
    "gather_plain_state_dict",
    "lead_export",
    "refuse_sharded",
]
