"""The known implementations of spectral norm: a new one is one file and one line here."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ..adapters import adapters
from ..code import code_of, is_torch_layer
from ..frozen_class import Frozen
from ..site import Kind, Site
from .adapted import find_adapted
from .hook import find_hooks
from .mixin import find_mixins
from .parametrization import find_parametrizations
from .wrapper import find_wrappers


def find_handwritten(path: str, module: nn.Module) -> Sequence[Site]:
    """Return the sites of what is not torch's: registered adapters first, then the families."""
    cls = type(module)
    if is_torch_layer(cls) and not adapters():
        return ()
    sites: list[Site] = [*find_adapted(path, module)]
    if not (sites or is_torch_layer(cls) or isinstance(module, Frozen)):
        code = code_of(cls)
        if not code.is_torch:
            sites += find_wrappers(path, module, code) or find_mixins(path, module, code)
    return sites


SPECTRAL_NORM: tuple[Kind, ...] = (find_handwritten, find_hooks, find_parametrizations)
