"""ONNX files: the graph that torch makes, cleaned of the machine, folded, saved and checked."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
from torch import Tensor, nn

from ..errors import ExportError
from ..proving import save, weight_bytes
from ..results import Exporter, FileInput, FoldedInitializer
from ..running import Reference
from ..text import qualified
from .arguments import ExternalData, Request
from .folding import fold_initializers
from .graph import rename, set_opset, strip_traces, widen_indices
from .torch_exporters import run_exporter

# A protobuf message ends at 2 GiB; the graph around the weights needs some of that.
_INLINE_LIMIT = 2**31 - 2**26


@dataclass(frozen=True)
class Written:
    """A file that `write_onnx` wrote.

    Attributes:
        opset: version of the default opset.
        folded: what was folded because it depends on initializers alone.
        program: torch's ONNXProgram; None by the TorchScript exporter.
        inputs: the inputs of the file.
        declared: the shape that it declares for each output; empty where it declares none.
        notes: objections of onnx's checker, though the file is valid.
    """

    opset: int
    folded: tuple[FoldedInitializer, ...]
    program: Any
    inputs: tuple[FileInput, ...]
    declared: tuple[tuple[int | str, ...], ...]
    notes: tuple[str, ...] = ()

    def without_program(self) -> Written:
        """Return the record without torch's program, whose weights are freed."""
        if self.program is not None:
            _free(self.program.model)
        freed = replace(self, program=None)
        gc.collect()  # torch's graphs are full of cycles
        return freed


def write_onnx(
    request: Request,
    reference: Reference,
    exporter: Exporter,
    metadata: Mapping[str, str],
    path: Path,
    release: Callable[[], None],
) -> Written:
    """Export a model to ``path``, with its external data beside it.

    Args:
        request: the model, in eval mode and without spectral norm, and what is asked for.
        reference: the example input, which is not written to, and the model's answer.
        exporter: which of torch's exporters.
        metadata: what is written to ``metadata_props``.
        path: the file.
        release: called whenever weights have been read, to free the memory that this took.

    Raises:
        ExportError: if torch cannot export it, with torch's error as its cause; if it wrote
            another opset, or a file that is not valid.
        OSError: if the disk is full, say.
    """
    graph, program = run_exporter(request, reference, exporter, path.with_suffix(".raw.onnx"))
    rename(
        graph.graph,
        list(request.input_names.values()) if exporter == "dynamo" else None,
        request.output_names,
    )
    strip_traces(graph)
    widen_indices(graph.graph)
    set_opset(graph, request.opset_version)
    graph.metadata_props.update(metadata)
    folded = fold_initializers(graph, _state(request.model))
    described = tuple(map(_describe_input, graph.graph.inputs))
    declared = tuple(map(_sizes_of, graph.graph.outputs))
    notes = _check(_save(graph, path, request.external_data, release))
    if program is None:
        _free(graph)  # and unmap what the exporter wrote
    opset = int(graph.opset_imports.get("", 0))
    return Written(opset, folded, program, described, declared, notes)


def _describe_input(value: ir.Value) -> FileInput:
    dtype = "" if value.dtype is None else str(value.dtype.numpy())
    return FileInput(value.name or "", dtype, _sizes_of(value))


def _sizes_of(value: ir.Value) -> tuple[int | str, ...]:
    sizes = () if value.shape is None else value.shape
    return tuple(size if isinstance(size, int) else size.value or "?" for size in sizes)


def _state(model: nn.Module) -> dict[str, Tensor]:
    # In the order of the state dict, and with the buffers that a state dict leaves out.
    return {
        qualified(path, name): tensor
        for path, module in model.named_modules(remove_duplicate=False)
        for name, tensor in (*module._parameters.items(), *module._buffers.items())
        if tensor is not None
    }


def _save(
    model: ir.Model, path: Path, external_data: ExternalData, release: Callable[[], None]
) -> onnx.ModelProto:
    """Write the file, and return its model without the weights."""
    size = weight_bytes(model)
    outside = size > _INLINE_LIMIT if external_data == "auto" else external_data
    if not outside and size > _INLINE_LIMIT:
        raise ExportError(
            f"the weights take {size} bytes and a single ONNX file holds {_INLINE_LIMIT}; "
            "pass external_data='auto' or True"
        )
    return save(model, path, outside=outside, release=release)


def _free(model: ir.Model) -> None:
    # onnxscript's rewriter holds on to the last graph that it has seen.
    for value in model.graph.initializers.values():
        value.const_value = None


def _check(model: onnx.ModelProto) -> tuple[str, ...]:
    """Return objections of onnx's shape inference to a valid model; they may be wrong.

    For an average pool with ``ceil_mode``, onnx infers one element more than torch and onnxruntime
    compute.
    """
    try:
        onnx.checker.check_model(model, full_check=True)
    except Exception as inferred:  # onnx has several types for it, and protobuf more
        try:
            onnx.checker.check_model(model)
        except Exception as error:
            raise ExportError(f"the file that torch wrote is not valid ONNX: {error}") from error
        return (
            f"onnx's checker infers other shapes than were seen: {' '.join(str(inferred).split())}",
        )
    return ()
