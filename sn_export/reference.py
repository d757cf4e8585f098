"""The reference: what the model itself says, in eval mode, leaving no trace."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .errors import SnExportError
from .preserving import Preserved
from .samples import InputSet, tensor_leaves


@dataclass(frozen=True)
class Reference:
    """An input set and the model's outputs for it."""

    inputs: InputSet
    outputs: tuple[Tensor, ...]


def run_reference(model: nn.Module, state: Preserved, inputs: InputSet) -> Reference:
    """Run ``model`` without grad on a copy of ``inputs``, from the state it started in.

    Raises:
        SnExportError: if the model rejects the inputs or returns no tensor.
    """
    given = inputs.clone()
    try:
        with torch.no_grad():
            result = model(*given.args, **given.kwargs)
    except Exception as error:
        raise SnExportError(
            f"the model fails on {inputs.label}: {type(error).__name__}: {error}"
        ) from error
    outputs = tuple(leaf.detach().clone() for leaf in tensor_leaves(result))
    state.reset()
    if not outputs:
        raise SnExportError(
            f"the model returns no tensor for {inputs.label}: got {type(result).__name__}"
        )
    return Reference(inputs.clone(), outputs)
