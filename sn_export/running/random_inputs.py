"""What the model says for random inputs, drawn again near the example where it rejects them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import SnExportError
from .input_set import InputSet, random_sets
from .nested import tensor_leaves
from .reference import Reference

_logger = logging.getLogger("sn_export")
_SEED = 2
_NOISE = 0.01  # of each number: its sign and its size stay


class RandomReferences(NamedTuple):
    """What came of the random inputs.

    Attributes:
        references: of the inputs that the model takes, with what it said.
        left_out: how many were left out.
        reason: why, for the last of them; empty if there are none.
    """

    references: list[Reference]
    left_out: int
    reason: str


def random_references(
    first: Reference, count: int, run: Callable[[InputSet], Reference]
) -> RandomReferences:
    """Run the model on ``count`` random inputs like the example.

    Within the range of the example a model may still reject what is drawn: lengths of sequences,
    offsets, indices, bounds. Or it gives NaN: for a mask that hides a whole row, for the power of a
    negative number. Such an input is drawn again near the example; what still does not go is left
    out.

    Args:
        first: the example, with what the model said.
        count: how many.
        run: runs the model, and raises a `SnExportError` where it rejects an input.
    """
    generator = torch.Generator().manual_seed(_SEED)
    references: list[Reference] = []
    reason = ""
    for drawn in random_sets(first.inputs, count):
        for attempt in (drawn, *near_sets(first.inputs, drawn.label, generator)):
            try:
                references.append(run_usable(first, attempt, run))
                break
            except SnExportError as error:
                _logger.info("drawn again: %s", error)
                reason = " ".join(str(error).split())
    left_out = count - len(references)
    return RandomReferences(references, left_out, reason if left_out else "")


def left_out_note(drawn: RandomReferences) -> str:
    """Return a sentence on random inputs that the model does not take, or nothing."""
    if not drawn.left_out:
        return ""
    tried = drawn.left_out + len(drawn.references)
    return (
        f"{drawn.left_out} of {tried} random inputs were left out of the proof, also near the "
        f"example: {drawn.reason}. Pass inputs=[...] that the model takes, or samples=0"
    )


def run_usable(
    first: Reference, inputs: InputSet, run: Callable[[InputSet], Reference]
) -> Reference:
    """Return what the model says for drawn inputs.

    Raises:
        SnExportError: if it rejects them, or gives NaN or infinities where it gives none for the
            example: nothing can be compared then.
    """
    reference = run(inputs)
    for before, now in zip(first.outputs, reference.outputs, strict=False):
        if not bool(now.isfinite().all()) and bool(before.isfinite().all()):
            raise SnExportError(f"the model gives NaN or infinities for {inputs.label}")
    return reference


def near_sets(example: InputSet, label: str, generator: torch.Generator) -> Iterator[InputSet]:
    """Yield input sets near the example, from a farther to a nearer one.

    Floats get a little noise; integers and booleans are in another order, then as they are::

        lengths [7, 5, 2], x [0.5, -1]  ->  [5, 7, 2], [0.502, -0.994], then [7, 5, 2], [0.499, ...]
    """
    for shuffled in (True, False):
        change = partial(near_like, generator=generator, shuffled=shuffled)
        near = example.map(change, f"{label}, near the example")
        if not _is_same(near, example):
            yield near


def near_like(tensor: Tensor, generator: torch.Generator, shuffled: bool) -> Tensor:
    """Return a tensor with noise of 1 % of each number, or with its integers in another order."""
    values = tensor.detach().clone()
    if tensor.is_floating_point() or tensor.is_complex():
        drawn = torch.rand(values.shape, generator=generator, dtype=torch.float64, device="cpu")
        noise = 1 + _NOISE * (2 * drawn - 1)
        return (values * noise.to(values.device)).to(values.dtype)
    if not shuffled or values.numel() < 2:
        return values
    order = torch.randperm(values.numel(), generator=generator, device="cpu")
    return values.flatten()[order.to(values.device)].view(values.shape)


def _is_same(one: InputSet, other: InputSet) -> bool:
    left, right = (tensor_leaves((entry.args, dict(entry.kwargs))) for entry in (one, other))
    return all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(left, right, strict=True))
