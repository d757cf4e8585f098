"""Random inputs, like the example or near it, and what the model returns for those it takes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import SnExportError
from .input_set import InputSet
from .nested import list_tensors
from .reference import Reference, no_fused_attention
from .torch_private import SAFE_SOFTMAX, TorchDispatchMode

_logger = logging.getLogger("sn_export")
_SEED, _NEAR_SEED = 0, 2
_RANDOM = "random input"
_ALONE = 8  # tensors at most that are shuffled each alone
_NOISE = 0.01  # of each number: its sign and its size stay
# torch computes next to nothing in these; what does not fit int64 wraps.
_NO_ARITHMETIC = (torch.uint16, torch.uint32, torch.uint64)


class RandomReferences(NamedTuple):
    """What the model returned for random inputs, and how many were left out.

    Attributes:
        references: of the inputs that the model takes, with what it returned.
        left_out: how many were left out.
        reason: why, for the last of them; empty if there are none.
    """

    references: list[Reference]
    left_out: int
    reason: str


def draw_references(
    first: Reference, count: int, run: Callable[[InputSet], Reference]
) -> RandomReferences:
    """Run the model on ``count`` random inputs like the example.

    Within the range of the example a model may still reject what is drawn: lengths of sequences,
    offsets, indices, bounds. Or it gives NaN: for a mask that hides a whole row, for the power of a
    negative number. Such an input is drawn again near the example; what still does not go is left
    out.

    Args:
        first: the example, with what the model returned.
        count: how many.
        run: runs the model, and raises a `SnExportError` where it rejects an input.
    """
    generator = torch.Generator().manual_seed(_NEAR_SEED)
    references: list[Reference] = []
    reason = ""
    for drawn in draw_random_sets(first.inputs, count):
        for attempt in chain((drawn,), draw_near_sets(first.inputs, drawn.label, generator)):
            try:
                references.append(run_usable(first, attempt, run))
                break
            except SnExportError as error:
                _logger.info("drawn again: %s", error)
                reason = " ".join(str(error).split())
    left_out = count - len(references)
    return RandomReferences(references, left_out, reason if left_out else "")


def describe_left_out(drawn: RandomReferences) -> str:
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
    """Return what the model returns for drawn inputs, if it can be compared.

    Raises:
        SnExportError: if the model rejects them; if it gives NaN or infinities where it gives none
            for the example; or if a mask hides a whole row of an attention, for which the formula,
            and so the file, has NaN.
    """
    reference = run(inputs)
    if not _is_finite_as(first, reference):
        raise SnExportError(f"the model gives NaN or infinities for {inputs.label}")
    has_mask = any(map(_may_be_mask, list_tensors((inputs.args, dict(inputs.kwargs)))))
    if has_mask and _hides_rows(inputs, run) and not _hides_rows(first.inputs, run):
        raise SnExportError(
            f"a mask hides all that a query may attend to for {inputs.label}, where attention is "
            "not defined: torch's gives zeros, and its formula NaN"
        )
    return reference


def _is_finite_as(first: Reference, reference: Reference) -> bool:
    """Whether an output is finite wherever that of the example is."""
    return all(
        bool(now.isfinite().all()) or not bool(before.isfinite().all())
        for before, now in zip(first.outputs, reference.outputs, strict=False)
    )


def _may_be_mask(tensor: Tensor) -> bool:
    is_integer = not (tensor.is_floating_point() or tensor.is_complex())
    return is_integer and bool(((tensor == 0) | (tensor == 1)).all())


def _hides_rows(inputs: InputSet, run: Callable[[InputSet], Reference]) -> bool:
    seen = _HiddenRows()
    with no_fused_attention(), seen:
        run(inputs)
    return seen.found


class _HiddenRows(TorchDispatchMode):
    """Sees whether a mask of torch's attention leaves a query nothing to attend to.

    Attributes:
        found: whether one did.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run one operator, and look at its mask."""
        kwargs = dict(kwargs or {})
        given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
        # Each kernel of attention has an operator; without a kernel it is this softmax.
        key = "self" if func is SAFE_SOFTMAX else "attn_mask"
        mask = given.get(key, given.get("attn_bias"))
        if isinstance(mask, Tensor):
            visible = mask if mask.dtype == torch.bool else ~mask.isneginf()
            self.found |= not bool(visible.any(-1).all())
        return func(*args, **kwargs)


def draw_random_sets(example: InputSet, count: int) -> list[InputSet]:
    """Return ``count`` random sets like ``example``, the same ones at every call."""
    generator = torch.Generator().manual_seed(_SEED)
    return [
        example.map(lambda tensor: draw_random_like(tensor, generator), f"{_RANDOM} {i}")
        for i in range(count)
    ]


def is_random(label: str) -> bool:
    """Whether an input set of that label was drawn by `draw_random_sets`, or near the example."""
    return label.startswith(_RANDOM)


def draw_random_like(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Return random values within the range of ``tensor``, of its shape, dtype and device.

    Floating values are uniform over the range seen (standard normal where the tensor is
    constant or not finite); integers too, ends included; booleans are fair coins. The
    global RNG is not used.
    """
    shape, dtype = tensor.shape, tensor.dtype
    if tensor.numel() == 0:
        return tensor.detach().clone()
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=generator, device="cpu").to(tensor)
    if dtype.is_complex:
        drawn = torch.randn(shape, generator=generator, dtype=torch.complex64, device="cpu")
        return drawn.to(tensor)
    if not dtype.is_floating_point:
        values = tensor.detach().cpu()
        if dtype in _NO_ARITHMETIC:
            values = values.to(torch.int64)
        smallest, largest = (int(bound) for bound in torch.aminmax(values))
        end = None if largest == 2**63 - 1 else largest + 1
        drawn = torch.empty(shape, dtype=torch.int64, device="cpu")
        return drawn.random_(smallest, end, generator=generator).to(tensor)
    low, high = (bound.item() for bound in torch.aminmax(tensor.detach().to("cpu").double()))
    if not (low < high and abs(low) < float("inf") and abs(high) < float("inf")):
        drawn = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
        return drawn.to(tensor)
    uniform = torch.rand(shape, generator=generator, dtype=torch.float64, device="cpu")
    return (low * (1 - uniform) + high * uniform).clamp(low, high).to(tensor)


def draw_near_sets(example: InputSet, label: str, generator: torch.Generator) -> Iterator[InputSet]:
    """Yield input sets near the example, from a farther to a nearer one.

    Floats get a little noise; integers and booleans are in another order within each row, so that
    no row is hidden by a mask that the example does not hide: all of them, then those of one tensor
    alone, then none::

        ids [4, 4, 9], starts [0, 2]  ->  [9, 4, 4], [2, 0], then [4, 9, 4], [0, 2], ...
    """
    leaves = list_tensors((example.args, dict(example.kwargs)))
    rows = [id(t) for t in leaves if t.ndim and not (t.is_floating_point() or t.is_complex())]
    alone = [[row] for row in rows[:_ALONE]] if len(rows) > 1 else []
    for chosen in (rows, *alone, []):

        def change(tensor: Tensor, chosen: Sequence[int] = chosen) -> Tensor:
            return draw_near_like(tensor, generator, shuffled=id(tensor) in chosen)

        near = example.map(change, f"{label}, near the example")
        if not _is_same(near, example):
            yield near


def draw_near_like(tensor: Tensor, generator: torch.Generator, shuffled: bool) -> Tensor:
    """Return a tensor with noise of 1 % of each number, or with its integers in another order."""
    values = tensor.detach().clone()
    if tensor.is_floating_point() or tensor.is_complex():
        drawn = torch.rand(values.shape, generator=generator, dtype=torch.float64, device="cpu")
        noise = 1 + _NOISE * (2 * drawn - 1)
        return (values * noise.to(values.device)).to(values.dtype)
    if not shuffled or not values.ndim:
        return values
    order = torch.randperm(values.shape[-1], generator=generator, device="cpu")
    return values[..., order.to(values.device)]


def _is_same(one: InputSet, other: InputSet) -> bool:
    left, right = (list_tensors((entry.args, dict(entry.kwargs))) for entry in (one, other))
    return all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(left, right, strict=True))
