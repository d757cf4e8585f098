"""Which opsets can be had: what both exporters write and the installed onnxruntime runs."""

from __future__ import annotations

import functools

import onnx
import onnx_ir as ir
import onnxruntime as ort
import torch.onnx
from onnx import TensorProto, helper

from .errors import ExportError
from .text import plain_integer

OLDEST_OPSET = 17
_BFLOAT16 = 22
_IR_VERSION = 10  # of the probe: known to every onnxruntime that runs the newest opsets


def require_opset(opset: int | None) -> int | None:
    """Return an opset, or None, if it can be had.

    Raises:
        TypeError: if it is no integer.
        ValueError: if it is older than 17 or newer than `newest_opset`.
    """
    if opset is None:
        return None
    number = plain_integer(opset)
    if number is None:
        raise TypeError(f"opset_version must be an integer, got {type(opset).__name__}")
    if not OLDEST_OPSET <= number <= newest_opset():
        raise ValueError(
            f"opset_version must be from {OLDEST_OPSET} to {newest_opset()}, the newest that both "
            f"exporters of torch {torch.__version__} and onnxruntime {ort.__version__} take, "
            f"got {number}"
        )
    return number


def default_opset(dtype: str | None) -> int | None:
    """Return the opset for a network of this dtype, None for torch's own default.

    Convolutions and much else have no bfloat16 before opset 22.
    """
    return min(_BFLOAT16, newest_opset()) if dtype == "bfloat16" else None


@functools.cache
def newest_opset() -> int:
    """Return the newest opset that both exporters, onnx and onnxruntime take; tried once."""
    constants = torch.onnx._constants
    newest = min(constants.ONNX_MAX_OPSET, onnx.defs.onnx_opset_version())
    return next(n for n in range(newest, OLDEST_OPSET - 1, -1) if _runs(n))


def set_opset(model: ir.Model, wanted: int | None) -> None:
    """Give a model the opset that was asked for, where that takes no other operators.

    The dynamo exporter writes opset 18 where an older one is asked for.

    Raises:
        ExportError: if an operator of the model is another one in that opset.
    """
    found = model.opset_imports.get("", 0)
    if wanted is None or found == wanted:
        return
    names = {node.op_type for node in model.graph.all_nodes() if node.domain == ""}
    changed = sorted(name for name in names if _since(name, found) != _since(name, wanted))
    if changed:
        raise ExportError(
            f"opset {wanted} was asked for and the exporter wrote {found}, in which "
            f"{', '.join(changed)} differ. Try the other exporter, or opset {found}"
        )
    model.opset_imports[""] = wanted
    for function in model.functions.values():
        function.opset_imports[""] = wanted


def _since(name: str, opset: int) -> int:
    try:
        return int(onnx.defs.get_schema(name, opset).since_version)
    except onnx.defs.SchemaError:
        return 0


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
    try:
        ort.InferenceSession(probe.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception:
        return False
    return True
