"""The safety net: no exported graph keeps arithmetic that depends on initializers alone.

Each value that does is found with the cone of nodes above it. onnxruntime computes it; onnx's
reference does where onnxruntime has no kernel.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable, Mapping
from hashlib import sha256
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from torch import Tensor

from ..proving import find_using_modules, open_graph
from ..results import FoldedInitializer
from .cones import Cone, find_cones, is_weight
from .initializers import Sources, name_folded

_logger = logging.getLogger("sn_export")


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
    # First, since folding gives names to initializers itself.
    folded = [_rename(graph, *found, sources) for found in _find_folded(graph, sources)]
    # All are evaluated before the graph is changed: one cone may hold another's result.
    values = [(cone, _evaluate(cone, model)) for cone in find_cones(graph, sources)]
    known = [(cone, array) for cone, array in values if array is not None]
    joined = _join_equal(graph, known)
    # All are in place before one is named: a raw weight may be left for another cone to read.
    placed = [_replace(graph, cone, array, sources) for cone, array in joined]
    folded += [
        _register(graph, *found, sources, cone)
        for found, (cone, _) in zip(placed, joined, strict=True)
    ]
    return tuple(folded)


def _find_folded(graph: ir.Graph, sources: Sources) -> list[tuple[ir.Value, list[str]]]:
    """Return the weights that the exporter has folded, each once, and what they are made from.

    Of a layer that is called twice dynamo folds the weight at every call.
    """
    first: dict[Hashable, ir.Value] = {}
    found = []
    for value in list(graph.initializers.values()):
        if is_weight(value) and (names := sources.find_origin(value)) is not None:
            if _replace_by_equal(value, _get_array(value), tuple(names), first):
                del graph.initializers[str(value.name)]
            else:
                found.append((value, names))
    return found


def _replace_by_equal(
    value: ir.Value, array: NDArray[Any], origin: Hashable, first: dict[Hashable, ir.Value]
) -> bool:
    """Let the first value of the same origin and bits take the place of this one, if it can."""
    # As bytes: numpy gives nobody the memory of bfloat16.
    bits = sha256(np.ascontiguousarray(array).view(np.uint8).data).digest()
    same = first.setdefault((origin, array.dtype, array.shape, bits), value)
    if same is value or value.is_graph_output():
        return False
    value.replace_all_uses_with(same)
    return True


def _evaluate(cone: Cone, model: ir.Model) -> NDArray[Any] | None:
    """Return the value of a cone of ``model``; None, with a line in the log, if that fails.

    The initializers are fed, not stored, so weights of more than 2 GB are no obstacle.
    """
    view = ir.GraphView(
        cone.initializers,
        [cone.result],
        nodes=cone.nodes,
        opset_imports=model.opset_imports,
        name="cone",
    )
    try:
        proto = ir.to_proto(ir.Model(view.clone(), ir_version=model.ir_version))
        feed = {str(value.name): _get_array(value) for value in cone.initializers}
        return np.asarray(_run(proto, feed))
    except Exception as error:
        _logger.warning("cannot fold '%s': %s", cone.result.name, error)
        return None


def _run(proto: onnx.ModelProto, feed: dict[str, NDArray[Any]]) -> Any:
    """Return the one output of a model, with its operators as they stand."""
    try:
        return open_graph(proto.SerializeToString()).run(None, feed)[0]
    except Exception:  # no kernel for the dtype, such as bfloat16
        from onnx.reference import ReferenceEvaluator  # slow to import, and seldom needed

        results: Any = ReferenceEvaluator(proto).run(None, feed)
        return results[0]


def _join_equal(
    graph: ir.Graph, cones: list[tuple[Cone, NDArray[Any]]]
) -> list[tuple[Cone, NDArray[Any]]]:
    """Return the cones, but of those that compute one value from the same initializers the first.

    Dynamo of torch 2.6 writes the arithmetic of a shared weight at every call.
    """
    first: dict[Hashable, ir.Value] = {}
    kept = []
    for cone, array in cones:
        if _replace_by_equal(cone.result, array, cone.initializers, first):
            _remove_unused(graph, cone)
        else:
            kept.append((cone, array))
    return kept


def _get_array(value: ir.Value) -> NDArray[Any]:
    assert value.const_value is not None  # a cone has no initializer without a value
    return value.const_value.numpy()


def _rename(
    graph: ir.Graph, value: ir.Value, names: list[str], sources: Sources
) -> FoldedInitializer:
    del graph.initializers[str(value.name)]
    return _register(graph, value, names, sources, None)


def _replace(
    graph: ir.Graph, cone: Cone, array: NDArray[Any], sources: Sources
) -> tuple[ir.Value, list[str]]:
    """Put a value in the place of a cone, and return it with the tensors that it is made from."""
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
    # Before the initializers are removed.
    names = list(
        dict.fromkeys(name for value in cone.initializers for name in sources.find_names(value))
    )
    _remove_unused(graph, cone)
    return value, names


def _register(
    graph: ir.Graph, value: ir.Value, names: list[str], sources: Sources, cone: Cone | None
) -> FoldedInitializer:
    tensor = value.const_value
    assert tensor is not None  # `_replace` sets it, and `find_origin` takes no other
    raw = sources.choose_main(names, tensor.size)
    users = find_using_modules(value)
    value.name = tensor.name = name_folded(raw, users, _collect_names(graph))
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


def _collect_names(graph: ir.Graph) -> set[str]:
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
        # It may have gone with an earlier cone.
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
