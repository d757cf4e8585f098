"""Inputs of other sizes than the example's, for the proof of dynamic shapes.

The sizes that a file declares its outputs to have are corrected to those that were seen.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import onnx
import torch
from torch import Tensor

from ..errors import ExportError, SnExportError
from ..running import DynamicDim, InputSet, Reference, near_like, random_like

_logger = logging.getLogger("sn_export")
_SEED = 1
_KINDS = ("smallest", "odd", "larger")  # sizes that are tried

Groups = Mapping[str, Sequence[DynamicDim]]
Place = tuple[str, int]  # name of the tensor, index of the dimension


def resized_references(
    example: InputSet,
    dims: Sequence[DynamicDim],
    run: Callable[[InputSet], Reference],
    own: Sequence[InputSet] = (),
) -> list[Reference]:
    """Run the model at the smallest, an odd and a larger size of its dynamic dimensions.

    All dimensions change together; where the model rejects that, each one alone. Then those change
    alone that were as large as another one throughout: a network may take height and width for one
    number as long as they are equal.

    Args:
        example: the example input, bound.
        dims: the dynamic dimensions of ``example``.
        run: runs the model, and raises a `SnExportError` where it rejects an input.
        own: input sets of the user's own, whose sizes count as tried.

    Raises:
        ExportError: if the model takes no other size in a dimension that the user names.
    """
    tried = _Tried(example, run, own)
    groups = by_root(dims)
    if not all(tried.varies(group) for group in groups.values()):
        for position in range(len(_KINDS)):
            sizes = {root: _sizes(group)[position] for root, group in groups.items()}
            if not tried.run(groups, sizes):
                for root, size in sizes.items():
                    tried.run(groups, {root: size})
    units = _find_units(groups)
    for name, group in units.items():
        others = [other for key, other in units.items() if key != name]
        if any(tried.has_equal(group[0], other[0]) for other in others):
            # The larger first. A size of 1 may be broadcast, which is no size of its own.
            any(tried.run(units, {name: size}) for size in reversed(_sizes(group)) if size > 1)
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


class _Tried:
    """What the model said at other sizes, and what it rejected.

    Attributes:
        references: what it said.
        errors: what it rejected last, by the name of what varied.
    """

    def __init__(
        self, example: InputSet, run: Callable[[InputSet], Reference], own: Sequence[InputSet]
    ) -> None:
        self.references: list[Reference] = []
        self.errors: dict[str, SnExportError] = {}
        self._inputs = Resizer(example)
        self._run = run
        self._shapes = [sizes_of(one) for one in (example, *own)]
        self._done: dict[frozenset[tuple[str, int]], bool] = {}

    def run(self, groups: Groups, sizes: Mapping[str, int]) -> bool:
        """Run the model at ``sizes``, unless those are the example's or done; False if it fails."""
        others = {name: size for name, size in sizes.items() if size != _now(groups[name])}
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
        self._shapes.append(sizes_of(reference.inputs))
        self._done[key] = True
        return True

    def varies(self, group: Sequence[DynamicDim]) -> bool:
        """Whether the dimensions had another size than in the example."""
        return any(shape.get(_place(group[0])) != group[0].size for shape in self._shapes)

    def has_equal(self, one: DynamicDim, other: DynamicDim) -> bool:
        """Whether two dimensions had the same size throughout."""
        return all(shape.get(_place(one)) == shape.get(_place(other)) for shape in self._shapes)


def by_root(dims: Sequence[DynamicDim]) -> dict[str, list[DynamicDim]]:
    """Return the dimensions in groups of those that vary together."""
    roots: dict[str, list[DynamicDim]] = {}
    for dim in dims:
        roots.setdefault(dim.root, []).append(dim)
    return roots


def sizes_of(inputs: InputSet) -> dict[Place, int]:
    """Return the size of every dimension of every tensor."""
    return {
        (name, position): size
        for name, tensor in inputs.named_tensors()
        for position, size in enumerate(tensor.shape)
    }


def require_dynamic(shapes: Mapping[str, Sequence[object]], dims: Sequence[DynamicDim]) -> None:
    """Raise an ExportError if the file has fixed a dimension that the user names.

    Args:
        shapes: shape of each input of the file that has one, by the tensor's name; sizes of
            dynamic dimensions are no integers.
        dims: the dynamic dimensions.
    """
    for dim in dims:
        shape = shapes.get(dim.tensor, ())
        fixed = shape[dim.position] if dim.position < len(shape) else None
        if dim.is_promised and isinstance(fixed, int) and dim.range != (fixed, fixed):
            raise ExportError(
                f"dimension {dim.position} of '{dim.tensor}' is declared dynamic ({dim.root}), "
                f"and the exporter has fixed it at {fixed}"
            )


def find_tied_dims(
    shapes: Mapping[str, Sequence[object]],
    dims: Sequence[DynamicDim],
    sizes: Mapping[Place, int],
) -> tuple[DynamicDim, DynamicDim] | None:
    """Return two dimensions that the file calls by one name and that have two sizes, or None.

    Args:
        shapes: as for `require_dynamic`.
        dims: the dynamic dimensions.
        sizes: the sizes in one input set: see `sizes_of`.
    """
    first: dict[object, DynamicDim] = {}
    for dim in dims:
        shape = shapes.get(dim.tensor, ())
        symbol = shape[dim.position] if dim.position < len(shape) else None
        if not isinstance(symbol, str):
            continue
        other = first.setdefault(symbol, dim)
        if sizes.get(_place(other)) != sizes.get(_place(dim)):
            return other, dim
    return None


def require_apart(dims: tuple[DynamicDim, DynamicDim], label: str) -> None:
    """Raise an ExportError about two dimensions that a file has made one, if both are named.

    Args:
        dims: as `find_tied_dims` returns them.
        label: the input set in which the model takes them apart.
    """
    one, other = dims
    if one.is_named and other.is_named:
        raise ExportError(
            f"dimension {one.position} of '{one.tensor}' and dimension {other.position} of "
            f"'{other.tensor}' are declared dynamic ({one.root} and {other.root}), the model takes "
            f"them apart ({label}), and the exporter has made them one"
        )


def _sizes(group: Sequence[DynamicDim]) -> tuple[int, int, int]:
    """Return the sizes of `_KINDS` within the range that is declared.

    For a dimension of 4 without a range ``(1, 5, 8)``; with ``min=2, max=6`` it is ``(2, 5, 6)``.
    Where nothing larger is allowed the half takes its place: ``(1, 3, 2)`` with ``max=4``.
    """
    now = _now(group)
    low = max([1, *(dim.range[0] for dim in group)])
    high = min(dim.range[1] for dim in group)
    odd = now + 1 + now % 2
    if odd > high:
        odd = max(low, now - 1 - now % 2)
    return low, odd, min(2 * now, high) if high > now else max(low, now // 2)


def _now(group: Sequence[DynamicDim]) -> int:
    return group[0].root_size()


def _place(dim: DynamicDim) -> Place:
    return dim.tensor, dim.position


def _find_units(groups: Groups) -> dict[str, Sequence[DynamicDim]]:
    """Return what can vary alone: the dimensions of a name together, each one without a name."""
    units: dict[str, Sequence[DynamicDim]] = {}
    for root, group in groups.items():
        if group[0].is_named or len(group) == 1:
            units[root] = group
        else:
            units |= {f"{dim.tensor}[{dim.position}]": [dim] for dim in group}
    return units


class Resizer:
    """Makes inputs like the example of other sizes, with random values."""

    def __init__(self, example: InputSet) -> None:
        self._example = example
        self._names = {id(tensor): name for name, tensor in example.named_tensors()}
        self._generator = torch.Generator().manual_seed(_SEED)

    def run(
        self, groups: Groups, sizes: Mapping[str, int], run: Callable[[InputSet], Reference]
    ) -> Reference:
        """Run the model at other sizes, on random values or else on such near the example.

        Raises:
            SnExportError: if it rejects both.
        """
        try:
            return run(self.of(groups, sizes))
        except SnExportError:
            return run(self.of(groups, sizes, near=True))

    def of(self, groups: Groups, sizes: Mapping[str, int], near: bool = False) -> InputSet:
        """Return an input set; what ``sizes`` does not name stays as it is."""
        wanted = {
            _place(dim): dim.size_for(size) for name, size in sizes.items() for dim in groups[name]
        }

        def resize(tensor: Tensor) -> Tensor:
            name = self._names[id(tensor)]
            shape = [wanted.get((name, i), size) for i, size in enumerate(tensor.shape)]
            stretched = _stretched(tensor, shape)
            if near:
                return near_like(stretched, self._generator, shuffled=False)
            return random_like(stretched, self._generator)

        label = "size " + ", ".join(f"{name}={size}" for name, size in sizes.items())
        return self._example.map(resize, label)


def _stretched(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    # Only range, dtype and device matter to random_like; every value is seen at least once.
    index = tensor.detach()
    if not index.numel():
        return index.new_zeros(shape)
    for position, size in enumerate(shape):
        old = index.shape[position]
        if old != size:
            index = index.index_select(position, torch.arange(size, device=index.device) % old)
    return index


def correct_declared_sizes(
    path: Path,
    references: Sequence[Reference],
    declared: Sequence[Sequence[object]] | None = None,
    leaves_open: bool = True,
) -> tuple[str, ...]:
    """Rewrite what a proved file says of its outputs where another size was seen throughout.

    Onnxruntime only logs it; other runtimes plan their memory by it. The TorchScript exporter
    declares what onnx infers, which for an average pool with ``ceil_mode`` is one more than torch
    and onnxruntime compute. A size that varies between the input sets is left open::

        [2, 8, 12, 12], seen as [2, 8, 11, 11]  ->  [2, 8, 11, 11]
        [2, 6], seen as [2, 6] and as [2, 9]    ->  [2, ?]
        [1, 1, 2, 2], seen as [1, 2, 2]         ->  [1, 2, 2], of an LSTM by torch 2.9

    Args:
        path: the file; its external data is neither read nor written.
        references: the input sets of the proof, with the outputs of model and file.
        declared: the shapes that the file declares, where that is known. The file is read only
            where one of them has another size than was seen.
        leaves_open: whether a size that varies is left open. It is an error where another
            exporter may declare it: dynamo fixes the length of a GRU at its first call in a
            process and not later, and a model has the same file at every call.

    Returns:
        A sentence for each dimension that was corrected.

    Raises:
        ExportError: if it has fixed a dimension that varies, and that is not left open.
    """
    if declared is not None and all(
        len(shape) == one.outputs[number].ndim
        and all(
            size == actual
            for size, actual in zip(shape, one.outputs[number].shape, strict=True)
            if isinstance(size, int)
        )
        for number, shape in enumerate(declared)
        for one in references
    ):
        return ()
    file = onnx.load(path, load_external_data=False)
    notes = []
    for number, output in enumerate(file.graph.output):
        shapes = {one.inputs.label: one.outputs[number].shape for one in references}
        notes += _correct_rank(output, list(shapes.values()))
        for position, dim in enumerate(output.type.tensor_type.shape.dim):
            seen = {label: shape[position] for label, shape in shapes.items()}
            other = next((label for label, size in seen.items() if size != dim.dim_value), None)
            if not dim.HasField("dim_value") or other is None:
                continue
            fixed = f"dimension {position} of the output '{output.name}' at {dim.dim_value}"
            if len(set(seen.values())) > 1:
                if not leaves_open:
                    raise ExportError(
                        f"the exporter has fixed {fixed}, and it is {seen[other]} for {other}"
                    )
                dim.Clear()
                now = f"{seen[other]} for {other}: it is left open now"
            else:
                dim.dim_value = seen[other]
                now = f"{seen[other]}: it says so now"
            notes.append(f"the exporter has fixed {fixed}, and it is {now}")
    if notes:
        onnx.save(file, path)
    return tuple(notes)


def _correct_rank(output: onnx.ValueInfoProto, shapes: Sequence[Sequence[int]]) -> list[str]:
    """Declare the shape that was seen where another number of dimensions is declared."""
    shape, rank = output.type.tensor_type.shape, len(shapes[0])
    declared = len(shape.dim)
    if declared == rank or not output.type.tensor_type.HasField("shape"):
        return []
    shape.ClearField("dim")
    for sizes in zip(*shapes, strict=True):
        shape.dim.add(dim_value=sizes[0] if len(set(sizes)) == 1 else None)
    return [
        f"the exporter has given the output '{output.name}' {declared} dimensions, and it has "
        f"{rank}: it says so now"
    ]
