"""The known reparametrizations: a new one is one file and one line here."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torch.nn.utils.spectral_norm import SpectralNorm

from ..introspection.source_code import is_torch_layer, read_code
from ..site import Kind, Site, get_attributes
from .adapters import find_adapted, list_registrations
from .chain import find_chains
from .child_norm import find_child_norms
from .handwritten import Frozen
from .hook import find_hooks, find_weight_hooks
from .mixin import find_mixins
from .parametrization import find_parametrizations
from .prehook import find_prehooks
from .wrapper import find_wrappers

# Of code that is not torch's; the first that finds a weight in a module has it.
FAMILIES = (find_wrappers, find_mixins, find_child_norms)


def find_handwritten(path: str, module: nn.Module) -> Sequence[Site]:
    """Return the sites of what is not torch's: registered adapters first, then the families."""
    cls = type(module)
    is_layer = is_torch_layer(cls)
    hooks = get_attributes(module)["_forward_pre_hooks"]
    has_foreign_hooks = bool(hooks) and not all(map(_is_of_torch, hooks.values()))
    if is_layer and not has_foreign_hooks and not list_registrations():
        return ()
    sites: list[Site] = [*find_adapted(path, module)]
    if sites or isinstance(module, Frozen):
        return sites
    if has_foreign_hooks:
        sites += find_prehooks(path, module)
    code = None if is_layer else read_code(cls)
    if code is not None and not code.is_torch:
        for find in FAMILIES:
            if found := find(path, module, code):
                return [*sites, *found]
    return sites


def _is_of_torch(hook: object) -> bool:
    """Whether ``hook`` is torch's own, as fully_shard's is, or a subclass of its spectral norm."""
    if isinstance(hook, SpectralNorm):
        return True
    module = getattr(hook, "__module__", None) or ""  # of the function's code, or of the class
    return module.startswith("torch.")


SPECTRAL_NORM: tuple[Kind, ...] = (find_handwritten, find_hooks, find_parametrizations)
TORCH: tuple[Kind, ...] = (find_hooks, find_chains, find_weight_hooks)
ALL: tuple[Kind, ...] = (*SPECTRAL_NORM, find_chains, find_weight_hooks)
