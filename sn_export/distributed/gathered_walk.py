"""The walk over a sharded model: a module is gathered before it is examined, errors reach all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ..errors import FreezeError
from ..freezing import Found, Kind, Site, Walk, walk
from ..running import undo_on_exit
from ..text import describe_error
from .fsdp import Unit, find_units

Take = Callable[[Site, "Unit | None"], None]


def find_sharded_units(model: nn.Module) -> dict[int, Unit]:
    """Return the units of ``model`` as `find_units` does; none where torch.distributed is unused.

    Raises:
        FreezeError: if the model is under FullyShardedDataParallel, whose pieces are no tensors.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return {}
    refuse_flat_shards(model)
    return find_units(model)


def find_gathered(
    model: nn.Module, units: dict[int, Unit], take: Take, find: Callable[[Walk], list[Found]]
) -> list[Found]:
    """Walk a sharded model; the unit of each module is gathered while the module is examined.

    Every rank makes the same collective calls, even if something fails on one of them.

    Args:
        model: the model.
        units: what `find_units` returned.
        take: called for each site while its unit is gathered.
        find: is given the walk, and returns the sites that it finds by it.

    Raises:
        FreezeError: on all ranks, if something failed on one.
    """
    walking = _GatheredWalk(units, take)
    found: list[Found] = []
    error: Exception | None = None
    for unit in set(units.values()):
        unit.reshard()
    with undo_on_exit(walking.leave):
        try:
            found = find(walking)
        except Exception as caught:  # raised below on every rank
            error = caught
    raise_on_all_ranks(walking.error or error, find_meshes(units), type(model).__name__)
    return found


class _GatheredWalk:
    """A walk that gathers the unit of a module before the kinds examine the module."""

    def __init__(self, units: dict[int, Unit], take: Take) -> None:
        self._units = units
        self._take = take
        self._current: list[Unit] = []
        self.error: Exception | None = None

    def __call__(
        self,
        model: nn.Module,
        kinds: Iterable[Kind],
        takes: Callable[[Site], bool] | None = None,
    ) -> Iterator[Found]:
        with torch.inference_mode(False), torch.no_grad():
            for module, sites in walk(model, [self._gather_kind(kind) for kind in kinds], takes):
                for site in sites:
                    self._guard(self._take, site, self._units.get(id(site.module)))
                yield module, sites

    def _gather_kind(self, kind: Kind) -> Kind:
        def find(path: str, module: nn.Module) -> Iterable[Site]:
            if not _may_compute(module):
                return ()
            self._enter(module)
            return list(self._guard(kind, path, module) or ())

        return find

    def _guard(self, call: Callable[..., Any], *args: Any) -> Any:
        try:
            return call(*args)
        except Exception as error:  # kept: the other ranks wait for the next collective call
            self.error = self.error or error
            return None

    def _enter(self, module: nn.Module) -> None:
        """Gather the unit of ``module``, and the units of its parametrizations."""
        inner = module._modules.get("parametrizations")
        modules = [module, *(inner.modules() if inner is not None else ())]
        units = list(dict.fromkeys(self._units[id(m)] for m in modules if id(m) in self._units))
        if not units or units == self._current:
            return
        self.leave()
        self._current = units
        for unit in units:
            unit.gather()

    def leave(self) -> None:
        """Reshard what is gathered; after an interrupt the call can be repeated."""
        for unit in self._current:
            unit.reshard()
        self._current = []


def _may_compute(module: nn.Module) -> bool:
    """Whether a kind may have to run ``module``, for which its weights must be whole."""
    is_plain = type(module).__module__.startswith("torch.") and not module._forward_pre_hooks
    return not is_plain or "parametrizations" in module._modules


def raise_on_all_ranks(error: Exception | None, meshes: Iterable[Any], path: str) -> None:
    """Raise on every rank of ``meshes`` the error of one of them; a collective call.

    Args:
        error: the error of this rank; None if nothing failed here.
        meshes: device meshes that this rank is part of, in the same order on each rank.
        path: named in place of a tensor where the error is no FreezeError.

    Raises:
        FreezeError: that of the lowest rank on which something failed, the same on every rank.
    """
    failed: dict[int, FreezeError] = {}
    if isinstance(error, FreezeError):
        failed[dist.get_rank()] = error
    elif error is not None:
        reason = f"it raised {describe_error(error)}"
        remedy = "The other ranks have left the block with this error too"
        failed[dist.get_rank()] = FreezeError(path, reason, remedy)
    for mesh in meshes:
        for group in mesh.get_all_groups():
            everyone: list[dict[int, FreezeError]] = [{} for _ in range(dist.get_world_size(group))]
            dist.all_gather_object(everyone, failed, group=group)
            failed = {rank: found for one in everyone for rank, found in one.items()}
    if failed:
        rank = min(failed)
        first = failed[rank]
        raise FreezeError(first.tensor, first.reason, first.remedy, rank) from error


def find_meshes(units: dict[int, Unit]) -> list[Any]:
    """Return the device meshes that the parameters of ``units`` are spread over."""
    found = {
        id(mesh): mesh for unit in dict.fromkeys(units.values()) for mesh in unit.list_meshes()
    }
    meshes: list[Any] = []
    for mesh in found.values():  # of equal meshes one is enough
        if mesh not in meshes:
            meshes.append(mesh)
    return meshes


def refuse_flat_shards(model: nn.Module) -> None:
    """Raise if ``model`` is under FullyShardedDataParallel (FSDP1) and its parameters are sharded.

    Inside ``summon_full_params`` they are whole, and the wrapped module is like any other.

    Raises:
        FreezeError: if they are sharded; the message says what to do.
    """
    from torch.distributed.fsdp import FullyShardedDataParallel  # takes a moment

    for path, module in model.named_modules():
        if not isinstance(module, FullyShardedDataParallel):
            continue
        if module.training_state.name != "SUMMON_FULL_PARAMS":
            names = (name for name, _ in module.module.named_parameters())
            first = next(names, "its parameters")
            raise FreezeError(
                path or type(module).__name__,
                f"FullyShardedDataParallel holds only a piece of '{first}' on this rank",
                "Enter FullyShardedDataParallel.summon_full_params(model, writeback=False) first "
                "and freeze model.module",
            )
