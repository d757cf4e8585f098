"""Models that outgrow one process; `freezing` knows nothing of ranks."""

from .block import frozen_parametrizations, frozen_spectral_norm
from .find import find_parametrizations, find_spectral_norm
from .gather import gather_plain_state_dict, refuse_sharded

__all__ = [
    "find_parametrizations",
    "find_spectral_norm",
    "frozen_parametrizations",
    "frozen_spectral_norm",
    "gather_plain_state_dict",
    "refuse_sharded",
]
