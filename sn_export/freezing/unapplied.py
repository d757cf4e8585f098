"""What a network reads past the call of a layer: hooks that never run, raw weights in use."""

from __future__ import annotations

from functools import cached_property

from torch import nn

from .introspection.child_uses import ChildUses
from .introspection.source_code import names_of_methods
from .site import Site


class Callers:
    """What the code of a network calls, asked when there is a hook to ask it for.

    Args:
        model: the network that is frozen; what is outside of it calls nothing.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._reads: dict[str, dict[tuple[nn.Module, str], nn.Module]] = {}

    def mark(self, site: Site) -> None:
        """Say of ``site`` why its hook never runs, if that is so."""
        if site.caller is None:
            return
        if getattr(type(site.caller), "forward", None) is nn.Module.forward:  # to be overridden
            site.unapplied = "nothing calls a " + _class_name(site.caller)
            return
        reads = self._reads_of(site.tensor)
        reader = reads.get((site.module, site.tensor)) or reads.get((site.module, "*"))
        if reader is not None and site.caller not in self._calls:
            child = site.path.rpartition(".")[2]
            what = f"reads the {site.tensor} of {child} without calling it"
            site.unapplied = f"{_class_name(reader)} {what}"

    def is_read_raw(self, site: Site) -> bool:
        """Whether a forward reads the raw parameter that the module of ``site`` normalises itself.

        No one plain weight serves both, so that layer is left as it is.
        """
        if not site.keeps_raw_name or (site.module, site.tensor) not in self._reads_of(site.tensor):
            return False
        return (site.module, site.tensor) in ChildUses(self._owners, from_forward=True).reads

    def _reads_of(self, tensor: str) -> dict[tuple[nn.Module, str], nn.Module]:
        if tensor not in self._reads:
            readers = [m for m in self._owners if tensor in names_of_methods(type(m))]
            self._reads[tensor] = ChildUses(readers).reads  # of most networks no class does
        return self._reads[tensor]

    @cached_property
    def _owners(self) -> list[nn.Module]:
        return [module for module in self._model.modules() if module._modules]

    @cached_property
    def _calls(self) -> set[nn.Module]:
        return ChildUses(self._owners).calls


def _class_name(module: nn.Module) -> str:
    cls = type(module)
    return f"torch.nn.{cls.__name__}" if cls.__module__.startswith("torch.nn.") else cls.__name__
