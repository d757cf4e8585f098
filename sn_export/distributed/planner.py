"""Plans for models whose parameters are spread over ranks, by FSDP2 (`fully_shard`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from ..errors import FreezeError
from ..freezing import Found, Plan, Planner, Site, Walk, compute_value
from .fsdp import Unit, copy_for_places, gather_in_layout, is_gathered_as, list_holders, make_shard
from .gathered_walk import find_gathered, find_meshes, find_sharded_units, raise_on_all_ranks

# The attribute by which DistributedDataParallel sends buffers or not; its name depends on torch.
_SENDS = ("broadcast_buffers", "forward_sync_buffers")


class RankPlanner(Planner):
    """Plans a sharded model on every rank, and any other model as in one process.

    Entering the block of a sharded model is a collective call: one unit after the other is
    gathered, its weights are computed, and this rank keeps its shard of each.
    """

    def find(self, model: nn.Module, frozen: Iterable[Site]) -> list[Found]:
        """Return the modules with their sites, and keep this rank's shards of the values.

        Raises:
            FreezeError: as `freezing.Selection.find`, on all ranks if on one; if the model is
                under FullyShardedDataParallel.
        """
        self._shards: dict[int, _Shard] = {}
        self._units = find_sharded_units(model)
        if not self._units:
            return super().find(model, frozen)

        def find(walk: Walk) -> list[Found]:
            return self.selection.find(model, frozen, walk)

        return find_gathered(model, self._units, self._keep_shard, find)

    def plan(self, model: nn.Module, found: Sequence[Found]) -> Plan:
        """Return the plan, or raise on all ranks the error of one."""
        if not self._units:
            try:
                plan = Plan(found, self.keep)
            except FreezeError as failed:
                told = _name_placement(failed, found)
                if told is failed:
                    raise
                raise told from failed
            keep_replicas_apart(found, plan)
            return plan
        error: Exception | None = None
        made: ShardedPlan | None = None
        try:
            made = ShardedPlan(found, self._shards, self._units)
        except Exception as caught:  # raised below on every rank
            error = caught
        raise_on_all_ranks(error, find_meshes(self._units), type(model).__name__)
        assert made is not None
        return made

    def _keep_shard(self, site: Site, unit: Unit | None) -> None:
        raw = [] if unit is None else _find_raw_params(unit, site)
        _require_dtype(site, raw)
        value = compute_value(site)
        if not raw:
            self._shards[id(site)] = _Shard(value)
            return
        fitting = [param for _, param in raw if param._orig_size == value.shape]
        if not fitting:
            shapes = ", ".join(str(tuple(param._orig_size)) for _, param in raw)
            raise FreezeError(
                site.name,
                f"its value has the shape {tuple(value.shape)}, and FSDP shards it as parameters "
                f"of the shape {shapes}, none of which can hold it",
                "Freeze an unsharded copy of the model",
            )
        memory, shard = make_shard(fitting[0], value)
        stride = None if value.is_contiguous() else torch.empty_like(value).stride()
        self._shards[id(site)] = _Shard(shard, memory, fitting[0], raw, stride)


@dataclass(frozen=True, eq=False)
class _Shard:
    """This rank's part of a frozen weight: a DTensor, or the whole weight if it is not sharded.

    Attributes:
        tensor: the part.
        memory: its padded memory as one dimension; None if the weight is not sharded.
        param: the ``FSDPParam`` that it replaces.
        raw: each ``FSDPParam`` that the weight is computed from, with its group.
        stride: that of the whole weight, if it does not lie row by row; None if it does.
    """

    tensor: Tensor
    memory: Tensor | None = None
    param: Any = None
    raw: Sequence[tuple[Any, Any]] = ()
    stride: tuple[int, ...] | None = None


class ShardedPlan(Plan):
    """A plan whose frozen weights are shards that take the places of the raw ones.

    Args:
        found: the modules with their sites.
        shards: this rank's part of the weight of each site, by the id of the site.
        units: what `find_units` returned.
    """

    def __init__(
        self, found: Sequence[Found], shards: dict[int, _Shard], units: dict[int, Unit]
    ) -> None:
        sites = [site for _, module_sites in found for site in module_sites]
        super().__init__(found, lambda _: [shards[id(site)].tensor for site in sites])
        self._groups = {id(g): g for unit in units.values() for g in unit.groups}
        self._originals: list[tuple[Any, Any]] = []
        try:
            self._plan_params([(w.tensor, w.site, shards[id(w.site)]) for w in self.weights])
        except BaseException:
            self.edits.cancel()
            raise

    def settle(self) -> None:
        """Put the shards back where a forward has left whole parameters in the modules."""
        for group in self._groups.values():
            group._to_sharded()
        for original, ours in self._originals:
            original._param_fqn = getattr(ours, "_param_fqn", None)

    def _plan_params(self, frozen: Sequence[tuple[Tensor, Site, _Shard]]) -> None:
        hidden = {id(module) for _, site, _ in frozen for module in site.hidden}
        instead: dict[int, list[Any]] = {}  # what replaces an FSDPParam, by its id
        for tensor, site, shard in frozen:
            for _, param in shard.raw:
                if id(param) not in instead:
                    rest = [place for place in list_holders(param) if self._stays(place, hidden)]
                    instead[id(param)] = [copy_for_places(param, rest)] if rest else []
            if shard.memory is not None:
                ours = copy_for_places(shard.param, [(site.module, site.tensor)])
                ours.sharded_param, ours._sharded_param_data = tensor, shard.memory
                ours._orig_param_uid = id(tensor)
                if shard.stride is not None:
                    gather_in_layout(ours, shard.stride)
                instead[id(shard.param)].append(ours)
                self._originals.append((shard.param, ours))
                self._plan_hooks(site.module, shard, ours)
        for group in self._groups.values():
            if any(id(param) in instead for param in group.fsdp_params):
                self.edits.edit(group.__dict__)["fsdp_params"] = [
                    other for p in group.fsdp_params for other in instead.get(id(p), [p])
                ]

    def _stays(self, place: tuple[nn.Module, str], hidden: set[int]) -> bool:
        module, name = place
        return id(module) not in hidden and name in self.edits.get_planned(module._parameters)

    def _plan_hooks(self, module: nn.Module, shard: _Shard, ours: Any) -> None:
        """Let ``module.state_dict`` return shards, and ``load_state_dict`` update ``ours``."""
        loaded = module._load_state_dict_post_hooks
        self.edits.remove(loaded, [param._post_load_hook_handle.id for _, param in shard.raw])
        self._plan_hook(loaded, lambda *_: ours.reset_sharded_param())
        group = next(group for group, param in shard.raw if param is shard.param)
        if module not in group._module_to_pre_save_state_dict_hook_handle:
            for hooks in (module._state_dict_pre_hooks, module._load_state_dict_pre_hooks):
                self._plan_hook(hooks, lambda *_: group._to_sharded())

    def _plan_hook(self, hooks: dict[Any, Any], hook: Callable[..., None]) -> None:
        self.edits.edit(hooks)[RemovableHandle(hooks).id] = hook


def _require_dtype(site: Site, raw: Sequence[tuple[Any, Any]]) -> None:
    """Raise if mixed precision gathers the raw weight in a dtype that its buffers do not have."""
    gathered = {param.unsharded_param.dtype for _, param in raw}
    for source in site.sources if raw else ():
        if source.is_floating_point() and source.dtype not in gathered:
            raise FreezeError(
                site.name,
                f"mixed precision gathers its raw weight in {gathered.pop()}, and it computes with "
                f"a buffer in {source.dtype}, as the singular vectors are; torch multiplies no two "
                "dtypes, in a forward either",
                "Convert these buffers, which FSDP leaves as they are, to the dtype of the policy",
            )


def _find_raw_params(unit: Unit, site: Site) -> list[tuple[Any, Any]]:
    sources = list(site.sources)
    return [
        (group, param)
        for group, param in unit.iter_params()
        if any(is_gathered_as(param, source) for source in sources)
    ]


def _name_placement(error: FreezeError, found: Sequence[Found]) -> FreezeError:
    """Return ``error``, or one that names the placement where the tensor comes from a DTensor."""
    for site in (site for _, sites in found for site in sites if site.name == error.tensor):
        for source in site.sources:
            if hasattr(source, "placements"):
                return FreezeError(
                    site.name,
                    f"it is computed from a DTensor with the placement {source.placements}, which "
                    f"no fully_shard module of the given model gathers, and {error.reason}",
                    "Freeze the module that fully_shard was called on, or a copy with the whole "
                    "tensors (DTensor.full_tensor()), or use sn-export on a checkpoint",
                )
    return error


def keep_replicas_apart(found: Iterable[Found], plan: Plan) -> None:
    """Plan that DistributedDataParallel waits for no gradients, and sends no buffers if none stay.

    Otherwise a backward would wait for gradients of the raw weights, which get none, and break the
    next training step. Torch fails at an empty list of buffers, as where all were singular vectors.
    """
    for module, _ in found:
        if DistributedDataParallel in type(module).__mro__:  # an abstract class, slow to be asked
            attributes = plan.edits.edit(module.__dict__)
            attributes["require_backward_grad_sync"] = False
            if not _has_buffers(module, plan):
                attributes.update({name: False for name in _SENDS if name in attributes})


def _has_buffers(model: nn.Module, plan: Plan) -> bool:
    """Whether ``model`` will have buffers once ``plan`` is applied."""
    hidden = {id(module) for weight in plan.weights for module in weight.site.hidden}
    stack = [model]
    while stack:
        module = stack.pop()
        if plan.edits.get_planned(module._buffers):
            return True
        stack += [child for child in module.children() if id(child) not in hidden]
    return False
