"""What stands behind ``--input`` and ``--input-file``, as tensors."""

from __future__ import annotations

import inspect
import math
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..running import InputSet

_INPUT = re.compile(r"(?:(?P<name>\w+)=)?(?P<shape>[^:=]*)(?::(?P<dtype>\w+))?")

_SHAPE = re.compile(r"\d+(?:x\d+)*")

_MOST = 2**31  # elements of one input; they are drawn in 8 bytes each

_DTYPES = (
    "float64",
    "float32",
    "float16",
    "bfloat16",
    "complex64",
    "complex128",
    "int64",
    "int32",
    "int16",
    "int8",
    "uint8",
    "bool",
)


def example_of(texts: list[str]) -> InputSet:
    """Return random inputs of the shapes that ``--input`` gives, the same ones every time."""
    generator = torch.Generator().manual_seed(0)
    args: list[Tensor] = []
    kwargs: dict[str, Tensor] = {}
    for text in texts:
        name, shape, dtype = _parse_input(text)
        try:
            value = _random(shape, getattr(torch, dtype), generator)
        except RuntimeError as error:  # for want of memory
            raise UsageError(f"--input {text}: torch cannot draw it: {error}") from error
        if name in kwargs:
            raise UsageError(f"--input gives '{name}' twice, again with {text}")
        if name is not None:
            kwargs[name] = value
        elif kwargs:
            raise UsageError(f"--input {text} has no name and follows one that has")
        else:
            args.append(value)
    return InputSet(tuple(args), kwargs, "the example input")


def _parse_input(text: str) -> tuple[str | None, list[int], str]:
    match = _INPUT.fullmatch(text)
    if match is None or not (match["shape"] == "scalar" or _SHAPE.fullmatch(match["shape"])):
        raise UsageError(
            f"--input must be [NAME=]SHAPE[:DTYPE] such as 2x3x8x8 or x=1x77:int64, got '{text}'"
        )
    dtype = match["dtype"] or "float32"
    if dtype not in _DTYPES:
        raise UsageError(f"--input {text}: dtype must be one of {', '.join(_DTYPES)}")
    shape = [] if match["shape"] == "scalar" else [int(size) for size in match["shape"].split("x")]
    count = math.prod(max(size, 1) for size in shape)  # beside a 0 no size may be too large either
    if count > _MOST:
        raise UsageError(
            f"--input {text}: an input must have at most {_MOST} elements, not {count}"
        )
    return match["name"], shape, dtype


def _random(shape: list[int], dtype: torch.dtype, generator: torch.Generator) -> Tensor:

    if dtype.is_floating_point or dtype.is_complex:
        wide = torch.complex128 if dtype.is_complex else torch.float64
        return torch.randn(shape, dtype=wide, generator=generator).to(dtype)
    # 0 and 1 are an index into anything; other values have to come from --input-file.
    return torch.randint(0, 2, shape, generator=generator).to(dtype)


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
