"""A file in float32, for the proof where onnxruntime has no kernel for the file's own dtype."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from ..results import ProofDtype
from ..running import InputSet
from .external_data import save, weight_bytes

PROOF_DTYPES: tuple[ProofDtype | None, ...] = (None, "float32")

_OTHERS = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)
_DTYPE_ATTRIBUTES = ("to", "dtype", "output_dtype")  # of Cast, RandomNormal, QuantizeLinear ...
_INLINE = 2**30
_MISSING = re.compile(r"implementation for (?P<op>\w+)\(\d+\) node with name '(?P<name>[^']*)'")


def write_float32(source: Path, target: Path) -> None:
    """Write a copy of a file in which every float16, bfloat16 and float64 is a float32.

    Args:
        source: the file; its external data lies beside it.
        target: the copy; its external data, if it is large, goes beside it.
    """
    model = ir.load(source)
    graphs = [model.graph, *(function.graph for function in model.functions.values())]
    for graph in graphs:
        for inner in (graph, *graph.subgraphs()):
            _convert(inner)
    save(model, target, outside=weight_bytes(model) > _INLINE)


def as_float32(tensor: Tensor) -> Tensor:
    """Return a floating tensor in float32, and any other as it is."""
    return tensor.float() if tensor.is_floating_point() else tensor


def float32_inputs(inputs: InputSet) -> InputSet:
    """Return an input set with floating tensors in float32."""
    return inputs.map(as_float32)


def comparable(expected: Tensor, got: Tensor) -> tuple[Tensor, Tensor]:
    """Return a reference of any floating dtype and a float32 result in the narrower dtype."""
    if not (expected.is_floating_point() and got.is_floating_point()):
        return expected, got
    narrow = torch.float32 if expected.dtype == torch.float64 else expected.dtype
    return expected.to(narrow), got.to(narrow)


def missing_kernel(path: Path, message: str) -> tuple[str, str] | None:
    """Return operator and dtype if onnxruntime's message says that a kernel is missing.

    Args:
        path: the file that it refuses.
        message: what it says.
    """
    found = _MISSING.search(message)
    if found is None:
        return None
    nodes = [n for n in ir.load(path).graph.all_nodes() if n.name == found["name"]]
    dtypes = [v.dtype for n in nodes for v in (*n.outputs, *n.inputs) if v is not None]
    dtype = next((d for d in dtypes if d is not None), None)
    return found["op"], _NAMES.get(dtype, str(dtype).lower()) if dtype is not None else ""


_NAMES = {ir.DataType.DOUBLE: "float64", ir.DataType.FLOAT: "float32"}


def _convert(graph: ir.Graph | ir.GraphView) -> None:
    for value in graph.initializers.values():
        if value.const_value is not None and value.const_value.dtype in _OTHERS:
            value.const_value = _tensor(value.const_value)
    values = [*graph.inputs, *graph.outputs, *graph.initializers.values()]
    for node in graph:
        values += node.outputs
        for name, attribute in node.attributes.items():
            if attribute.type == ir.AttributeType.TENSOR and attribute.value.dtype in _OTHERS:
                node.attributes[name] = ir.AttrTensor(name, _tensor(attribute.value))
            elif name in _DTYPE_ATTRIBUTES and attribute.value in _OTHERS:
                node.attributes[name] = ir.AttrInt64(name, ir.DataType.FLOAT)
    for value in values:
        if value.dtype in _OTHERS:
            value.dtype = ir.DataType.FLOAT


def _tensor(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    return ir.tensor(np.asarray(tensor.numpy(), dtype=np.float32), name=tensor.name)
