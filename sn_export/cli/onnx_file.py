"""What an ONNX file says about itself, for ``sn-export inspect``; its weights are not read."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import onnx

from ..errors import UsageError
from ..results import FileInput
from ..text import format_count
from .console import number, print_json, print_line, table

_FROZEN = "sn_export.frozen"


def inspect_onnx(path: Path, as_json: bool) -> None:
    """Print inputs, outputs, opset, sizes, what made the file, and its frozen layers.

    Raises:
        UsageError: if it is no ONNX file.
    """
    try:
        model = onnx.load(path, load_external_data=False)
        found = _describe(path, model)
    except Exception as error:  # protobuf has several types for it
        raise UsageError(f"'{path}' is no ONNX file: {error}") from error
    if not model.HasField("graph"):
        raise UsageError(f"'{path}' is no ONNX file: it has no graph")
    if as_json:
        print_json(found)
    else:
        _show(found)


def _describe(path: Path, model: onnx.ModelProto) -> dict[str, Any]:
    weights = {tensor.name for tensor in model.graph.initializer}
    outside = {
        path.parent / entry.value
        for tensor in model.graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    return {
        "path": path,
        "format": "onnx",
        "producer": f"{model.producer_name} {model.producer_version}".strip(),
        "ir_version": model.ir_version,
        "opsets": {entry.domain or "ai.onnx": entry.version for entry in model.opset_import},
        "bytes": path.stat().st_size,
        "external_data": {str(file): _size(file) for file in sorted(outside)},
        "nodes": len(model.graph.node),
        "weights": len(weights),
        "elements": sum(math.prod(tensor.dims) for tensor in model.graph.initializer),
        "inputs": [_value(one) for one in model.graph.input if one.name not in weights],
        "outputs": [_value(one) for one in model.graph.output],
        "frozen": _frozen(metadata),
        "metadata": {key: text for key, text in metadata.items() if key != _FROZEN},
    }


def _size(file: Path) -> int | None:
    try:
        return file.stat().st_size if file.is_file() else None
    except (OSError, ValueError):  # a name that no file can have
        return None


def _value(value: onnx.ValueInfoProto) -> FileInput:
    kind = value.type.WhichOneof("value")
    if kind != "tensor_type":
        return FileInput(value.name, (kind or "unknown").removesuffix("_type"), ())
    tensor = value.type.tensor_type
    shape = tuple(
        dim.dim_value if dim.HasField("dim_value") else dim.dim_param or "?"
        for dim in tensor.shape.dim
    )
    try:
        dtype = str(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type))
    except KeyError:
        dtype = f"dtype {tensor.elem_type}"
    return FileInput(value.name, dtype, shape)


def _frozen(metadata: dict[str, str]) -> dict[str, float | None] | None:
    """Return sigma by tensor as sn_export wrote it; None where it did not."""
    try:
        found = json.loads(metadata[_FROZEN])
        return {name: None if sigma is None else float(sigma) for name, sigma in found.items()}
    except (KeyError, ValueError, TypeError, AttributeError, OverflowError, RecursionError):
        return None  # not written by sn_export


def _show(found: dict[str, Any]) -> None:
    opsets = ", ".join(f"{domain} {version}" for domain, version in found["opsets"].items())
    print_line(f"{found['path']} (ONNX): opset {opsets}, {found['bytes']} bytes")
    for file, size in found["external_data"].items():
        print_line(f"external data: {file}, {'missing' if size is None else f'{size} bytes'}")
    print_line(f"made by: {found['producer'] or 'unknown'}, IR version {found['ir_version']}")
    print_line(
        f"{format_count(found['nodes'], 'node')}, {format_count(found['weights'], 'weight')} with "
        f"{format_count(found['elements'], 'element')}"
    )
    _show_values("inputs", found["inputs"])
    _show_values("outputs", found["outputs"])
    if found["frozen"]:
        rows = [
            [name, "" if sigma is None else number(sigma)]
            for name, sigma in found["frozen"].items()
        ]
        table("frozen", ["tensor", "sigma"], rows)
    if found["metadata"]:
        table("metadata", ["key", "value"], [list(pair) for pair in found["metadata"].items()])


def _show_values(title: str, values: Iterable[FileInput]) -> None:
    rows = [[one.name, one.dtype, "x".join(map(str, one.shape)) or "scalar"] for one in values]
    table(title, ["name", "dtype", "shape"], rows)
