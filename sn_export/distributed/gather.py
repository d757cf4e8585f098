"""The plain state dict of a model on several ranks, on the first of them."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import ExportError
from ..freezing import Only
from .block import frozen_parametrizations
from .fsdp import ranks_of
from .planner import sharded_units


def gather_plain_state_dict(model: nn.Module, only: Only = None) -> dict[str, Tensor]:
    """Return the state dict of the plain network on rank 0, for those who save or convert it.

    ::

        state = gather_plain_state_dict(model)  # on every rank
        if dist.get_rank() == 0:
            torch.save(state, "plain.pt")

    It is called on every rank of a model under `torch.distributed.fsdp.fully_shard`; one tensor
    after the other is gathered, so that another rank holds no more than two layers.

    Args:
        model: any module, on any number of ranks. It is as before afterwards.
        only: which reparametrizations are left out, as for `frozen_parametrizations`.

    Returns:
        On rank 0 (and in a single process) every parameter and persistent buffer on the CPU, in
        memory of its own, under the names that the network has without the reparametrizations;
        an empty dict on the other ranks.

    Raises:
        TypeError, ValueError, FreezeError: as `frozen_parametrizations`.
    """
    return gather_state(model, only)[0]


def gather_state(model: nn.Module, only: Only) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the plain state dict, and all buffers of the plain network by name, on the first rank.

    Args:
        model: as for `gather_plain_state_dict`; both are empty on the other ranks.
        only: likewise.
    """
    ranks = ranks_of(sharded_units(model).values()) or [0]
    is_first = not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == ranks[0]
    known: dict[int, Any] = {}  # of tied tensors there is one

    def whole(value: Any) -> Any:
        if id(value) not in known:
            tensor = value  # a module may have put anything into its state
            if hasattr(tensor, "full_tensor"):  # a DTensor, whose import takes half a second
                tensor = tensor.full_tensor()
            if isinstance(tensor, Tensor) and is_first:
                tensor = tensor.detach().to("cpu", copy=True)
            known[id(value)] = tensor if is_first else None
        return known[id(value)]

    with frozen_parametrizations(model, only), torch.no_grad():
        # Both hold what they name until the end, so that no id stands for two.
        state, named = (
            model.state_dict(keep_vars=True),
            dict(model.named_buffers(remove_duplicate=False)),
        )
        gathered = {name: whole(value) for name, value in state.items()}
        buffers = {name: whole(buffer) for name, buffer in named.items()}
    return (gathered, buffers) if is_first else ({}, {})


def refuse_sharded(model: nn.Module) -> None:
    """Raise if ``model`` is under `fully_shard`: no exporter takes shards. A local call.

    Raises:
        ExportError: with the way to a network that can be exported.
        FreezeError: if it is under FullyShardedDataParallel.
    """
    if sharded_units(model):
        raise ExportError(
            f"{type(model).__name__} is under fully_shard, and this rank holds a piece of it: call "
            "export_onnx on every rank with model_factory=, a function without arguments that "
            "builds the network without fully_shard"
        )
