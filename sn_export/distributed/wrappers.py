"""The wrappers of torch that keep one network on several ranks, but for FSDP2."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..errors import FreezeError
from ..freezing import Found, Plan

# What DistributedDataParallel asks before it sends buffers; versions of torch differ in the name.
_SENDS = ("broadcast_buffers", "forward_sync_buffers")


def refuse_flat_shards(model: nn.Module) -> None:
    """Raise if ``model`` is under FullyShardedDataParallel (FSDP1) and its parameters are apart.

    Inside ``summon_full_params`` they are whole, and the network within is like any other.

    Raises:
        FreezeError: with what to do.
    """
    from torch.distributed.fsdp import FullyShardedDataParallel  # takes a moment
    from torch.distributed.fsdp._common_utils import TrainingState

    for path, module in model.named_modules():
        if not isinstance(module, FullyShardedDataParallel):
            continue
        if module.training_state is not TrainingState.SUMMON_FULL_PARAMS:
            names = (name for name, _ in module._fsdp_wrapped_module.named_parameters())
            first = next(names, "its parameters")
            raise FreezeError(
                path or type(module).__name__,
                f"FullyShardedDataParallel holds only a piece of '{first}' on this rank",
                "Enter FullyShardedDataParallel.summon_full_params(model, writeback=False) first "
                "and freeze model.module",
            )


def keep_replicas_apart(found: Iterable[Found], plan: Plan) -> None:
    """Plan that DistributedDataParallel awaits no gradients, and sends no buffers if none is left.

    A backward would wait for the gradients of raw weights, which are not there, and break the next
    training step; torch fails where singular vectors were all the buffers that it had to send.
    """
    for module, _ in found:
        if isinstance(module, DistributedDataParallel):
            attributes = plan.edits.of(module.__dict__)
            attributes["require_backward_grad_sync"] = False
            if not _has_buffers(module, plan):
                attributes.update({name: False for name in _SENDS if name in attributes})


def _has_buffers(model: nn.Module, plan: Plan) -> bool:
    """Whether ``model`` will have buffers once ``plan`` is applied."""
    hidden = {id(module) for weight in plan.weights for module in weight.site.hidden}
    stack = [model]
    while stack:
        module = stack.pop()
        if plan.edits.planned(module._buffers):
            return True
        stack += [child for child in module.children() if id(child) not in hidden]
    return False
