"""The known implementations of spectral norm: a new one is one file and one line here."""

from __future__ import annotations

from ..site import Kind
from .hook import find_hooks
from .parametrization import find_parametrizations

SPECTRAL_NORM: tuple[Kind, ...] = (find_hooks, find_parametrizations)
