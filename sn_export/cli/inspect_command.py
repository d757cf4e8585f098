"""``sn-export inspect``: list what a checkpoint or an ONNX file holds, without model code."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UsageError
from ..files import read_onnx, starts_as_onnx
from ..results import FileInput
from ..text import format_count, to_json_values
from .console import format_number, print_json, print_line, print_note, print_table, show_progress
from .onnx_command import require_apart, require_report, write_report
from .options import CheckpointArgument, CheckpointOptions, refuse_options, require_checkpoint

if TYPE_CHECKING:
    import onnx

_FROZEN = "sn_export.frozen"
_STATES = {
    "spectral_norm": "under spectral norm",
    "weight_norm": "under weight norm",
    "orthogonal": "kept orthogonal",
    "pruning": "pruned",
    "parametrization": "under other parametrizations",
}


@dataclass(frozen=True, kw_only=True)
class InspectCommand(CheckpointOptions):
    """List the reparametrized tensors in a checkpoint; no model code is needed.

    Of an ONNX file it shows inputs, outputs, opset, sizes, what made it, and the frozen layers.
    """

    checkpoint: CheckpointArgument
    report: Annotated[
        Path | None, typer.Option(help="A page to keep, .html, or its content, .json.")
    ] = None

    def run(self) -> None:
        """List them."""
        require_checkpoint(self.checkpoint)
        require_report(self.report, of_checkpoint=True)
        require_apart({"--report": self.report}, {"the checkpoint": [self.checkpoint]})
        if self._is_onnx():
            self._inspect_onnx()
            return
        with show_progress() as show:
            from ..checkpoints import inspect_checkpoint

            found = inspect_checkpoint(
                self.checkpoint,
                progress=lambda name, total: show(f"looked at {name}, of {total}"),
                **self.select_keywords(inspect_checkpoint),
            )
        content = _make_content(found)
        write_report(content, self.report, of_checkpoint=True)
        if self.as_json:
            print_json(content)
            return
        for note in found.notes:
            print_note(f"note: {note}")
        _show(found)

    def _is_onnx(self) -> bool:
        path = self.checkpoint
        return path.is_file() and (path.suffix == ".onnx" or starts_as_onnx(path))

    def _inspect_onnx(self) -> None:
        given = {
            "--key": self.key,
            "--dim": self.dims,
            "--trust-pickle": self.trust_pickle,
            "--report": self.report,
        }
        refuse_options(given, "an ONNX file has no state dict")
        inspect_onnx(self.checkpoint, self.as_json)


def _show(found: Any) -> None:
    under = f" under '{found.key}'" if found.key else ""
    title, entries = f"{found.path} ({found.format}){under}", format_count(found.tensors, "entry")
    if not found.layers:
        print_line(f"{title}: no spectral norm or other reparametrization of torch in {entries}")
        return
    keyed = len({layer.key for layer in found.layers}) > 1
    columns = ["module", "tensor", "kind", "shape", "dim", "sigma", "exact", "short by", "meaning"]
    rows = [
        [
            layer.module,
            layer.tensor,
            f"{layer.group.replace('_', ' ')} ({layer.spelling})",
            "x".join(map(str, layer.shape)),
            _format_dim(layer),
            format_number(layer.sigma),
            format_number(layer.sigma_exact),
            format_number(layer.shortfall),
            layer.meaning,
        ]
        for layer in found.layers
    ]
    if keyed:
        columns.insert(0, "under")
        rows = [[layer.key, *row] for layer, row in zip(found.layers, rows, strict=True)]
    print_table(f"{title}: {entries}, {_count_groups(found)}", columns, rows)


def _count_groups(found: Any) -> str:
    """Return how many there are, as in "2 tensors under spectral norm, 1 pruned"."""
    counts = Counter(layer.group for layer in found.layers)
    (first, state), *others = [
        (counts[group], _STATES[group]) for group in _STATES if counts[group]
    ]
    shown = [f"{format_count(first, 'tensor')} {state}", *(f"{n} {text}" for n, text in others)]
    return ", ".join(shown)


def _format_dim(layer: Any) -> str:
    if layer.dim is not None or (layer.group == "weight_norm" and "g" in layer.keys):
        return str(layer.dim)
    return "?" if layer.group.endswith("norm") else "-"


def _make_content(found: Any) -> dict[str, Any]:
    return {
        "path": found.path,
        "format": found.format,
        "key": found.key,
        "tensors": found.tensors,
        "notes": found.notes,
        "layers": [
            dataclasses.asdict(layer)
            | {
                "shortfall": layer.shortfall,
                "norm_in_use": layer.norm_in_use,
                "meaning": layer.meaning,
            }
            for layer in found.layers
        ],
    }


def inspect_onnx(path: Path, as_json: bool) -> None:
    """Print inputs, outputs, opset, sizes, the producer of the file, and its frozen layers.

    The weights are not read.

    Raises:
        UsageError: if it is no ONNX file.
    """
    try:
        model = read_onnx(path)
        found = _describe_onnx(path, model)
    except Exception as error:  # protobuf has several types for it
        raise UsageError(f"'{path}' is no ONNX file: {error}") from error
    if not model.HasField("graph"):
        raise UsageError(f"'{path}' is no ONNX file: it has no graph")
    try:
        json.dumps(found, default=to_json_values)
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"'{path}' holds a name that is no text, or a number of thousands of digits"
        ) from error
    if as_json:
        print_json(found)
    else:
        _show_onnx(found)


def _describe_onnx(path: Path, model: onnx.ModelProto) -> dict[str, Any]:
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
        "external_data": {str(file): _measure_file(file) for file in sorted(outside)},
        "nodes": len(model.graph.node),
        "weights": len(weights),
        "elements": sum(math.prod(tensor.dims) for tensor in model.graph.initializer),
        "inputs": [_describe_value(one) for one in model.graph.input if one.name not in weights],
        "outputs": [_describe_value(one) for one in model.graph.output],
        "frozen": _read_frozen(metadata),
        "metadata": {key: text for key, text in metadata.items() if key != _FROZEN},
    }


def _measure_file(file: Path) -> int | None:
    try:
        return file.stat().st_size if file.is_file() else None
    except (OSError, ValueError):  # a name that no file can have
        return None


def _describe_value(value: onnx.ValueInfoProto) -> FileInput:
    from onnx.helper import tensor_dtype_to_np_dtype

    kind = value.type.WhichOneof("value")
    if kind != "tensor_type":
        return FileInput(value.name, (kind or "unknown").removesuffix("_type"), ())
    tensor = value.type.tensor_type
    shape = tuple(
        dim.dim_value if dim.HasField("dim_value") else dim.dim_param or "?"
        for dim in tensor.shape.dim
    )
    try:
        dtype = str(tensor_dtype_to_np_dtype(tensor.elem_type))
    except KeyError:
        dtype = f"dtype {tensor.elem_type}"
    return FileInput(value.name, dtype, shape)


def _read_frozen(metadata: dict[str, str]) -> dict[str, float | None] | None:
    """Return sigma by tensor as sn_export wrote it; None where it did not."""
    try:
        found = json.loads(metadata[_FROZEN])
        return {name: None if sigma is None else float(sigma) for name, sigma in found.items()}
    except (KeyError, ValueError, TypeError, AttributeError, OverflowError, RecursionError):
        return None  # not written by sn_export


def _show_onnx(found: dict[str, Any]) -> None:
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
            [name, "" if sigma is None else format_number(sigma)]
            for name, sigma in found["frozen"].items()
        ]
        print_table("frozen", ["tensor", "sigma"], rows)
    if found["metadata"]:
        print_table(
            "metadata", ["key", "value"], [list(pair) for pair in found["metadata"].items()]
        )


def _show_values(title: str, values: Iterable[FileInput]) -> None:
    rows = [[one.name, one.dtype, "x".join(map(str, one.shape)) or "scalar"] for one in values]
    print_table(title, ["name", "dtype", "shape"], rows)
