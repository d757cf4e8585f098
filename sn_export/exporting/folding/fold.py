"""Fold what the with-block could not see, and say what it was.

onnxruntime computes each value; onnx's reference does where onnxruntime has no kernel.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator
from torch import Tensor

from ...proving import ort, using_modules
from ...results import FoldedInitializer
from .cones import Cone, find_cones, is_weight
from .sources import Sources, folded_name

_logger = logging.getLogger("sn_export")


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
    options.intra_op_num_threads = 1
    # The operators as they stand: no rewriting of the arithmetic.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def _array(value: ir.Value) -> NDArray[Any]:
    assert value.const_value is not None  # `find_cones` takes no other
    return value.const_value.numpy()


def fold_initializers(
    model: ir.Model, state: Mapping[str, Tensor]
) -> tuple[FoldedInitializer, ...]:
    """Fold arithmetic that depends on initializers alone, at any size, in place.

    What only moves values (the transposed weight of a linear layer) stays as the exporter left
    it, so a plain network's graph is not changed; so do random and quantising operators and
    those with graphs inside. Weights that the exporter has folded itself are named and listed.

    Args:
        model: an exported model.
        state: parameters and buffers of the model that was exported, by qualified name.

    Returns:
        What was folded, in the order of the graph.
    """
    graph = model.graph
    sources = Sources(state)
    # First, for what follows gives names of its own.
    folded = [
        _rename(graph, value, names, sources)
        for value in list(graph.initializers.values())
        if is_weight(value) and (names := sources.computed_from(value)) is not None
    ]
    # All are evaluated before the graph is changed: one cone may hold another's result.
    values = [(cone, _value(cone, model)) for cone in find_cones(graph, sources.is_weight)]
    folded += [_replace(graph, cone, array, sources) for cone, array in values if array is not None]
    return tuple(folded)


def _value(cone: Cone, model: ir.Model) -> NDArray[Any] | None:
    try:
        return evaluate(cone, model)
    except Exception as error:
        _logger.warning("cannot fold '%s': %s", cone.result.name, error)
        return None


def _rename(
    graph: ir.Graph, value: ir.Value, names: list[str], sources: Sources
) -> FoldedInitializer:
    del graph.initializers[str(value.name)]
    return _register(graph, value, names, sources, None)


def _replace(
    graph: ir.Graph, cone: Cone, array: NDArray[Any], sources: Sources
) -> FoldedInitializer:
    tensor = ir.tensor(array)
    value = ir.Value(
        name=None,
        type=ir.TensorType(tensor.dtype),
        shape=ir.Shape(array.shape),
        const_value=tensor,
    )
    if cone.result.is_graph_output():
        _keep_output(graph, cone.result, value)
    cone.result.replace_all_uses_with(value)
    # Asked before the initializers go.
    names = list(dict.fromkeys(name for value in cone.initializers for name in sources.of(value)))
    _remove_unused(graph, cone)
    return _register(graph, value, names, sources, cone)


def _register(
    graph: ir.Graph, value: ir.Value, names: list[str], sources: Sources, cone: Cone | None
) -> FoldedInitializer:
    tensor = value.const_value
    assert tensor is not None  # `find_cones` and `computed_from` take no other
    raw = sources.main(names, tensor.size)
    users = using_modules(value)
    value.name = tensor.name = folded_name(raw, users, _taken_names(graph))
    _insert(graph, value, sources.positions.get(raw or ""), sources.positions)
    return FoldedInitializer(
        name=value.name,
        module=users[0] if len(users) == 1 else value.name.rpartition(".")[0],
        shape=tensor.numpy().shape,
        sources=tuple(names),
        op_types=cone.op_types if cone else (),
        nodes=len(cone.arithmetic) if cone else 0,
        is_weight=is_weight(value),
    )


def _taken_names(graph: ir.Graph) -> set[str]:
    values = [*graph.inputs, *graph.initializers.values()]
    for node in graph:
        values.extend(node.outputs)
    return {str(value.name) for value in values}


def _keep_output(graph: ir.Graph, output: ir.Value, value: ir.Value) -> None:
    # Not every runtime takes an initializer for an output; the output keeps its name.
    node = ir.node("Identity", [value])
    kept = node.outputs[0]
    kept.name, kept.type, kept.shape = output.name, output.type, output.shape
    output.name = None
    graph.append(node)
    for index, entry in enumerate(graph.outputs):
        if entry is output:
            graph.outputs[index] = kept


def _remove_unused(graph: ir.Graph, cone: Cone) -> None:
    for node in reversed(cone.nodes):
        # An earlier result may have taken it along.
        if node.graph is not None and not any(
            out.uses() or out.is_graph_output() for out in node.outputs
        ):
            graph.remove(node, safe=True)
    for value in cone.initializers:
        if value.is_initializer() and not value.uses() and not value.is_graph_output():
            del graph.initializers[str(value.name)]


def _insert(
    graph: ir.Graph, value: ir.Value, position: int | None, positions: Mapping[str, int]
) -> None:
    """Register an initializer where the order of the state dict has it."""
    graph.register_initializer(value)
    if position is None:
        return
    later = [
        entry
        for name, entry in graph.initializers.items()
        if positions.get(name, -1) > position and entry is not value
    ]
    if not later:
        return
    order = list(graph.initializers.values())
    order.remove(value)
    order.insert(order.index(later[0]), value)
    graph.initializers.clear()
    for entry in order:
        graph.register_initializer(entry)
