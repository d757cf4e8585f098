"""Models that outgrow one process; `freezing` knows nothing of ranks."""

from .block import frozen_parametrizations, frozen_spectral_norm
from .find import Description, find_parametrizations, find_spectral_norm
from .gathered_walk import sharded_units
from .plain_network import gather_plain_state_dict, refuse_sharded
from .sharded_model import GatheredNetwork, lead_export

__all__ = [
    "Description",
    "GatheredNetwork",
    "find_parametrizations",
    "find_spectral_norm",
    "frozen_parametrizations",
    "frozen_spectral_norm",
    "gather_plain_state_dict",
    "lead_export",
    "refuse_sharded",
    "sharded_units",
]
