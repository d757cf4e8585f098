"""The sizes that torch's program was made for, and what the model says just beyond them."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import SnExportError
from ..running import DynamicDim, InputSet, Reference
from .dynamic_sizes import Groups, by_root

_logger = logging.getLogger("sn_export")
_ENDLESS = 2**30  # sizes from here on are no bound
_LARGEST = 2**24  # elements of a tensor, past which a size is not tried


def references_beyond(
    program: Any,
    example: Sequence[tuple[str, Tensor]],
    dims: Sequence[DynamicDim],
    resized: Callable[[Groups, Mapping[str, int]], InputSet],
    run: Callable[[InputSet], Reference],
) -> list[Reference]:
    """Run the model at the first sizes that the program leaves out, though they are declared.

    A forward that decides by a size (``if x.shape[0] < 5``) is traced on one side. Torch's program
    knows on which, and the file does not: it takes the sizes of the other side as well.

    Args:
        program: torch's ONNXProgram.
        example: the tensors that it takes, with their names.
        dims: the dynamic dimensions.
        resized: makes an input set of other sizes of what the dimensions vary with.
        run: runs the model, and raises a `SnExportError` where it rejects an input.

    Returns:
        What the model said; nothing of sizes that it rejects itself, or that are out of proportion.
    """
    roots, tensors = by_root(dims), dict(example)
    found = []
    for root, smallest, largest in _narrowed(program, list(tensors), dims):
        _logger.info("torch's program is for %s from %d to %d", root, smallest, largest)
        for size in (smallest - 1, largest + 1):
            if not _is_tried(size, roots[root], tensors):
                continue
            try:
                found.append(run(resized({root: roots[root]}, {root: size})))
            except SnExportError as error:
                _logger.info("not proved at this size: %s", error)
    return found


def _is_tried(size: int, group: Sequence[DynamicDim], example: Mapping[str, Tensor]) -> bool:
    low = max(2, *(dim.range[0] for dim in group))  # torch makes a program for 2 and more unasked
    high = min(_ENDLESS - 1, *(dim.range[1] for dim in group))
    shapes = {dim.tensor: list(example[dim.tensor].shape) for dim in group}
    for dim in group:
        shapes[dim.tensor][dim.position] = dim.size_for(size)
    return low <= size <= high and all(math.prod(shape) <= _LARGEST for shape in shapes.values())


def _narrowed(
    program: Any, names: Sequence[str], dims: Sequence[DynamicDim]
) -> Iterator[tuple[str, int, int]]:
    """Yield the smallest and the largest size of each root for which the program was made."""
    exported = program.exported_program
    places = [node for node in exported.graph.nodes if node.op == "placeholder"]
    given = set(exported.graph_signature.user_inputs)
    values = [node.meta["val"] for node in places if node.name in given]
    if len(values) != len(names):
        return
    tensors = dict(zip(names, values, strict=True))
    seen = set()
    for dim in dims:
        size = tensors[dim.tensor].shape[dim.position]
        if not isinstance(size, torch.SymInt) or callable(getattr(dim.spec, "fn", None)):
            continue  # fixed; or ``2 * dim``, whose bounds are those of another number
        bounds = exported.range_constraints.get(size.node.expr)
        if bounds is not None and dim.root not in seen:
            seen.add(dim.root)
            yield dim.root, _number(bounds.lower, 0), _number(bounds.upper, _ENDLESS)


def _number(bound: Any, default: int) -> int:
    is_finite = getattr(bound, "is_Integer", isinstance(bound, int))  # sympy has infinities
    return int(bound) if is_finite else default
