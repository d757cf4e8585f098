"""ONNX files: made quietly by torch, cleaned of the machine, published together or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import onnx_ir as ir
import torch
from torch import Tensor, nn

from .dynamic import DynamicDim, dynamic_axes
from .errors import ExportError
from .folding import FoldedInitializer, fold_initializers, joined
from .quiet import no_fused_attention, quiet
from .samples import InputSet

ExternalData = Literal["auto"] | bool
Exporter = Literal["dynamo", "torchscript"]

# A protobuf message ends at 2 GiB; the graph around the weights needs some of that.
_INLINE_LIMIT = 2**31 - 2**26
# What the exporters write about the machine and the caller's source files.
_TRACES = ("pkg.torch.onnx.stack_trace",)


@dataclass(frozen=True)
class ExportOptions:
    """What `torch.onnx.export` is asked for."""

    exporter: Exporter
    opset_version: int | None
    input_names: Sequence[str] | None
    output_names: Sequence[str] | None
    dynamic_shapes: Any
    dims: Sequence[DynamicDim]
    external_data: ExternalData
    verbose: bool
    metadata: Mapping[str, str] = field(default_factory=dict)


def write_onnx(
    model: nn.Module, example: InputSet, options: ExportOptions, path: Path
) -> tuple[int, tuple[FoldedInitializer, ...]]:
    """Export ``model`` to ``path``, with its external data beside it.

    Returns:
        The opset, and what was folded because it depends on initializers alone.

    Raises:
        ExportError: if torch cannot export it, with torch's error as its cause.
    """
    inputs = example.clone()
    try:
        with quiet(options.verbose), no_fused_attention():
            if options.exporter == "dynamo":
                graph = _dynamo(model, inputs, options)
            else:
                graph = _torchscript(model, inputs, options, path.with_suffix(".raw.onnx"))
    except Exception as error:
        raise ExportError(
            f"the {options.exporter} exporter cannot export {type(model).__name__}: "
            f"{type(error).__name__}: {_first_paragraph(error)}"
        ) from error
    _strip(graph)
    graph.metadata_props.update(options.metadata)
    folded = fold_initializers(graph, _state(model))
    _save(graph, path, options.external_data)
    return int(graph.opset_imports.get("", 0)), folded


@contextlib.contextmanager
def workspace(target: Path) -> Iterator[Path]:
    """Yield a path in a new folder beside ``target``; the folder is gone afterwards."""
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield folder / target.name
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def publish(made: Path, target: Path, beside: Sequence[tuple[Path, Path]] = ()) -> None:
    """Move ``made`` and its external data to ``target``, both or none.

    Args:
        made: the file in a workspace.
        target: its place.
        beside: further files, each in a workspace of its own, and their places; moved with it.

    Raises:
        ExportError: if a file cannot be moved; what was at ``target`` is there again.
    """
    pairs = [
        (source, target.with_name(source.name))
        for source in (made.with_name(made.name + ".data"), made)
        if source.exists()
    ]
    pairs += beside
    kept: list[tuple[Path, Path | None]] = []
    try:
        for number, (source, destination) in enumerate(pairs):
            backup = source.with_name(f"replaced-{number}")
            had = destination.exists()
            kept.append((destination, backup if had else None))
            if had:
                os.link(destination, backup)
            os.replace(source, destination)
    except BaseException as error:
        for destination, earlier in kept:
            if earlier is None:
                destination.unlink(missing_ok=True)
            elif earlier.exists():
                os.replace(earlier, destination)
        if not isinstance(error, OSError):
            raise
        raise ExportError(f"cannot write '{target}': {error.strerror}") from error


def _dynamo(model: nn.Module, example: InputSet, options: ExportOptions) -> ir.Model:
    program = torch.onnx.export(
        model,
        # A dict at the end is always taken for keyword arguments.
        (*example.args, dict(example.kwargs)),
        dynamo=True,
        verbose=options.verbose,
        opset_version=options.opset_version,
        input_names=options.input_names,
        output_names=options.output_names,
        dynamic_shapes=options.dynamic_shapes,
    )
    assert program is not None  # torch returns None only for dynamo=False
    return program.model


def _torchscript(
    model: nn.Module, example: InputSet, options: ExportOptions, raw: Path
) -> ir.Model:
    names = [name for name, _ in example.named_tensors(model)]
    buffers = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
    with torch.no_grad():
        torch.onnx.export(
            model,
            # A dict at the end is always taken for keyword arguments.
            (*example.args, dict(example.kwargs)),
            raw,
            dynamo=False,
            verbose=options.verbose,
            opset_version=options.opset_version,
            input_names=options.input_names or names,
            output_names=options.output_names,
            dynamic_axes=_renamed(dynamic_axes(options.dims), names, options.input_names),
        )
    graph = ir.load(raw)
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


def _renamed(
    axes: dict[str, dict[int, str]], names: Sequence[str], wanted: Sequence[str] | None
) -> dict[str, dict[int, str]] | None:
    renaming = dict(zip(names, wanted or names, strict=False))
    return {renaming[name]: entry for name, entry in axes.items()} or None


def _state(model: nn.Module) -> dict[str, Tensor]:
    # In the order of the state dict, module by module, with buffers that it leaves out.
    return {
        joined(path, name): tensor
        for path, module in model.named_modules(remove_duplicate=False)
        for name, tensor in (*module._parameters.items(), *module._buffers.items())
        if tensor is not None
    }


def _strip(model: ir.Model) -> None:
    graphs = [model.graph, *(function.graph for function in model.functions.values())]
    for graph in graphs:
        for node in graph.all_nodes():
            node.doc_string = None
            for key in _TRACES:
                node.metadata_props.pop(key, None)


def _save(model: ir.Model, path: Path, external_data: ExternalData) -> None:
    size = sum(
        value.const_value.nbytes
        for value in model.graph.initializers.values()
        if value.const_value is not None
    )
    outside = size > _INLINE_LIMIT if external_data == "auto" else external_data
    if not outside and size > _INLINE_LIMIT:
        raise ExportError(
            f"the weights take {size} bytes and a single ONNX file holds {_INLINE_LIMIT}; "
            "pass external_data='auto' or True"
        )
    ir.save(model, path, external_data=path.name + ".data" if outside else None)


def _first_paragraph(error: Exception) -> str:
    root: BaseException = error
    while root.__cause__ is not None:
        root = root.__cause__
    text = str(root).strip().split("\n\n")[0]
    return text if len(text) < 1000 else text[:1000] + " ..."
