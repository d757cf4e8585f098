"""ONNX files: made quietly by torch, cleaned of the machine.

The opsets that can be had are those that an exporter of torch writes and the installed onnxruntime
runs.
"""

from __future__ import annotations

import functools
import gc
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch
import torch.onnx
from onnx import TensorProto, helper
from torch import Tensor, nn

from ..errors import ExportError
from ..files import find_disk_error
from ..proving import called_name, ort, save, weight_bytes
from ..results import EXPORTERS, Exporter, ExporterChoice, FileInput, FoldedInitializer
from ..running import (
    Reference,
    are_large,
    dynamic_axes,
    flat_shapes,
    newest_torchscript_opset,
    no_fused_attention,
)
from ..text import plain_integer, qualified
from .arguments import ExternalData, Request
from .failures import TorchExporterError, explain_failure
from .flat_call import FlatCall, flat_call
from .folding.fold import fold_initializers
from .graph import rename, set_opset, strip_traces, widen_indices
from .quiet import operators_parsed_once, quiet

# A protobuf message ends at 2 GiB; the graph around the weights needs some of that.
_INLINE_LIMIT = 2**31 - 2**26
_OLDEST_OPSETS: dict[Exporter, int] = {"dynamo": 17, "torchscript": 11}
_BFLOAT16 = 22
_IR_VERSION = 10  # of the probe: known to every onnxruntime that runs the newest opsets


@dataclass(frozen=True)
class Written:
    """What `write_onnx` made.

    Attributes:
        opset: version of the default opset.
        folded: what was folded because it depends on initializers alone.
        program: torch's ONNXProgram, of the dynamo exporter alone.
        inputs: the inputs of the file.
        declared: the shapes that it declares of its outputs; none of an output without one.
        notes: what onnx's checker says against it, though it is a valid file.
    """

    opset: int
    folded: tuple[FoldedInitializer, ...]
    program: Any
    inputs: tuple[FileInput, ...]
    declared: tuple[tuple[int | str, ...], ...]
    notes: tuple[str, ...] = ()

    def without_program(self) -> Written:
        """Return it without the program, whose weights are freed."""
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
        release: called whenever weights have been read, to free the memory that took.

    Raises:
        ExportError: if torch cannot export it, with torch's error as its cause; if it wrote
            another opset, or a file that is not valid.
        OSError: if the disk is full, say.
    """
    graph, program = _run_exporter(request, reference, exporter, path.with_suffix(".raw.onnx"))
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


def _run_exporter(
    request: Request, reference: Reference, exporter: Exporter, raw: Path
) -> tuple[ir.Model, Any]:
    """Return the graph that torch makes, and its program where it has one.

    The TorchScript exporter writes a large file to ``raw`` first.
    """
    model = request.model
    try:
        with quiet(request.verbose), no_fused_attention():
            call = flat_call(model, reference)
            if exporter == "torchscript":
                return _torchscript(request, call, raw), None
            program = _dynamo(request, call)
            return program.model, program
    except Exception as error:
        full = find_disk_error(error)
        if full is not None:  # the exporter is not to blame, and the other would fail too
            raise OSError(full.errno, full.strerror) from error
        other, inputs = _other_choice(request, exporter), list(request.input_names)
        raise TorchExporterError(
            f"the {exporter} exporter cannot export {called_name(model, reference.inputs)}",
            explain_failure(error, model, reference.inputs.method, other, inputs),
        ) from error


def _other_choice(request: Request, exporter: Exporter) -> ExporterChoice | None:
    """Return what to try where this exporter fails: of dynamo the other one, of that both.

    So advice comes to an end. None where both are tried, or the other one has not this opset.
    """
    if len(request.exporters) > 1 or len(exporters_of(request.opset_version)) < 2:
        return None
    return "torchscript" if exporter == "dynamo" else "auto"


def _dynamo(request: Request, call: FlatCall) -> Any:
    shapes = flat_shapes(list(request.input_names), request.dims)
    with operators_parsed_once():
        program = torch.onnx.export(
            call.module,
            call.tensors,
            dynamo=True,
            verbose=request.verbose,
            opset_version=request.opset_version,
            dynamic_shapes=shapes,
        )
    assert program is not None  # torch returns None only for dynamo=False
    return program


def _torchscript(request: Request, call: FlatCall, raw: Path) -> ir.Model:
    model = request.model
    buffers = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
    # A large file goes to the disk: past 2 GB torch takes nothing but the text of a path.
    content: Any = None if are_large(model.parameters()) else io.BytesIO()
    with torch.no_grad():
        torch.onnx.export(
            call.module,
            call.tensors,
            content or str(raw),
            dynamo=False,
            verbose=request.verbose,
            opset_version=request.opset_version,
            input_names=list(request.input_names.values()),
            dynamic_axes=dynamic_axes(request.input_names, request.dims) or None,
        )
    graph = ir.from_proto(onnx.load_from_string(content.getvalue())) if content else ir.load(raw)
    # Tracing runs the model, and the exporter reads the buffers afterwards: those that a forward
    # writes (vectors that iterate in eval mode) would be one step ahead.
    for name, buffer in model.named_buffers():
        value = graph.graph.initializers.get(name)
        if value is None or torch.equal(buffer, buffers[name]):
            continue
        # A batch norm that writes its statistics does not read them.
        if all(node.op_type != "BatchNormalization" for node in value.consumers()):
            value.const_value = ir.tensor(buffers[name].cpu().numpy(), name=name)
    return graph


def _describe_input(value: ir.Value) -> FileInput:
    dtype = "" if value.dtype is None else str(value.dtype.numpy())
    return FileInput(value.name or "", dtype, _sizes_of(value))


def _sizes_of(value: ir.Value) -> tuple[int | str, ...]:
    sizes = () if value.shape is None else value.shape
    return tuple(size if isinstance(size, int) else size.value or "?" for size in sizes)


def _state(model: nn.Module) -> dict[str, Tensor]:
    # In the order of the state dict, module by module, with buffers that it leaves out.
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
    """Return what onnx's inference of shapes says against a valid model: it is no proof.

    Of an average pool with ``ceil_mode``, onnx infers one element more than torch and onnxruntime
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


def require_opset(
    opset: int | None, exporters: Sequence[Exporter]
) -> tuple[int | None, tuple[Exporter, ...]]:
    """Return an opset, or None, with those of the exporters that make it.

    Raises:
        TypeError: if it is no integer.
        ValueError: if it is none of `opsets_of` the exporters.
    """
    if opset is None:
        return None, tuple(exporters)
    number = plain_integer(opset)
    if number is None:
        raise TypeError(f"opset_version must be an integer, got {type(opset).__name__}")
    able = tuple(name for name in exporters_of(number) if name in exporters)
    if not able:
        ranges = ((opsets_of(name), name) for name in exporters)
        wanted = " or ".join(f"{opsets[0]} to {opsets[-1]} ({name})" for opsets, name in ranges)
        raise ValueError(
            f"opset_version must be {wanted} with torch {torch.__version__}, onnx "
            f"{onnx.__version__} and onnxruntime {ort.__version__}, got {number}"
        )
    return number, able


def exporters_of(opset: int | None) -> tuple[Exporter, ...]:
    """Return the exporters that make files of this opset; all for None."""
    return tuple(name for name in EXPORTERS if opset is None or opset in opsets_of(name))


def default_opset(dtype: str | None) -> int | None:
    """Return the opset for a network of this dtype, None for torch's own default.

    Convolutions and much else have no bfloat16 before opset 22.
    """
    newest = max(opsets_of(name)[-1] for name in EXPORTERS)
    return min(_BFLOAT16, newest) if dtype == "bfloat16" else None


@functools.cache
def opsets_of(exporter: Exporter) -> range:
    """Return the opsets that an exporter writes, onnx knows and onnxruntime runs; tried once.

    The TorchScript exporter refuses what is newer than torch's constant; the dynamo exporter lets
    onnx convert its file to any that onnx knows.
    """
    newest = onnx.defs.onnx_opset_version()
    if exporter == "torchscript":
        newest = min(newest, newest_torchscript_opset())
    oldest = _OLDEST_OPSETS[exporter]
    newest = next(opset for opset in range(newest, oldest - 1, -1) if _runs(opset))
    return range(oldest, newest + 1)


def _runs(opset: int) -> bool:
    graph = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["y"])],
        "probe",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])],
    )
    probe = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=_IR_VERSION
    )
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    try:
        ort.InferenceSession(probe.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception:
        return False
    return True
