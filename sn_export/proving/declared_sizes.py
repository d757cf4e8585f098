"""The sizes that a file declares: of its inputs, which are checked, and of its outputs, corrected.

Where an output has another size than is declared, onnxruntime only logs it; other runtimes plan
their memory by what is declared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx

from ..errors import ExportError
from ..files import read_onnx
from ..running import DynamicDim, Place, Reference


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
        sizes: the sizes in one input set: see `list_sizes`.
    """
    first: dict[object, DynamicDim] = {}
    for dim in dims:
        shape = shapes.get(dim.tensor, ())
        symbol = shape[dim.position] if dim.position < len(shape) else None
        if not isinstance(symbol, str):
            continue
        other = first.setdefault(symbol, dim)
        if sizes.get(other.place) != sizes.get(dim.place):
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


def correct_declared_sizes(
    path: Path,
    references: Sequence[Reference],
    declared: Sequence[Sequence[object]] | None = None,
    leaves_open: bool = True,
) -> tuple[str, ...]:
    """Correct the sizes that a proved file declares for its outputs to those that were seen.

    The TorchScript exporter declares what onnx infers: for an average pool with ``ceil_mode`` that
    is one more than torch and onnxruntime compute. A size that varies between the input sets is
    left open::

        [2, 8, 12, 12], seen as [2, 8, 11, 11]  ->  [2, 8, 11, 11]
        [2, 6], seen as [2, 6] and as [2, 9]    ->  [2, ?]
        [1, 1, 2, 2], seen as [1, 2, 2]         ->  [1, 2, 2], of an LSTM by torch 2.9

    Args:
        path: the file; its external data is neither read nor written.
        references: the input sets of the proof, with the outputs, which model and file share.
        declared: the shapes that the file declares, where the caller knows them. Then the file is
            read only if one of them has another size than was seen.
        leaves_open: whether a size that varies is left open; else it is an error, and another
            exporter may do better. Dynamo fixes the length of a GRU at its first call in a
            process and not later, and the same model has to give the same file.

    Returns:
        A sentence for each dimension that was corrected.

    Raises:
        ExportError: if the file fixes a dimension that varies, without ``leaves_open``.
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
    file = read_onnx(path)
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
    """Declare the shape that was seen, if the file declares another number of dimensions."""
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
