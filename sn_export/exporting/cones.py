"""Values in a graph that depend on initializers alone, with the cone of nodes above each.

Which operators compute, which only move values and which stay is listed here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

from .initializers import Sources

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


def find_cones(graph: ir.Graph, sources: Sources) -> list[Cone]:
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


def is_weight(value: ir.Value) -> bool:
    """Tell whether a value of two or more dimensions is read as a weight."""
    if value.shape is None or len(value.shape) < 2:
        return False
    return any(
        index in _WEIGHT_INPUTS.get(node.op_type, ())
        or (node.op_type in _LAYOUT and any(is_weight(output) for output in node.outputs))
        for node, index in value.uses()
    )
