"""The other pre-hooks of torch that set a weight: `torch.nn.utils.weight_norm` and pruning."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.weight_norm import WeightNorm

from ...errors import FreezeError
from ...running import without_trace
from ..edits import Edits
from ..info import Group
from ..introspection.sandbox import copied_attributes
from ..site import Site, plan_registration
from .hook import refuse_stacked


class WeightHookSite(Site):
    """A tensor that a pre-hook sets as a plain attribute before each forward."""

    __slots__ = ("hook", "key")
    raw: tuple[str, ...]  # suffixes of what it is computed from

    def __init__(self, path: str, module: nn.Module, tensor: str, key: int) -> None:
        super().__init__(path, module, tensor)
        self.key = key
        self.hook: Any = module._forward_pre_hooks[key]

    @property
    def sources(self) -> tuple[Tensor, ...]:
        """What the tensor is computed from."""
        module = self.module
        found = []
        for suffix in self.raw:
            name = self.tensor + suffix
            tensor: Tensor | None = module._parameters.get(name)
            if tensor is None:
                tensor = module._buffers.get(name)
            if tensor is None:
                raise FreezeError(
                    self.name,
                    f"its {self.group} hook finds no parameter or buffer '{name}'",
                    "Remove whatever renamed it (pruning, another reparametrization) first",
                )
            found.append(tensor)
        return tuple(found)

    @property
    def caller(self) -> nn.Module:
        """The module, whose pre-hook it is."""
        return self.module

    def value(self) -> Tensor:
        """Ask the hook, never the module: its attribute is old after load_state_dict."""
        if not self.is_applied:
            return self.value_in_use()
        _ = self.sources  # complete, or it says what is missing
        if len(self.module._forward_pre_hooks) > 1:
            refuse_stacked(self)
        if self._is_torch():
            return self._compute()
        with copied_attributes(self.hook):
            return without_trace(self._compute, [self.module]).clone()

    def _compute(self) -> Tensor:
        raise NotImplementedError

    def _is_torch(self) -> bool:
        raise NotImplementedError

    def plan(self, edits: Edits, frozen: Tensor) -> None:
        """Take away the hook with what it computes from, and store ``frozen``."""
        module, name = self.module, self.tensor
        edits.remove(module._forward_pre_hooks, (self.key,))
        raw = [name + suffix for suffix in self.raw]
        edits.remove(module._parameters, raw)
        edits.remove(module._buffers, raw)
        edits.remove(module.__dict__, (name,))
        plan_registration(edits, module, name, frozen)


class WeightNormSite(WeightHookSite):
    """A weight of `torch.nn.utils.weight_norm`, computed from its direction and magnitude."""

    __slots__ = ()
    kind = "weight_norm hook"
    group: Group = "weight_norm"
    raw = ("_g", "_v")

    def _compute(self) -> Tensor:
        value: Tensor = self.hook.compute_weight(self.module)
        return value

    def _is_torch(self) -> bool:
        return type(self.hook) is WeightNorm


class PruningSite(WeightHookSite):
    """A tensor under a mask of `torch.nn.utils.prune`, which may be made of several masks."""

    __slots__ = ()
    kind = "pruning"
    group: Group = "pruning"
    raw = ("_mask", "_orig")

    def _compute(self) -> Tensor:
        value: Tensor = self.hook.apply_mask(self.module)
        return value

    def _is_torch(self) -> bool:
        return type(self.hook).apply_mask is BasePruningMethod.apply_mask


def find_weight_hooks(path: str, module: nn.Module) -> Iterable[WeightHookSite]:
    """Return the sites of `torch.nn.utils.weight_norm` and `torch.nn.utils.prune`."""
    return _sites(path, module) if module._forward_pre_hooks else ()


def _sites(path: str, module: nn.Module) -> Iterator[WeightHookSite]:
    for key, hook in module._forward_pre_hooks.items():
        if isinstance(hook, BasePruningMethod):
            yield PruningSite(path, module, hook._tensor_name, key)
        elif isinstance(hook, WeightNorm) or _is_copy(hook, module):
            yield WeightNormSite(path, module, hook.name, key)  # type: ignore[attr-defined]


def _is_copy(hook: Any, module: nn.Module) -> bool:
    """Whether ``hook`` is a copy of torch's weight norm: the same method on such parameters."""
    name = getattr(hook, "name", None)
    return (
        isinstance(name, str)
        and hasattr(hook, "compute_weight")
        and {name + "_g", name + "_v"} <= module._parameters.keys()
    )
