"""What a reparametrization that is put on a frozen weight, inside the block, leaves there."""

from __future__ import annotations

from collections.abc import Iterable

from .frozen import FrozenWeight
from .kinds import TORCH
from .kinds.state_hooks import new_state_hooks
from .undo import Edits


def plan_debris(edits: Edits, edited: Iterable[FrozenWeight], since: int) -> None:
    """Plan to make the modules of ``edited`` plain again, so that the block can be undone.

    Freezing is that already, with the frozen weight for a value: hooks, buffers, parameters
    and the class go. Only torch's own are looked for, since nothing here may run foreign code.

    Args:
        edits: where to plan.
        edited: the weights that something was done to.
        since: the key that the next hook would have got when the block began.
    """
    for weight in edited:
        module, tensor = weight.site.module, weight.site.tensor
        for find in TORCH:
            for site in find(weight.site.path, module):
                if site.tensor == tensor:
                    site.plan(edits, weight.tensor)
        for hooks, keys in new_state_hooks(module, tensor, since):
            if keys:
                edits.remove(hooks, keys)
