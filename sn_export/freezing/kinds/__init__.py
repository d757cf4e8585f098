"""The known implementations of spectral norm: a new one is one file and one line here."""

from __future__ import annotations

from ..site import Kind
from .adapted import find_adapted
from .hook import find_hooks
from .mixin import find_mixins
from .parametrization import find_parametrizations
from .wrapper import find_wrappers

SPECTRAL_NORM: tuple[Kind, ...] = (
    find_adapted,
    find_hooks,
    find_parametrizations,
    find_wrappers,
    find_mixins,
)
