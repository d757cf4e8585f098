"""Evaluate a cone with onnxruntime, and with onnx's reference where that has no kernel."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator

from .cones import Cone


def evaluate(cone: Cone, model: ir.Model) -> NDArray[Any]:
    """Return the value of a cone.

    The initializers are fed, not stored, so weights of more than 2 GB are no obstacle.

    Args:
        cone: a cone of ``model``, whose graph is not changed.
        model: gives the versions of the opsets.

    Raises:
        Exception: whatever the reference evaluator raises where neither can evaluate it.
    """
    view = ir.GraphView(
        cone.initializers,
        [cone.result],
        nodes=cone.nodes,
        opset_imports=model.opset_imports,
        name="cone",
    )
    proto = ir.to_proto(ir.Model(view.clone(), ir_version=model.ir_version))
    feed = {str(value.name): _array(value) for value in cone.initializers}
    try:
        results = _session(proto.SerializeToString()).run(None, feed)
    except Exception:  # no kernel for the dtype, such as bfloat16
        results = ReferenceEvaluator(proto).run(None, feed)
    return np.asarray(results[0])


def _session(content: bytes) -> Any:
    options = ort.SessionOptions()
    options.log_severity_level = 4  # the exception says it
    # The operators as they stand: no rewriting of the arithmetic.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def _array(value: ir.Value) -> NDArray[Any]:
    assert value.const_value is not None  # `find_cones` takes no other
    return value.const_value.numpy()
