"""What a file in float64 computes in float32 on the way, for want of operators in float64."""

from __future__ import annotations

from pathlib import Path

import onnx
from onnx import NodeProto, TensorProto

from ..text import shorten_list


def narrow_operators(path: Path) -> str:
    """Return the operators that a file runs between a cast to float32 and one to float64.

    Torch's exporters write such casts where ONNX has no operator in float64, as ``Celu``::

        Cast(to=FLOAT) -> Celu -> Cast(to=DOUBLE)  # "Celu"

    Args:
        path: the file; its external data is not read.

    Returns:
        Their names with commas between them, each once; empty if there are none.
    """
    graph = onnx.load(path, load_external_data=False).graph
    narrow: set[str] = set()
    found: dict[str, None] = {}
    for node in graph.node:
        to = _cast_to(node)
        if to == TensorProto.FLOAT:
            narrow.update(node.output)
        elif to is None and narrow.intersection(node.input):
            narrow.update(node.output)
            found[node.op_type] = None
    return shorten_list(found)


def _cast_to(node: NodeProto) -> int | None:
    return next((a.i for a in node.attribute if a.name == "to"), None)
