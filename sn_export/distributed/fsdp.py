"""The state that FSDP2 keeps for a sharded parameter, reached by the private names in `ATTRIBUTES`.

`fully_shard` gives each module that it is called on a state, each state groups of parameters, and
each parameter an ``FSDPParam``: it knows the modules that hold the parameter and under which name,
this rank's shard of it as a DTensor (``sharded_param``), and the padded memory of that shard
(``_sharded_param_data``), from which the whole parameter is gathered. A forward puts the gathered
parameter into the modules and takes it out again.

A frozen weight has an ``FSDPParam`` of its own: a copy of that of the raw weight, with another name
and another shard. The originals are not written to.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import FreezeError
from ..running import ATTRIBUTES


class Unit:
    """The modules that one call of `fully_shard` gathers together.

    Args:
        module: one of the modules; it gathers and reshards for all of them.
        state: torch's ``FSDPState`` of the modules.
    """

    def __init__(self, module: Any, state: Any) -> None:
        self.module = module
        self.state = state
        self._meshes: list[tuple[Any, Any]] = []

    def gather(self) -> None:
        """Put the whole parameters into the modules; a collective call.

        They stay there until `reshard`. Otherwise a forward of one of the modules would free their
        memory at its end.
        """
        for group in self.groups:
            self._meshes.append((group, group.post_forward_mesh_info))
            group.post_forward_mesh_info = None
        self.module.unshard()

    def reshard(self) -> None:
        """Put this rank's shards back into the modules; a local call that can be repeated."""
        for group, mesh in reversed(self._meshes):
            group.post_forward_mesh_info = mesh
        self._meshes.clear()
        for group in self.groups:
            group._to_sharded()

    def initialise(self) -> None:
        """Let torch register the hooks now that it would register before the first forward."""
        for group in self.groups:
            group.lazy_init()

    def trace(self) -> Callable[[], None]:
        """Reshard, and return a function that undoes all that forwards change from here on.

        Forwards change three things. Whole parameters are left in the modules, some with new
        memory, since handwritten norms set the ``data`` of their vectors. The order of the units is
        recorded, by which a backward gathers them in advance: ranks with different orders would
        wait for each other. And a forward that an exception has stopped counts as not ended.
        """
        self.reshard()
        gathered = [(param, _remember_gathered(param)) for _, param in self.iter_params()]
        restart = self._remember_start()
        orders = {
            id(self.state._comm_ctx): list(getattr(self.state._comm_ctx, "post_forward_order", ()))
        }
        groups = [(g, list(g._post_forward_indices), g._partial_reduce_output) for g in self.groups]

        def take_back() -> None:
            if self.state._is_root and self.state._state_ctx.iter_forward_root is not None:
                self.module.reset_iter_state()
            self.reshard()
            for param, restore in gathered:
                restore(param)
            restart()
            context = self.state._comm_ctx  # shared by all units from the first forward on
            getattr(context, "post_forward_order", [])[:] = orders.get(id(context), [])
            for group, indices, gradients in groups:
                group._post_forward_indices[:] = indices
                group._partial_reduce_output = gradients

        return take_back

    def _remember_start(self) -> Callable[[], None]:
        """Return a function that lets the next forward be the first one again.

        The module of the first forward becomes FSDP's root. If a part of a model were exported
        first and stayed the root, no forward of the whole model would run.
        """
        state = self.state
        if state._is_root is not None:
            return lambda: None
        shared = {name: getattr(state, name) for name in ("_is_root", "_state_ctx", "_comm_ctx")}
        states = list(state._state_ctx.all_states)
        groups = [(group, group.comm_ctx, group.post_forward_mesh_info) for group in self.groups]

        def restart() -> None:
            state.__dict__.update(shared)
            state._state_ctx.all_states[:] = states
            for group, context, mesh in groups:
                group.comm_ctx, group.post_forward_mesh_info = context, mesh

        return restart

    @property
    def groups(self) -> list[Any]:
        """The groups of parameters."""
        return list(self.state._fsdp_param_groups)

    def iter_params(self) -> Iterator[tuple[Any, Any]]:
        """Yield each ``FSDPParam`` with its group."""
        for group in self.groups:
            for param in group.fsdp_params:
                yield group, param

    def list_meshes(self) -> list[Any]:
        """Return the device meshes that the parameters are spread over."""
        return [group.mesh_info.mesh for group in self.groups]


def find_units(model: nn.Module) -> dict[int, Unit]:
    """Return the unit that gathers the parameters of each module, by the module's id.

    A unit holds the modules that `fully_shard` was called on and those below them, except those of
    another unit. Modules outside every unit are absent.

    Raises:
        FreezeError: if this torch keeps its state under other private names.
    """
    from torch.distributed.fsdp import FSDPModule  # here: it takes a moment, and few models need it

    units: dict[int, Unit] = {}  # by the state
    found: dict[int, Unit] = {}
    stack: list[tuple[str, nn.Module, Unit | None]] = [("", model, None)]
    seen: set[int] = set()
    while stack:
        path, module, unit = stack.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        if isinstance(module, FSDPModule):
            state = _find_state(path, module)
            unit = units.setdefault(id(state), Unit(module, state))
        if unit is not None:
            found[id(module)] = unit
        for name, child in reversed(module._modules.items()):
            if child is not None:
                stack.append((f"{path}.{name}" if path else name, child, unit))
    return found


def find_fsdp_modules(model: nn.Module) -> list[nn.Module]:
    """Return the modules that `fully_shard` was called on."""
    from torch.distributed.fsdp import FSDPModule  # as above

    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def find_ranks(units: Iterable[Unit]) -> list[int]:
    """Return the ranks that the parameters are spread over, in ascending order.

    The mesh of a parameter counts: one that is tensor parallel too has more dimensions than the
    mesh of its unit.
    """
    ranks: set[int] = set()
    for unit in units:
        for _, param in unit.iter_params():
            ranks.update(param.sharded_param.device_mesh.mesh.flatten().tolist())
    return sorted(ranks)


def _find_state(path: str, module: Any) -> Any:
    state = module._get_fsdp_state() if hasattr(module, "_get_fsdp_state") else None
    missing = _find_missing("FSDPState", state)
    missing += _find_missing("FSDPStateContext", getattr(state, "_state_ctx", None))
    for group in list(getattr(state, "_fsdp_param_groups", ()))[:1]:  # all are of one class
        missing += _find_missing("FSDPParamGroup", group)
        for param in getattr(group, "fsdp_params", [])[:1]:
            missing += _find_missing("FSDPParam", param)
    if missing:
        raise FreezeError(
            path or type(module).__name__,
            f"it is under fully_shard, and torch {torch.__version__} has moved {missing[0]}, by "
            "which sn_export reaches the shards",
            "Use torch 2.13 or a newer one that sn_export is tested with, or an unsharded copy",
        )
    return state


def _find_missing(cls: str, thing: Any) -> list[str]:
    return [f"{cls}.{name}" for name in ATTRIBUTES[cls] if not hasattr(thing, name)]


def find_mixed_precision(units: Iterable[Unit]) -> tuple[str, str] | None:
    """Return the dtypes of a parameter, sharded and gathered, if a policy makes them differ."""
    for unit in units:
        for _, param in unit.iter_params():
            dtype = getattr(param, "param_dtype", None)
            if dtype is not None:
                return str(param.sharded_param.dtype), str(dtype)
    return None


def is_gathered_as(param: Any, tensor: Tensor) -> bool:
    """Whether ``tensor`` is the whole parameter, as a forward sees it."""
    return getattr(param, "_unsharded_param", None) is tensor


def list_holders(param: Any) -> list[tuple[nn.Module, str]]:
    """Return the modules that hold the parameter, each with the name under which it does."""
    info = param._module_info
    return [
        (info.module, info.param_name),
        *zip(info.shared_modules, info.shared_param_names, strict=True),
    ]


def copy_for_places(param: Any, places: list[tuple[nn.Module, str]]) -> Any:
    """Return a copy of ``param`` that stands in ``places`` alone."""
    other = copy.copy(param)
    (module, name), *shared = places
    info = copy.copy(param._module_info)
    info.module, info.param_name = module, name
    info.shared_modules = [module for module, _ in shared]
    info.shared_param_names = [name for _, name in shared]
    other._module_info = info
    _forget_gathered(other)  # the copy must not share memory for the whole parameter
    return other


def gather_in_layout(param: Any, stride: tuple[int, ...]) -> None:
    """Let every gather lay out the whole parameter by ``stride`` instead of row by row.

    For a matrix that lies column by column, as `orthogonal` makes it, torch takes another kernel,
    whose sums are rounded in another way.
    """
    gather = param.to_unsharded

    def to_unsharded() -> None:
        gather()
        whole = param._unsharded_param
        with torch.no_grad():
            laid_out = torch.empty_strided(
                whole.shape, stride, dtype=whole.dtype, device=whole.device
            )
            laid_out.copy_(whole)
        # Resharding takes this parameter out of the modules, which frees its memory.
        param._setattr_on_modules(nn.Parameter(laid_out, requires_grad=False))

    param.to_unsharded = to_unsharded


def _remember_gathered(param: Any) -> Callable[[Any], None]:
    """Return a function that gives the whole parameter its memory of now, with the same content."""
    whole = getattr(param, "_unsharded_param", None)
    if whole is None:
        return _forget_gathered
    if hasattr(whole, "full_tensor"):  # tensor parallel: no module sets the data of a DTensor
        return lambda _: None
    memory = whole.detach()
    # Memory that torch gathers into is empty between two gathers; that of a forward is not.
    content = memory.clone() if memory.untyped_storage().size() else None

    def restore(param: Any) -> None:
        whole.data = memory
        if content is not None:
            memory.copy_(content)

    return restore


def _forget_gathered(param: Any) -> None:
    """Let the next gather be the first one, which allocates the memory."""
    param.all_gather_outputs = []
    param.__dict__.pop("_unsharded_param", None)


def make_shard(param: Any, value: Tensor) -> tuple[Tensor, Tensor]:
    """Return this rank's part of ``value``, laid out as that of ``param`` is.

    Args:
        param: an ``FSDPParam`` of the same shape.
        value: the whole tensor, in the dtype of the forward; under mixed precision that can be
            coarser than the dtype of the parameter.

    Returns:
        The padded memory as one dimension, and the part that belongs to ``value`` as a DTensor.

    Example: for a tensor of shape (3, 4) on two ranks both allocate (2, 4): the first rank holds
    two rows, the second one row and a row of zeros.
    """
    raw = param._sharded_param_data
    dim, info = param.fsdp_placement.dim, param.mesh_info
    rank, count = getattr(info, "shard_mesh_rank", 0), getattr(info, "shard_mesh_size", 1)
    chunks = torch.chunk(value, count, dim=dim)
    length = chunks[rank].shape[dim] if rank < len(chunks) else 0
    if count == 1 and value.is_contiguous():  # no copy is needed: the value has its own memory
        padded = value.to(raw)
    else:
        padded = torch.empty(param.padded_sharded_param_size, dtype=raw.dtype, device=raw.device)
        padded.narrow(dim, length, padded.shape[dim] - length).zero_()
        if length:
            padded.narrow(dim, 0, length).copy_(chunks[rank])
    if raw.is_pinned():
        padded = padded.pin_memory()
    return padded.view(-1), param.to_sharded_dtensor(padded.narrow(dim, 0, length))
