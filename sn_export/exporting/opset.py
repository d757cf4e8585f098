"""Which opsets can be had: what an exporter of torch writes and the installed onnxruntime runs."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import onnx
import onnxruntime as ort
import torch.onnx
from onnx import TensorProto, helper

from ..results import EXPORTERS, Exporter
from ..text import plain_integer

OLDEST_OPSETS: dict[Exporter, int] = {"dynamo": 17, "torchscript": 11}
_BFLOAT16 = 22
_IR_VERSION = 10  # of the probe: known to every onnxruntime that runs the newest opsets


def require_opset(
    opset: int | None, exporters: Sequence[Exporter]
) -> tuple[int | None, tuple[Exporter, ...]]:
    """Return an opset, or None, with those of the exporters that make it.

    Raises:
        TypeError: if it is no integer.
        ValueError: if none of the exporters makes it, or it is newer than `newest_opset`.
    """
    if opset is None:
        return None, tuple(exporters)
    number = plain_integer(opset)
    if number is None:
        raise TypeError(f"opset_version must be an integer, got {type(opset).__name__}")
    able = tuple(name for name in exporters_of(number) if name in exporters)
    if not able:
        newest = newest_opset()
        ranges = (f"{OLDEST_OPSETS[name]} to {newest} for the {name} one" for name in exporters)
        raise ValueError(
            f"opset_version must be from {' and '.join(ranges)} of the exporters of torch "
            f"{torch.__version__}, the newest that onnxruntime {ort.__version__} takes, "
            f"got {number}"
        )
    return number, able


def exporters_of(opset: int | None) -> tuple[Exporter, ...]:
    """Return the exporters that make files of this opset; all for None."""
    if opset is None:
        return EXPORTERS
    return tuple(name for name in EXPORTERS if OLDEST_OPSETS[name] <= opset <= newest_opset())


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
    return next(n for n in range(newest, min(OLDEST_OPSETS.values()) - 1, -1) if _runs(n))


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
