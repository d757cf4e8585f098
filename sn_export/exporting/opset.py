"""Which opsets can be had: what both exporters write and the installed onnxruntime runs."""

from __future__ import annotations

import functools

import onnx
import onnxruntime as ort
import torch.onnx
from onnx import TensorProto, helper

from ..text import plain_integer

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
