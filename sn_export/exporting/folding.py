"""The safety net: no exported graph keeps arithmetic that depends on initializers alone.

Each value that does is found with the cone of nodes above it. onnxruntime computes it; onnx's
reference does where onnxruntime has no kernel. Which operators compute, which only move values and
which stay is listed here.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator
from torch import Tensor

from ..proving import find_using_modules, ort
from ..results import FoldedInitializer
from .initializers import Sources, name_folded

_logger = logging.getLogger("sn_export")
# They put values in other places. Exporters leave them on the weights of plain networks too
# (the gates of an LSTM, an expanded token), so on their own they are no sign of a
# reparametrization, and the graph stays that of the plain network.
_LAYOUT = frozenset(
    {"Identity", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Expand", "Tile"}
    | {"Slice", "Split", "Concat", "Gather", "GatherElements", "GatherND", "Cast", "CastLike"}
    | {"Pad", "DepthToSpace", "SpaceToDepth"}
)
# They give a shape, not a value: what follows does not depend on the weight.
_SHAPE_ONLY = frozenset({"Shape", "Size"})
# A result of these is larger than what it is made from; the file would grow for nothing.
_GROWING = frozenset({"Expand", "Tile", "ConstantOfShape"})
# They read their second (recurrent nets: also third) input as a weight; Gather its first.
_WEIGHT_INPUTS = {
    "Conv": (1,),
    "ConvTranspose": (1,),
    "ConvInteger": (1,),
    "DeformConv": (1,),
    "Gemm": (0, 1),
    "MatMul": (0, 1),
    "Einsum": (0, 1),
    "LSTM": (1, 2),
    "GRU": (1, 2),
    "RNN": (1, 2),
    "Gather": (0,),
}
# They give another result at every run.
_RANDOM = frozenset(
    {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"}
    | {"Bernoulli", "Multinomial", "Dropout"}
)
# A quantised weight is stored as integers: folding would make it four times as large.
_QUANTISING = frozenset({"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"})
_ONNX = ("", "ai.onnx")


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
    values = [(cone, _evaluate(cone, model)) for cone in _find_cones(graph, sources)]
    known = [(cone, array) for cone, array in values if array is not None]
    joined = _join_equal(graph, known)
    folded += [_replace(graph, cone, array, sources) for cone, array in joined]
    return tuple(folded)


def _find_folded(graph: ir.Graph, sources: Sources) -> list[tuple[ir.Value, list[str]]]:
    """Return the weights that the exporter has folded, each once, and what they are made from.

    Of a layer that is called twice dynamo folds the weight at every call.
    """
    first: dict[Hashable, ir.Value] = {}
    found = []
    for value in list(graph.initializers.values()):
        if _is_weight(value) and (names := sources.find_origin(value)) is not None:
            if _is_replaced(value, _get_array(value), tuple(names), first):
                del graph.initializers[str(value.name)]
            else:
                found.append((value, names))
    return found


def _is_replaced(
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


def _can_fold(node: ir.Node) -> bool:
    """Tell whether a node gives the same tensors whenever its inputs are the same."""
    return (
        node.domain in _ONNX
        and node.op_type not in _RANDOM | _QUANTISING
        and not any(word in node.op_type for word in ("Sequence", "Optional"))
        and not any(
            attribute.is_ref()
            or attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
            for attribute in node.attributes.values()
        )
    )


def _is_weight(value: ir.Value) -> bool:
    """Tell whether a value of two or more dimensions is read as a weight."""
    if value.shape is None or len(value.shape) < 2:
        return False
    return any(
        index in _WEIGHT_INPUTS.get(node.op_type, ())
        or (node.op_type in _LAYOUT and any(_is_weight(output) for output in node.outputs))
        for node, index in value.uses()
    )


@dataclass(frozen=True)
class Cone:
    """A value that depends on initializers alone, and what it is computed from.

    Attributes:
        result: the value.
        nodes: the nodes that compute it, in the order of the graph.
        initializers: the initializers that they read.
    """

    result: ir.Value
    nodes: tuple[ir.Node, ...]
    initializers: tuple[ir.Value, ...]

    @property
    def op_types(self) -> tuple[str, ...]:
        """The operators, each once, in the order of the graph; constants are left out."""
        return tuple(dict.fromkeys(node.op_type for node in self.arithmetic))

    @property
    def arithmetic(self) -> list[ir.Node]:
        """The nodes that are no constants."""
        return [node for node in self.nodes if node.op_type != "Constant"]


def _find_cones(graph: ir.Graph, sources: Sources) -> list[Cone]:
    """Return the cones that hold arithmetic on a weight, in the order of the graph.

    What depends on other constants alone is left to the exporter.
    """
    constant = {
        value
        for value in graph.initializers.values()
        if value.const_value is not None and not value.is_graph_input()
    }
    # `dependent` are the values made from a weight, `computed` those by more than a layout.
    dependent = {value for value in constant if sources.is_weight(value)}
    computed: set[ir.Value] = set()
    foldable: dict[ir.Node, int] = {}
    for position, node in enumerate(graph):
        inputs = [value for value in node.inputs if value is not None]
        if not _can_fold(node) or not constant.issuperset(inputs):
            continue
        foldable[node] = position
        constant.update(node.outputs)
        if node.op_type in _SHAPE_ONLY or dependent.isdisjoint(inputs):
            continue
        dependent.update(node.outputs)
        if node.op_type not in _LAYOUT or not computed.isdisjoint(inputs):
            computed.update(node.outputs)
    roots = dict.fromkeys(
        root
        for node in foldable
        for value in node.outputs
        if value in computed and _is_read_outside(value, foldable)
        for root in _iter_before_growth(value, computed)
    )
    return [_find_cone(root, foldable) for root in roots]


def _is_read_outside(value: ir.Value, foldable: dict[ir.Node, int]) -> bool:
    return value.is_graph_output() or any(node not in foldable for node in value.consumers())


def _iter_before_growth(value: ir.Value, computed: set[ir.Value]) -> Iterator[ir.Value]:
    node = value.producer()
    if node is None or value not in computed:
        return
    if node.op_type not in _GROWING:
        yield value
        return
    for before in node.inputs:
        if before is not None:
            yield from _iter_before_growth(before, computed)


def _find_cone(root: ir.Value, foldable: dict[ir.Node, int]) -> Cone:
    nodes: set[ir.Node] = set()
    initializers: dict[ir.Value, None] = {}
    waiting = [root]
    while waiting:
        value = waiting.pop()
        node = value.producer()
        if node is None:
            initializers[value] = None
        elif node not in nodes:
            nodes.add(node)
            waiting.extend(entry for entry in node.inputs if entry is not None)
    ordered = sorted(nodes, key=foldable.__getitem__)
    return Cone(root, tuple(ordered), tuple(initializers))


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
    options = ort.SessionOptions()
    options.log_severity_level = 4  # the exception says it
    options.intra_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    content, providers = proto.SerializeToString(), ["CPUExecutionProvider"]
    try:
        return ort.InferenceSession(content, options, providers=providers).run(None, feed)[0]
    except Exception:  # no kernel for the dtype, such as bfloat16
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
        if _is_replaced(cone.result, array, cone.initializers, first):
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
    # Before the initializers are removed.
    names = list(
        dict.fromkeys(name for value in cone.initializers for name in sources.find_names(value))
    )
    _remove_unused(graph, cone)
    return _register(graph, value, names, sources, cone)


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
        is_weight=_is_weight(value),
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
