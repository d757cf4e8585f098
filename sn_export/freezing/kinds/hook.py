"""`torch.nn.utils.spectral_norm`: a forward pre-hook, its subclasses and copies included."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Iterator
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.utils.spectral_norm import SpectralNorm

from ...errors import FreezeError
from ...running import without_trace
from ..edits import Edits
from ..info import SpectralNormInfo
from ..introspection.sandbox import copied_attributes
from ..sigma import stored_sigma
from ..site import Site, plan_registration


class HookSite(Site):
    """A weight that a pre-hook computes from ``<name>_orig``, ``<name>_u``, ``<name>_v``."""

    __slots__ = ("hook",)
    kind = "hook"

    def __init__(self, path: str, module: nn.Module, hook: SpectralNorm) -> None:
        super().__init__(path, module, hook.name)
        self.hook = hook

    @property
    def sources(self) -> tuple[Tensor, ...]:
        """The raw weight and the singular vectors."""
        module, name = self.module, self.tensor
        try:
            return (
                module._parameters[name + "_orig"],
                module._buffers[name + "_u"],
                module._buffers[name + "_v"],
            )  # type: ignore[return-value]
        except KeyError as error:
            raise FreezeError(
                self.name,
                f"its spectral norm hook finds no parameter or buffer {error}",
                "Remove whatever renamed it (pruning, another reparametrization) first",
            ) from error

    @property
    def caller(self) -> nn.Module:
        """The module, whose pre-hook it is."""
        return self.module

    def value(self) -> Tensor:
        """Ask the hook, never the module: ``module.weight`` is old after load_state_dict."""
        if not self.is_applied:
            return self.value_in_use()
        if len(self.module._forward_pre_hooks) > 1:
            refuse_stacked(self)
        if type(self.hook) is SpectralNorm:
            return self._compute()
        with copied_attributes(self.hook):
            return without_trace(self._compute, [self.module]).clone()

    def _compute(self) -> Tensor:
        return self.hook.compute_weight(self.module, do_power_iteration=False)

    def plan(self, edits: Edits, frozen: Tensor) -> None:
        """Take away the hook with all it registered, and store ``frozen`` under its name."""
        module, name = self.module, self.tensor
        for hooks in (
            module._forward_pre_hooks,
            module._state_dict_hooks,
            module._load_state_dict_pre_hooks,
        ):
            if hooks:
                edits.remove(hooks, [key for key, entry in hooks.items() if self._owns(entry)])
        edits.remove(module._buffers, self._buffer_names())
        edits.remove(module._parameters, (name + "_orig",))
        edits.remove(module.__dict__, (name,))
        plan_registration(edits, module, name, frozen)

    def _buffer_names(self) -> list[str]:
        name = self.tensor
        names = [name + "_u", name + "_v"]
        if type(self.hook) is not SpectralNorm:
            names.append(name + "_sigma")  # what subclasses with soft normalisation add
        return names

    def _owns(self, entry: Any) -> bool:
        if entry is self.hook:
            return True
        owner = getattr(getattr(entry, "hook", entry), "fn", None)
        return owner is self.hook or (
            isinstance(owner, (SpectralNorm, type(self.hook))) and owner.name == self.tensor
        )

    def describe(self) -> SpectralNormInfo:
        """Return what `find_spectral_norm` lists."""
        hook = self.hook
        return self.norm_info(
            self.sources[0],
            dim=getattr(hook, "dim", 0),
            eps=getattr(hook, "eps", None),
            n_power_iterations=getattr(hook, "n_power_iterations", None),
            sigma=self._sigma(),
        )

    def matrix(self) -> Tensor | None:
        """Return the matrix unless the vectors are of another size, so of another operator."""
        weight, u, v = self.sources
        matrix = self.hook.reshape_weight_to_matrix(weight.detach())
        return matrix if (u.numel(), v.numel()) == tuple(matrix.shape) else None

    def _sigma(self) -> float:
        matrix = self.matrix()
        if matrix is not None:
            _, u, v = self.sources
            return stored_sigma(matrix, u.flatten(), v.flatten())
        # Norms of the convolution operator keep vectors of another size, and sigma itself.
        recorded = self.module._buffers.get(self.tensor + "_sigma")
        return float(recorded) if recorded is not None and recorded.numel() == 1 else math.nan


def refuse_stacked(site: Site) -> None:
    """Refuse a site whose tensor another hook computes from: that one runs on an old value.

    Hooks run in the order of registration, so the outer one, which was first, takes what the
    inner one has left behind at the forward before. No one value is the weight then.

    Raises:
        FreezeError: if another pre-hook derives a tensor from that of ``site``.
    """
    for hook in site.module._forward_pre_hooks.values():
        name = getattr(hook, "name", None) or getattr(hook, "_tensor_name", None)
        if isinstance(name, str) and site.tensor in {name + s for s in ("_orig", "_g", "_v")}:
            raise FreezeError(
                site.name,
                f"the hook of '{name}' computes from it, one forward behind its own hook",
                "Remove one of the two hooks first",
            )


def find_hooks(path: str, module: nn.Module) -> Iterable[HookSite]:
    """Return the sites of `torch.nn.utils.spectral_norm` in ``module``."""
    hooks = module._forward_pre_hooks
    return _sites(path, module) if hooks else ()


def _sites(path: str, module: nn.Module) -> Iterator[HookSite]:
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, SpectralNorm) or _is_copy(hook, module):
            yield HookSite(path, module, cast(SpectralNorm, hook))


def _is_copy(hook: Any, module: nn.Module) -> bool:
    """Whether ``hook`` is a copy of torch's class: the same method on the same buffers."""
    compute = getattr(hook, "compute_weight", None)
    name = getattr(hook, "name", None)
    if compute is None or not isinstance(name, str):
        return False
    return (
        name + "_orig" in module._parameters
        and {name + "_u", name + "_v"} <= module._buffers.keys()
        and hasattr(hook, "reshape_weight_to_matrix")
        and "do_power_iteration" in inspect.signature(compute).parameters
    )
