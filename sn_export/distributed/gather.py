"""The plain state dict of a model on several ranks, on the first of them."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import ExportError
from ..freezing import Only
from .block import frozen_parametrizations
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
    is_first = not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0
    gathered: dict[str, Tensor] = {}
    with frozen_parametrizations(model, only), torch.no_grad():
        for name, tensor in model.state_dict().items():
            # A DTensor has this method; importing its class takes half a second.
            whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
            if is_first:
                gathered[name] = whole.detach().to("cpu", copy=True)
    return gathered


def refuse_sharded(model: nn.Module) -> None:
    """Raise if ``model`` is under `fully_shard`: no exporter takes shards. A local call.

    Raises:
        ExportError: with the way to a network that can be exported.
        FreezeError: if it is under FullyShardedDataParallel.
    """
    if sharded_units(model):
        raise ExportError(
            f"{type(model).__name__} is under fully_shard, and this rank holds a piece of it: call "
            "gather_plain_state_dict(model) on every rank, load what rank 0 gets into the network "
            "without reparametrizations, and export that"
        )
