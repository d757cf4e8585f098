"""The sizes that a file declares its outputs to have, corrected to those that they have."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnx

from ..errors import ExportError
from ..running import Reference


def correct_declared_sizes(path: Path, references: Sequence[Reference]) -> tuple[str, ...]:
    """Rewrite what a proved file says of its outputs where another size was seen throughout.

    Onnxruntime only logs it; other runtimes plan their memory by it. The TorchScript exporter
    declares what onnx infers, which for an average pool with ``ceil_mode`` is one more than torch
    and onnxruntime compute::

        [2, 8, 12, 12], seen as [2, 8, 11, 11]  ->  [2, 8, 11, 11]

    Args:
        path: the file; its external data is neither read nor written.
        references: the input sets of the proof, with the outputs of model and file.

    Returns:
        A sentence for each dimension that was corrected.

    Raises:
        ExportError: if it has fixed a dimension that varies.
    """
    file = onnx.load(path, load_external_data=False)
    notes = []
    for number, output in enumerate(file.graph.output):
        shapes = {one.inputs.label: one.outputs[number].shape for one in references}
        for position, dim in enumerate(output.type.tensor_type.shape.dim):
            seen = {label: shape[position] for label, shape in shapes.items()}
            other = next((label for label, size in seen.items() if size != dim.dim_value), None)
            if not dim.HasField("dim_value") or other is None:
                continue
            fixed = f"dimension {position} of the output '{output.name}' at {dim.dim_value}"
            if len(set(seen.values())) > 1:
                raise ExportError(
                    f"the exporter has fixed {fixed}, and it is {seen[other]} for {other}"
                )
            dim.dim_value = seen[other]
            notes.append(f"the exporter has fixed {fixed}, and it is {seen[other]}: it says so now")
    if notes:
        onnx.save(file, path)
    return tuple(notes)
