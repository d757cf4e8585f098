"""The inputs of the proof: shapes from the command line, real ones from files."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ..errors import UsageError
from ..running.input_set import InputSet
from .arguments import example_of


@dataclass(frozen=True)
class Inputs:
    """An example, and further inputs that are part of the proof."""

    example: InputSet
    own: tuple[InputSet, ...]

    def names(self, model: nn.Module) -> list[str]:
        """Return the names of the arguments of the example, as the forward has them."""
        parameters = list(inspect.signature(model.forward).parameters)
        return [*parameters[: len(self.example.args)], *self.example.kwargs]


def gather(shapes: list[str], files: list[Path]) -> Inputs:
    """Return the inputs that ``--input`` and ``--input-file`` give.

    Raises:
        UsageError: if there are none, or a file is none of numpy's.
    """
    own = tuple(_from_file(path) for path in files)
    if shapes:
        return Inputs(example_of(shapes), own)
    if not own:
        raise UsageError("give the shape of each input with --input, or values with --input-file")
    return Inputs(own[0], own[1:])


def _from_file(path: Path) -> InputSet:
    if not path.is_file():
        raise UsageError(f"there is no input file '{path}'")
    try:
        with np.load(path, allow_pickle=False) as content:
            arrays = {name: torch.from_numpy(content[name]) for name in content.files}
    except Exception as error:  # numpy raises many kinds for a broken file
        raise UsageError(
            f"'{path}' is no .npz of numeric arrays: {str(error).splitlines()[0]}"
        ) from error
    positional = [f"arr_{i}" for i in range(len(arrays))]
    if list(arrays) == positional:
        return InputSet(tuple(arrays.values()), {}, f"'{path.name}'")
    return InputSet((), arrays, f"'{path.name}'")
