"""Find what depends on initializers alone: each such value with the cone of nodes above it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import onnx_ir as ir

from .operators import GROWING, LAYOUT, SHAPE_ONLY, can_fold


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


def find_cones(graph: ir.Graph, is_weight: Callable[[ir.Value], bool]) -> list[Cone]:
    """Return the cones that hold arithmetic on a weight, in the order of the graph.

    Args:
        graph: the graph; nothing in it is changed.
        is_weight: tells whether an initializer is a parameter or buffer of the model, or made
            from one. What depends on other constants alone is left to the exporter.
    """
    constant = {
        value
        for value in graph.initializers.values()
        if value.const_value is not None and not value.is_graph_input()
    }
    # The values that depend on a weight, and those of them that more than layout separates.
    dependent = {value for value in constant if is_weight(value)}
    computed: set[ir.Value] = set()
    foldable: dict[ir.Node, int] = {}
    for position, node in enumerate(graph):
        inputs = [value for value in node.inputs if value is not None]
        if not can_fold(node) or not constant.issuperset(inputs):
            continue
        foldable[node] = position
        constant.update(node.outputs)
        if node.op_type in SHAPE_ONLY or dependent.isdisjoint(inputs):
            continue
        dependent.update(node.outputs)
        if node.op_type not in LAYOUT or not computed.isdisjoint(inputs):
            computed.update(node.outputs)
    roots = dict.fromkeys(
        root
        for node in foldable
        for value in node.outputs
        if value in computed and _is_read_outside(value, foldable)
        for root in _before_growth(value, computed)
    )
    return [_cone(root, foldable) for root in roots]


def _is_read_outside(value: ir.Value, foldable: dict[ir.Node, int]) -> bool:
    return value.is_graph_output() or any(node not in foldable for node in value.consumers())


def _before_growth(value: ir.Value, computed: set[ir.Value]) -> Iterator[ir.Value]:
    node = value.producer()
    if node is None or value not in computed:
        return
    if node.op_type not in GROWING:
        yield value
        return
    for before in node.inputs:
        if before is not None:
            yield from _before_growth(before, computed)


def _cone(root: ir.Value, foldable: dict[ir.Node, int]) -> Cone:
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
