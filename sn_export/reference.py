"""The reference: what the model itself says, in eval mode, leaving no trace."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .errors import SnExportError
from .preserving import Preserved
from .samples import InputSet
from .structure import is_plain, paths_of_tensors, unseen_tensors


@dataclass(frozen=True)
class Reference:
    """An input set and the model's outputs for it.

    Attributes:
        inputs: what the model was given.
        outputs: the tensors that it returned.
        paths: where each stood in the result.
        is_plain: whether the result had nothing but tensors in containers that torch knows.
        unseen: what else held tensors in the result, which are not among the outputs.
    """

    inputs: InputSet
    outputs: tuple[Tensor, ...]
    paths: tuple[tuple[str, ...], ...] = ()
    is_plain: bool = True
    unseen: tuple[str, ...] = ()


def run_reference(model: nn.Module, state: Preserved, inputs: InputSet) -> Reference:
    """Run ``model`` without grad on a copy of ``inputs``, from the state it started in.

    Raises:
        SnExportError: if the model rejects the inputs or returns no tensor.
    """
    given = inputs.clone()
    try:
        with torch.no_grad():
            result = model(*given.args, **given.kwargs)
    except (Exception, SystemExit) as error:  # a network that exits has not run
        raise SnExportError(
            f"the model fails on {inputs.label}: {type(error).__name__}: {error}"
        ) from error
    found = paths_of_tensors(result)
    outputs = tuple(leaf.detach().clone() for _, leaf in found)
    state.reset()
    if not outputs:
        raise SnExportError(
            f"the model returns no tensor for {inputs.label}: got {type(result).__name__}"
        )
    paths = tuple(path for path, _ in found)
    unseen = tuple(
        f"{kind} at {'_'.join(('output', *path))!r}" for path, kind in unseen_tensors(result)
    )
    return Reference(inputs.clone(), outputs, paths, is_plain(result), unseen)
