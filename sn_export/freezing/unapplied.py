"""What a network reads past the call of a layer: hooks that never run, raw weights in use."""

from __future__ import annotations

from functools import cached_property

from torch import Tensor, nn

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
        if not _is_called(site.caller):
            site.unapplied = "nothing calls a " + _class_name(site.caller)
            return
        reads = self._reads_of(site.tensor)
        reader = reads.get((site.module, site.tensor)) or reads.get((site.module, "*"))
        runner = None if reader is not None else self._runner_around(site)
        if (reader is None and runner is None) or site.caller in self._uses.calls:
            return
        child = site.path.rpartition(".")[2]
        if reader is not None and site.caller not in self._uses.handed:
            what = f"reads the {site.tensor} of {child} without calling it"
            site.unapplied = f"{_class_name(reader)} {what}"
        elif runner is not None or (runner := self._runner_around(site)) is not None:
            site.unapplied = f"{_class_name(runner)} has run without calling {child}"

    def _runner_around(self, site: Site) -> nn.Module | None:
        """Return the module around a layer that has run, though the layer has not.

        Before its first call a hook of torch's has left the raw parameter as the weight.
        """
        if not _has_raw_weight(site.module, site.tensor):
            return None
        around = self._parents.get(site.module)
        while around is not None and not _is_called(around):
            around = self._parents.get(around)
        if around is None:
            return None
        stored = (
            (module, name.removesuffix("_orig"))
            for module in around.modules()
            for name in module._parameters
            if name.endswith("_orig")
        )
        has_run = any(_has_raw_weight(module, name) is False for module, name in stored)
        return around if has_run else None

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
    def _uses(self) -> ChildUses:
        return ChildUses(self._owners)

    @cached_property
    def _parents(self) -> dict[nn.Module, nn.Module]:
        return {c: m for m in self._owners for c in m._modules.values() if c is not None}


def _is_called(module: nn.Module) -> bool:
    """Whether a module has a forward; a `torch.nn.ModuleList` has none."""
    return getattr(type(module), "forward", None) is not nn.Module.forward


def _has_raw_weight(module: nn.Module, tensor: str) -> bool | None:
    """Whether the weight of a layer is its raw parameter still; None where it has none of both."""
    raw, weight = module._parameters.get(f"{tensor}_orig"), module.__dict__.get(tensor)
    if raw is None or not isinstance(weight, Tensor):
        return None
    return weight.data_ptr() == raw.data_ptr()


def _class_name(module: nn.Module) -> str:
    cls = type(module)
    return f"torch.nn.{cls.__name__}" if cls.__module__.startswith("torch.nn.") else cls.__name__
