"""The pre-hooks of torch that set a weight: spectral norm, weight norm, pruning; copies too."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from functools import cache
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from ...errors import FreezeError
from ...running import run_without_trace
from ..edits import Edits
from ..info import Group, SpectralNormInfo
from ..introspection.sandbox import copied_attributes
from ..sigma import stored_sigma
from ..site import Site, find_owner_of_state_hook, get_attributes


class HookSite(Site):
    """A tensor that a pre-hook sets as a plain attribute before each forward."""

    __slots__ = ("hook", "key")
    raw: ClassVar[tuple[str, ...]]  # suffixes of what it is computed from
    beside: ClassVar[tuple[str, ...]] = ()  # and of buffers that a hook not of torch keeps
    method: ClassVar[str]  # of the hook, which computes it
    of_torch: ClassVar[type]  # the class of torch's own hook

    def __init__(self, path: str, module: nn.Module, tensor: str, key: int, hook: Any) -> None:
        Site.__init__(self, path, module, tensor)  # quicker than by `super`
        self.key = key
        self.hook = hook

    @property
    def sources(self) -> tuple[Tensor, ...]:
        """What the tensor is computed from."""
        parameters, buffers = self.attributes["_parameters"], self.attributes["_buffers"]
        found = []
        for name in _add_suffixes(self.tensor, self.raw):
            tensor: Tensor | None = parameters.get(name)
            if tensor is None:
                tensor = buffers.get(name)
            if tensor is None:
                raise FreezeError(
                    self.name,
                    f"its {self.group.replace('_', ' ')} hook finds no parameter or buffer "
                    f"'{name}'",
                    "Remove whatever renamed it (pruning, another reparametrization) first",
                )
            found.append(tensor)
        return tuple(found)

    @property
    def caller(self) -> nn.Module:
        """The module itself: its call runs the pre-hook."""
        return self.module

    def value(self) -> Tensor:
        """Call the hook's method; the attribute of the module is old after load_state_dict."""
        if self.unapplied:
            return self.get_value_in_use()
        if len(self.module._forward_pre_hooks) > 1:
            self._refuse_stacked()
        if self._is_torch():
            return self._compute()
        with copied_attributes(self.hook):
            return run_without_trace(self._compute, [self.module]).clone()

    def _refuse_stacked(self) -> None:
        """Refuse a site whose tensor another hook computes from: that one runs on an old value.

        Hooks run in the order of registration, so the outer one, which was first, takes what the
        inner one has left behind at the forward before. No one value is the weight then.
        """
        for hook in self.module._forward_pre_hooks.values():
            name = getattr(hook, "name", None) or getattr(hook, "_tensor_name", None)
            if isinstance(name, str) and self.tensor in {name + s for s in ("_orig", "_g", "_v")}:
                raise FreezeError(
                    self.name,
                    f"the hook of '{name}' computes from it, one forward behind its own hook",
                    "Remove one of the two hooks first",
                )

    def _compute(self) -> Tensor:
        """Call the hook's own method for the tensor."""
        _ = self.sources  # raises an error that names what is missing
        value: Tensor = getattr(self.hook, self.method)(self.module)
        return value

    def _is_torch(self) -> bool:
        """Whether that method is torch's own, which leaves no trace."""
        return type(self.hook) is self.of_torch

    def plan(self, edits: Edits, frozen: Tensor) -> None:
        """Take away the hook with all it registered, and store ``frozen`` under its name."""
        attributes, tensor = self.attributes, self.tensor
        edits.remove(attributes["_forward_pre_hooks"], (self.key,))
        for kind in ("_state_dict_hooks", "_load_state_dict_pre_hooks"):
            if hooks := attributes[kind]:
                edits.remove(hooks, [key for key, entry in hooks.items() if self._owns(entry)])
        raw = _add_suffixes(tensor, self.raw)
        edits.remove(attributes["_parameters"], raw)
        if self.beside and not self._is_torch():
            raw += _add_suffixes(tensor, self.beside)
        edits.remove(attributes["_buffers"], raw)
        edits.remove_attribute(attributes, tensor)
        self.register(edits, frozen)

    def _owns(self, entry: Any) -> bool:
        """Whether ``entry``, a hook on the state dict, serves this one; copies may have parted."""
        owner = find_owner_of_state_hook(entry)
        return owner is self.hook or (
            isinstance(owner, (SpectralNorm, type(self.hook))) and owner.name == self.tensor
        )


class SpectralNormSite(HookSite):
    """A weight of `torch.nn.utils.spectral_norm`, its subclasses and copies."""

    __slots__ = ()
    kind = "hook"
    of_torch = SpectralNorm
    raw = ("_orig", "_u", "_v")
    beside = ("_sigma",)  # of soft normalisation

    def _compute(self) -> Tensor:
        """Call the method of the hook, without a power iteration."""
        weight: Tensor = self.hook.compute_weight(self.module, do_power_iteration=False)
        return weight

    def describe(self) -> SpectralNormInfo:
        """Return what `find_spectral_norm` lists."""
        hook = self.hook
        return self.make_norm_info(
            self.sources[0],
            dim=getattr(hook, "dim", 0),
            eps=getattr(hook, "eps", None),
            n_power_iterations=getattr(hook, "n_power_iterations", None),
            sigma=self._compute_sigma(),
        )

    def make_matrix(self) -> Tensor | None:
        """Return the matrix unless the vectors are of another size, so of another operator."""
        weight, u, v = self.sources
        matrix: Tensor = self.hook.reshape_weight_to_matrix(weight.detach())
        return matrix if (u.numel(), v.numel()) == tuple(matrix.shape) else None

    def _compute_sigma(self) -> float:
        matrix = self.make_matrix()
        if matrix is not None:
            _, u, v = self.sources
            return stored_sigma(matrix, u.flatten(), v.flatten())
        # Norms of the convolution operator keep vectors of another size, and sigma itself.
        recorded = self.module._buffers.get(self.tensor + "_sigma")
        return float(recorded) if recorded is not None and recorded.numel() == 1 else math.nan


class WeightNormSite(HookSite):
    """A weight of `torch.nn.utils.weight_norm`, computed from its direction and magnitude."""

    __slots__ = ()
    kind = "weight_norm hook"
    of_torch = WeightNorm
    group: Group = "weight_norm"
    raw = ("_g", "_v")
    method = "compute_weight"


class PruningSite(HookSite):
    """A tensor under a mask of `torch.nn.utils.prune`, which may be made of several masks."""

    __slots__ = ()
    kind = "pruning"
    group: Group = "pruning"
    raw = ("_mask", "_orig")
    method = "apply_mask"

    def _is_torch(self) -> bool:
        return type(self.hook).apply_mask is BasePruningMethod.apply_mask


@cache  # few names, and thousands of layers
def _add_suffixes(tensor: str, suffixes: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(tensor + suffix for suffix in suffixes)


def find_hooks(path: str, module: nn.Module) -> list[HookSite]:
    """Return the sites of `torch.nn.utils.spectral_norm` in ``module``."""
    return [
        SpectralNormSite(path, module, hook.name, key, hook)
        for key, hook in get_attributes(module)["_forward_pre_hooks"].items()
        if isinstance(hook, SpectralNorm) or _is_copy_of_spectral_norm(hook, module)
    ]


def find_weight_hooks(path: str, module: nn.Module) -> list[HookSite]:
    """Return the sites of `torch.nn.utils.weight_norm` and `torch.nn.utils.prune`."""
    sites: list[HookSite] = []
    for key, hook in module._forward_pre_hooks.items():
        if isinstance(hook, BasePruningMethod):
            sites.append(PruningSite(path, module, hook._tensor_name, key, hook))
        elif isinstance(hook, WeightNorm) or _is_copy_of_weight_norm(hook, module):
            sites.append(WeightNormSite(path, module, hook.name, key, hook))  # type: ignore[attr-defined]
    return sites


def _is_copy_of_spectral_norm(hook: Any, module: nn.Module) -> bool:
    """Whether ``hook`` is a copy of torch's class: the same method on the same buffers."""
    compute, name = getattr(hook, "compute_weight", None), getattr(hook, "name", None)
    return (
        isinstance(name, str)
        and name + "_orig" in module._parameters
        and {name + "_u", name + "_v"} <= module._buffers.keys()
        and hasattr(hook, "reshape_weight_to_matrix")
        and "do_power_iteration" in _list_parameters(compute)
    )


def _is_copy_of_weight_norm(hook: Any, module: nn.Module) -> bool:
    """Whether ``hook`` is a copy of torch's weight norm: the same method on such parameters."""
    name = getattr(hook, "name", None)
    return (
        isinstance(name, str)
        and hasattr(hook, "compute_weight")
        and {name + "_g", name + "_v"} <= module._parameters.keys()
    )


def _list_parameters(function: Callable[..., Any] | None) -> frozenset[str]:
    return frozenset() if function is None else frozenset(inspect.signature(function).parameters)
