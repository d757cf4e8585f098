"""What is known of ONNX operators: which compute, which only move values, which stay."""

from __future__ import annotations

import onnx_ir as ir

# They put values in other places. Exporters leave them on the weights of plain networks too
# (the gates of an LSTM, an expanded token), so on their own they are no sign of a
# reparametrization, and the graph stays that of the plain network.
LAYOUT = frozenset(
    {"Identity", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Expand", "Tile"}
    | {"Slice", "Split", "Concat", "Gather", "GatherElements", "GatherND", "Cast", "CastLike"}
    | {"Pad", "DepthToSpace", "SpaceToDepth"}
)
# They give a shape, not a value: what follows does not depend on the weight.
SHAPE_ONLY = frozenset({"Shape", "Size"})
# A result of these is larger than what it is made from; the file would grow for nothing.
GROWING = frozenset({"Expand", "Tile", "ConstantOfShape"})
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
# Another result at every run.
_RANDOM = frozenset(
    {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"}
    | {"Bernoulli", "Multinomial", "Dropout"}
)
# A quantised weight is stored as integers: folding would make it four times as large.
_QUANTISING = frozenset({"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"})
_ONNX = ("", "ai.onnx")


def can_fold(node: ir.Node) -> bool:
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
        or (node.op_type in LAYOUT and any(is_weight(output) for output in node.outputs))
        for node, index in value.uses()
    )
