"""Inputs of other sizes than the example's, for the proof of dynamic shapes.

Among them are the first sizes that torch's program leaves out. A forward that decides by a size
(``if x.shape[0] < 5``) is traced on one side; the program knows on which, and the file does not.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import ExportError, SnExportError
from ..running import DynamicDim, InputSet, Place, Reference, draw_near_like, draw_random_like

_logger = logging.getLogger("sn_export")
_SEED = 1
_KINDS = ("smallest", "odd", "larger")  # sizes that are tried
_ENDLESS = 2**30  # sizes from here on are no bound
_LARGEST = 2**24  # elements of a tensor, past which a size is not tried
Groups = Mapping[str, Sequence[DynamicDim]]


def run_resized(
    example: InputSet,
    dims: Sequence[DynamicDim],
    run: Callable[[InputSet], Reference],
    own: Sequence[InputSet] = (),
) -> list[Reference]:
    """Run the model at the smallest, an odd and a larger size of its dynamic dimensions.

    All dimensions change together; where the model rejects that, each one alone. Then a dimension
    that was as large as another one in all runs so far changes alone: a network may take height and
    width for one number as long as they are equal.

    Args:
        example: the example input, bound.
        dims: the dynamic dimensions of ``example``.
        run: runs the model, and raises a `SnExportError` where it rejects an input.
        own: input sets of the user's own, whose sizes count as tried.

    Raises:
        ExportError: if the model takes no other size in a dimension that the user names.
    """
    tried = _Tried(example, run, own)
    groups = _group_by_root(dims)
    if not all(tried.varies(group) for group in groups.values()):
        for position in range(len(_KINDS)):
            sizes = {root: _choose_sizes(group)[position] for root, group in groups.items()}
            if not tried.run(groups, sizes):
                for root, size in sizes.items():
                    tried.run(groups, {root: size})
    units = _find_units(groups)
    for name, group in units.items():
        others = [other for key, other in units.items() if key != name]
        if any(tried.has_equal(group[0], other[0]) for other in others):
            # The larger sizes first, and never 1: that may be broadcast, and says nothing.
            any(
                tried.run(units, {name: size})
                for size in reversed(_choose_sizes(group))
                if size > 1
            )
    for root, group in groups.items():
        error = tried.errors.get(root)
        if error is not None and not tried.varies(group) and any(d.is_promised for d in group):
            raise ExportError(
                f"dimension {group[0].position} of '{group[0].tensor}' is declared dynamic "
                f"({root}), and the model takes no size that was tried but {group[0].size}: "
                f"{error}. Give it a range, torch.export.Dim('{root}', min=..., max=...), "
                "pass inputs=[...] of other sizes, or leave it fixed"
            ) from error.__cause__
    return tried.references


def run_beyond_program(
    program: Any,
    example: InputSet,
    dims: Sequence[DynamicDim],
    run: Callable[[InputSet], Reference],
) -> list[Reference]:
    """Run the model at the first sizes that torch's program leaves out, though they are declared.

    Args:
        program: torch's ONNXProgram.
        example: the example input, bound.
        dims: the dynamic dimensions of ``example``.
        run: runs the model, and raises a `SnExportError` where it rejects an input.

    Returns:
        What the model returned; nothing for sizes that it rejects, or that take tensors of more
        than 2**24 elements.
    """
    groups, tensors, inputs = _group_by_root(dims), dict(example.named_tensors()), _Resizer(example)
    found = []
    for root, smallest, largest in _find_narrowed(program, list(tensors), dims):
        _logger.info("torch's program is for %s from %d to %d", root, smallest, largest)
        for size in (smallest - 1, largest + 1):
            if not _is_tried(size, groups[root], tensors):
                continue
            try:
                found.append(run(inputs.resize({root: groups[root]}, {root: size})))
            except SnExportError as error:
                _logger.info("not proved at this size: %s", error)
    return found


class _Tried:
    """The sizes at which the model was run, and those that it rejected.

    Attributes:
        references: what it returned at other sizes than the example's.
        errors: why it rejected a size last, by the name of what varied.
    """

    def __init__(
        self, example: InputSet, run: Callable[[InputSet], Reference], own: Sequence[InputSet]
    ) -> None:
        self.references: list[Reference] = []
        self.errors: dict[str, SnExportError] = {}
        self._inputs = _Resizer(example)
        self._run = run
        self._shapes = [list_sizes(one) for one in (example, *own)]
        self._done: dict[frozenset[tuple[str, int]], bool] = {}

    def run(self, groups: Groups, sizes: Mapping[str, int]) -> bool:
        """Run the model once at ``sizes``, if those are not the example's; False if it fails."""
        others = {name: size for name, size in sizes.items() if size != _get_size(groups[name])}
        key = frozenset(others.items())
        if not others or key in self._done:
            return self._done.get(key, True)
        self._done[key] = False
        try:
            reference = self._inputs.run(groups, others, self._run)
        except SnExportError as error:  # the model's own limit, not the exporter's
            _logger.info("not proved at these sizes: %s", error)
            self.errors.update(dict.fromkeys(others, error))
            return False
        self.references.append(reference)
        self._shapes.append(list_sizes(reference.inputs))
        self._done[key] = True
        return True

    def varies(self, group: Sequence[DynamicDim]) -> bool:
        """Whether the dimensions had another size than in the example in some run."""
        return any(shape.get(group[0].place) != group[0].size for shape in self._shapes)

    def has_equal(self, one: DynamicDim, other: DynamicDim) -> bool:
        """Whether two dimensions had the same size in every run."""
        return all(shape.get(one.place) == shape.get(other.place) for shape in self._shapes)


def _group_by_root(dims: Sequence[DynamicDim]) -> dict[str, list[DynamicDim]]:
    """Return the dimensions in groups of those that vary together."""
    roots: dict[str, list[DynamicDim]] = {}
    for dim in dims:
        roots.setdefault(dim.root, []).append(dim)
    return roots


def list_sizes(inputs: InputSet) -> dict[Place, int]:
    """Return the size of every dimension of every tensor."""
    return {
        (name, position): size
        for name, tensor in inputs.named_tensors()
        for position, size in enumerate(tensor.shape)
    }


def _choose_sizes(group: Sequence[DynamicDim]) -> tuple[int, int, int]:
    """Return the sizes of `_KINDS` within the range that is declared.

    For a dimension of 4 without a range ``(1, 5, 8)``; with ``min=2, max=6`` it is ``(2, 5, 6)``.
    Where nothing larger is allowed the half takes its place: ``(1, 3, 2)`` with ``max=4``.
    """
    now = _get_size(group)
    low = max([1, *(dim.range[0] for dim in group)])
    high = min(dim.range[1] for dim in group)
    odd = now + 1 + now % 2
    if odd > high:
        odd = max(low, now - 1 - now % 2)
    return low, odd, min(2 * now, high) if high > now else max(low, now // 2)


def _get_size(group: Sequence[DynamicDim]) -> int:
    return group[0].find_root_size()


def _find_units(groups: Groups) -> dict[str, Sequence[DynamicDim]]:
    """Return what can vary alone: dimensions of one name together, any other by itself.

    Of ``Dim("batch")`` for two tensors, and ``Dim.AUTO`` for height and width of 8::

        {"batch": [x0, y0], "dim_8": [x2, x3]}
        # becomes {"batch": [x0, y0], "x[2]": [x2], "x[3]": [x3]}
    """
    units: dict[str, Sequence[DynamicDim]] = {}
    for root, group in groups.items():
        if group[0].is_named or len(group) == 1:
            units[root] = group
        else:
            units |= {f"{dim.tensor}[{dim.position}]": [dim] for dim in group}
    return units


class _Resizer:
    """Makes inputs like the example of other sizes, with random values."""

    def __init__(self, example: InputSet) -> None:
        self._example = example
        self._names = {id(tensor): name for name, tensor in example.named_tensors()}
        self._generator = torch.Generator().manual_seed(_SEED)

    def run(
        self, groups: Groups, sizes: Mapping[str, int], run: Callable[[InputSet], Reference]
    ) -> Reference:
        """Run the model at other sizes, on random values, or on values near the example.

        Raises:
            SnExportError: if it rejects both.
        """
        try:
            return run(self.resize(groups, sizes))
        except SnExportError:
            return run(self.resize(groups, sizes, near=True))

    def resize(self, groups: Groups, sizes: Mapping[str, int], near: bool = False) -> InputSet:
        """Return an input set of other sizes; what ``sizes`` does not name keeps its own."""
        wanted = {
            dim.place: dim.compute_size(size)
            for name, size in sizes.items()
            for dim in groups[name]
        }

        def resize(tensor: Tensor) -> Tensor:
            name = self._names[id(tensor)]
            shape = [wanted.get((name, i), size) for i, size in enumerate(tensor.shape)]
            stretched = _stretch(tensor, shape)
            if near:
                return draw_near_like(stretched, self._generator, shuffled=False)
            return draw_random_like(stretched, self._generator)

        label = "size " + ", ".join(f"{name}={size}" for name, size in sizes.items())
        return self._example.map(resize, label)


def _stretch(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """Return a tensor of another shape, with the values repeated or cut.

    ``[1, 2, 3]`` becomes ``[1, 2, 3, 1, 2]`` for the shape ``[5]``, and ``[1, 2]`` for ``[2]``.
    """
    index = tensor.detach()
    if not index.numel():
        return index.new_zeros(shape)
    for position, size in enumerate(shape):
        old = index.shape[position]
        if old != size:
            index = index.index_select(position, torch.arange(size, device=index.device) % old)
    return index


def _is_tried(size: int, group: Sequence[DynamicDim], example: Mapping[str, Tensor]) -> bool:
    low = max(2, *(dim.range[0] for dim in group))  # torch makes a program for 2 and more unasked
    high = min(_ENDLESS - 1, *(dim.range[1] for dim in group))
    shapes = {dim.tensor: list(example[dim.tensor].shape) for dim in group}
    for dim in group:
        shapes[dim.tensor][dim.position] = dim.compute_size(size)
    return low <= size <= high and all(math.prod(shape) <= _LARGEST for shape in shapes.values())


def _find_narrowed(
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
            yield dim.root, _to_number(bounds.lower, 0), _to_number(bounds.upper, _ENDLESS)


def _to_number(bound: Any, default: int) -> int:
    is_finite = getattr(bound, "is_Integer", isinstance(bound, int))  # sympy has infinities
    return int(bound) if is_finite else default
