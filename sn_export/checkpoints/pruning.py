"""Pruning in a state dict: a raw weight and the mask that torch multiplies it by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.prune import CustomFromMask

from ..errors import CheckpointError
from .reparametrizations import Kind, Reparametrization, aligned


def _plain_value(
    site: Reparametrization, tensors: Mapping[str, Any], dims: Mapping[str, int]
) -> Tensor:
    """Return the weight in use, as torch's class computes it.

    Raises:
        CheckpointError: if the mask has another shape, or a value is not finite.
    """
    weight, mask = (aligned(site.read(part, tensors)) for part in ("weight", "mask"))
    if mask.shape != weight.shape:
        raise CheckpointError(
            f"'{site.keys['mask']}' is {list(mask.shape)} and should be {list(weight.shape)}"
        )
    module = nn.Module()
    module.weight_orig, module.weight_mask = weight, mask
    method = CustomFromMask(mask)
    method._tensor_name = "weight"
    value: Tensor = method.apply_mask(module).detach()  # type: ignore[no-untyped-call]
    return value


PRUNING = Kind(hook=("_orig", "_mask"), parametrization=(), plain_value=_plain_value)
