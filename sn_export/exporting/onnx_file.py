"""ONNX files: the graph that torch makes, cleaned, folded, saved and checked, with its metadata.

``metadata_props`` say how a file was made, in the same bytes for the same input. torch stays the
file's ``producer_name``, since tools go by it; the keys of sn_export begin with ``sn_export.``.
Nothing of the machine is written: no path, user, host or date.
"""

from __future__ import annotations

import functools
import gc
import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
from torch import Tensor, nn

from ..errors import ExportError
from ..files import as_path
from ..freezing import ParametrizationInfo, SpectralNormInfo
from ..proving import count_weight_bytes, save
from ..results import Exporter, FileInput, FoldedInitializer
from ..running import Reference, make_dynamic_axes
from ..text import qualify
from .arguments import ExternalData, Request
from .folding import fold_initializers
from .graph import name_dimensions, rename, set_opset, strip_traces, widen_indices
from .torch_exporters import run_exporter

# A protobuf message ends at 2 GiB; the graph around the weights needs some of that.
_INLINE_LIMIT = 2**31 - 2**26
_PREFIX = "sn_export."
_CHUNK = 2**20
_PACKAGES = ("torch", "onnx", "onnxruntime", "onnxscript", "numpy")


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

    def drop_program(self) -> Written:
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
    graph, program = run_exporter(request, reference, exporter)
    rename(
        graph.graph,
        list(request.input_names.values()) if exporter == "dynamo" else None,
        request.output_names,
    )
    if exporter == "dynamo":
        plain = [dim for dim in request.dims if dim.is_root]
        name_dimensions(graph.graph, make_dynamic_axes(request.input_names, plain))
        widen_indices(graph.graph)
    strip_traces(graph)
    set_opset(graph, request.opset_version)
    graph.metadata_props.update(metadata)
    folded = fold_initializers(graph, _collect_state(request.model))
    described = tuple(map(_describe_input, graph.graph.inputs))
    declared = tuple(map(_list_sizes, graph.graph.outputs))
    notes = _check(_save(graph, path, request.external_data, release))
    if program is None:
        _free(graph)  # and unmap what the exporter wrote
    opset = int(graph.opset_imports.get("", 0))
    return Written(opset, folded, program, described, declared, notes)


def require_metadata(metadata: Mapping[str, str] | None) -> Mapping[str, str]:
    """Return the user's metadata, if it can be written.

    Raises:
        TypeError: if it is no mapping of text to text.
        ValueError: for an empty key, or one that begins with ``sn_export.``.
    """
    if metadata is None:
        return {}
    if not isinstance(metadata, Mapping):
        raise TypeError(f"metadata must be a mapping of text to text, got {metadata!r}")
    for key, value in metadata.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise TypeError(f"metadata must be a mapping of text to text, got {key!r}: {value!r}")
        if not key or key.startswith(_PREFIX):
            raise ValueError(f"metadata needs keys that do not begin with '{_PREFIX}', got {key!r}")
        for text in (key, value):
            if not _is_utf8(text):
                raise ValueError(f"metadata must be valid Unicode, got {text!r}")
    return metadata


def make_metadata(
    exporter: str,
    versions: Mapping[str, str],
    frozen: Sequence[SpectralNormInfo | ParametrizationInfo],
    source: Path | None,
    metadata: Mapping[str, str],
    draws: str | None = None,
) -> dict[str, str]:
    """Return the metadata of a file.

    Args:
        exporter: the exporter that made it.
        versions: versions by package.
        frozen: the tensors under spectral norm.
        source: the checkpoint that the weights came from.
        metadata: the user's own keys.
        draws: how the forward drew random numbers.

    Returns:
        Text by key: ``sn_export.exporter``; ``sn_export.versions``, a JSON object;
        ``sn_export.frozen``, a JSON object of sigma as stored by name of the tensor, to six
        digits (null where it is not finite, or there is none); ``sn_export.source_sha256`` where
        there is a source; ``sn_export.draws`` where the forward drew zeros; and the user's keys.
        The file has them all in alphabetical order.

    Raises:
        FileNotFoundError: if there is no such checkpoint.
    """
    sigmas = {
        info.name: _round_sigma(info.sigma) if isinstance(info, SpectralNormInfo) else None
        for info in frozen
    }
    made = {
        f"{_PREFIX}exporter": exporter,
        f"{_PREFIX}versions": json.dumps(dict(versions)),
        f"{_PREFIX}frozen": json.dumps(sigmas, allow_nan=False),
    }
    if source is not None:
        made[f"{_PREFIX}source_sha256"] = compute_sha256(source)
    if draws is not None:
        made[f"{_PREFIX}draws"] = draws
    return made | dict(metadata)


def require_source(source: str | os.PathLike[str] | None) -> Path | None:
    """Return the path of the checkpoint.

    Raises:
        TypeError: if it is no path.
        FileNotFoundError: if there is no such file.
    """
    if source is None:
        return None
    path = as_path(source, "source")
    if not path.is_file():
        raise FileNotFoundError(f"source must be a file, there is none at '{path}'")
    return path


@functools.cache
def list_versions() -> dict[str, str]:
    """Return the versions of sn_export and of the packages behind it."""
    found = {}
    for package in ("sn-export", *_PACKAGES):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    return found


def compute_sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _describe_input(value: ir.Value) -> FileInput:
    dtype = "" if value.dtype is None else str(value.dtype.numpy())
    return FileInput(value.name or "", dtype, _list_sizes(value))


def _list_sizes(value: ir.Value) -> tuple[int | str, ...]:
    sizes = () if value.shape is None else value.shape
    return tuple(size if isinstance(size, int) else size.value or "?" for size in sizes)


def _collect_state(model: nn.Module) -> dict[str, Tensor]:
    # In the order of the state dict, and with the buffers that a state dict leaves out.
    return {
        qualify(path, name): tensor
        for path, module in model.named_modules(remove_duplicate=False)
        for name, tensor in (*module._parameters.items(), *module._buffers.items())
        if tensor is not None
    }


def _save(
    model: ir.Model, path: Path, external_data: ExternalData, release: Callable[[], None]
) -> onnx.ModelProto:
    """Write the file, and return its model without the weights."""
    size = count_weight_bytes(model)
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


def _round_sigma(sigma: float) -> float | None:
    # Six digits: sums in another order, as another number of threads makes them, agree in these.
    return float(f"{sigma:.6g}") if math.isfinite(sigma) else None


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return False
    return True
