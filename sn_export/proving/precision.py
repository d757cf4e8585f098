"""Run a forward in another precision than its own: in float64, or with every result rounded anew.

Both are modes of torch's dispatcher, which sees each operator on its way to a kernel. So nothing
of the model is copied or rewritten, and a forward that casts, or that makes tensors of a dtype that
it names, is caught as well.

A file computes the same with other operators, which round otherwise: a copy of it that moves every
value is made here. And onnxruntime lacks kernels: a copy in float32 is made where it has none for
the file's own dtype, and what a file in float64 computes in float32 on the way is found.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnx import ModelProto, NodeProto, TensorProto, helper
from torch import Tensor

from ..files import read_onnx
from ..results import ProofDtype
from ..running import InputSet, TorchDispatchMode, find_written, pytree
from ..text import shorten_list
from .external_data import count_weight_bytes, save

PROOF_DTYPES: tuple[ProofDtype | None, ...] = (None, "float32")

_OTHERS = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)
_DTYPE_ATTRIBUTES = ("to", "dtype", "output_dtype")  # of Cast, RandomNormal, QuantizeLinear ...
_INLINE = 2**30
_MISSING = re.compile(r"implementation for (?P<op>\w+)\(\d+\) node with name '(?P<name>[^']*)'")
_NAMES = {ir.DataType.DOUBLE: "float64", ir.DataType.FLOAT: "float32"}


# In float32 onnxruntime computes these by rational functions that are off by units of 1, not of the
# value: its sigmoid of -9 by 1e-7, which is 1e-3 of it (`torch.special.expit` by a unit of it). How
# many units at most, measured over [-12, 12] with 1.32. Inside its GRU a Tanh is off by twice that;
# torch's recurrent cells are recognised by what they write in place.
_BOUNDED = {"Sigmoid": 1.25, "Tanh": 2.5, "Erf": 1.0, "Softmax": 1.6}
_WIDER = {
    torch.float32: torch.float64,
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.complex64: torch.complex128,
    torch.complex32: torch.complex128,
}


def widen(value: Any) -> Any:
    """Return a tensor of low precision in float64; for such a dtype float64; all else as it is."""
    if isinstance(value, Tensor):
        wide = _WIDER.get(value.dtype)
        return value if wide is None else value.to(wide)
    return _WIDER.get(value, value) if isinstance(value, torch.dtype) else value


class InFloat64(TorchDispatchMode):
    """Gives every operator float64 in the place of each narrower dtype that it is given or names.

    Tensors that the operator writes to, and those that it returns a view of, stay in their dtype:
    a copy would take the writing.

    Args:
        draws_other: take other random numbers than a run with the same generators does.

    Attributes:
        obstacle: why the run is not that of the same network, in words; empty if it is.
        drawing: the operator that draws random numbers, in words; empty if none does. Fused
            attention counts, which draws none without dropout: whether it matters is seen in a
            second run that ``draws_other``.
    """

    def __init__(self, draws_other: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._draws_other = draws_other
        self.obstacle = self.drawing = ""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run one operator."""
        kwargs = dict(kwargs or {})
        is_drawing = torch.Tag.nondeterministic_seeded in func.tags
        if is_drawing:
            self.drawing = _name(func)
        if func is torch.ops.aten.view.dtype:
            self.obstacle = "the forward reads the bits of numbers (view as another dtype)"
            return func(*args, **kwargs)
        written = set(map(id, find_written(func, args, kwargs)))
        if func.is_view:
            return func(*args, **kwargs)
        args, kwargs = pytree.tree_map(
            lambda value: value if id(value) in written else widen(value), (args, kwargs)
        )
        if is_drawing and self._draws_other:
            func(*args, **kwargs)
        result = func(*args, **kwargs)
        return result if func._schema.is_mutable else pytree.tree_map(widen, result)


class MovedByRounding(TorchDispatchMode):
    """Moves every result of an operator by a unit of rounding, up or down at random.

    This is Monte Carlo arithmetic (Parker, "Monte Carlo Arithmetic: exploiting randomness in
    floating-point arithmetic", 1997) on whole operators: how far the outputs move is how far
    rounding moves them. What an operator writes in place is moved there, as the gates of a GRU;
    integers and views stay. Results of `_BOUNDED` operators are moved by units of 1, by which those
    of onnxruntime are off, inside its GRU and LSTM as well.

    Args:
        seed: of the draws; the global generators are not used.
        floor: no unit of rounding is smaller than that of this dtype.

    Attributes:
        dtypes: how many results had each floating dtype.
    """

    def __init__(self, seed: int, floor: torch.dtype = torch.float64) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._generator = torch.Generator().manual_seed(seed)
        self._floor = torch.finfo(floor).eps
        self.dtypes: Counter[torch.dtype] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run one operator."""
        result = func(*args, **(kwargs or {}))
        bound = _BOUNDED.get(_name(func).strip("_").capitalize(), 0.0)
        move = partial(self._move, bound=2 * bound if func._schema.is_mutable else bound)
        if func._schema.is_mutable:
            for tensor in find_written(func, args, kwargs or {}):
                tensor.copy_(move(tensor))
            return result
        return result if func.is_view else pytree.tree_map(move, result)

    def _move(self, value: Any, bound: float = 0.0) -> Any:
        if not isinstance(value, Tensor) or not value.numel():
            return value
        if value.is_complex():
            return torch.view_as_complex(self._move(torch.view_as_real(value.resolve_conj())))
        if not value.is_floating_point():
            return value
        if value.layout != torch.strided or value.itemsize < 2:
            return value
        self.dtypes[value.dtype] += 1
        unit = max(torch.finfo(value.dtype).eps, self._floor)
        signs = torch.randint(0, 2, value.shape, generator=self._generator, dtype=torch.int8)
        wide = value.double()
        shift = unit * (2 * signs.to(wide) - 1)
        is_bounded = bound and unit == _UNITS[TensorProto.FLOAT]
        moved = wide + bound * shift if is_bounded else wide * (1 + shift)
        return torch.where(wide == wide.trunc(), wide, moved).to(value.dtype)


def _name(func: Any) -> str:
    """Return the name of an operator: ``"conv2d"`` for ``aten.conv2d.default``."""
    return str(func).split(".")[1] if "." in str(func) else str(func)


def find_narrow_operators(path: Path) -> str:
    """Return the operators that a file runs between a cast to float32 and one to float64.

    Torch's exporters write such casts where ONNX has no operator in float64, as ``Celu``::

        Cast(to=FLOAT) -> Celu -> Cast(to=DOUBLE)  # "Celu"

    Args:
        path: the file; its external data is not read.

    Returns:
        Their names with commas between them, each once; empty if there are none.
    """
    graph = read_onnx(path).graph
    narrow: set[str] = set()
    found: dict[str, None] = {}
    for node in graph.node:
        to = next((entry.i for entry in node.attribute if entry.name == "to"), None)
        if to == TensorProto.FLOAT:
            narrow.update(node.output)
        elif to is None and narrow.intersection(node.input):
            narrow.update(node.output)
            found[node.op_type] = None
    return shorten_list(found)


_UNITS = {TensorProto.FLOAT: 2.0**-23, TensorProto.DOUBLE: 2.0**-52}
_EXACT = {"Constant", "ConstantOfShape"}


def move_values(path: Path) -> bytes:
    """Return a copy of a file that moves the results of its operators by a unit of rounding.

    It moves them elsewhere at every run, up or down at random, as `MovedByRounding` does to a
    model; integers, and what is inside an ``If`` or ``Loop``, stay as they are::

        Sigmoid -> y -> Log  ->  Sigmoid -> y.exact, y.exact + unit * random -> y -> Log

    Args:
        path: the file; the copy looks for its external data beside it.
    """
    file: ModelProto = read_onnx(path)
    typed = onnx.shape_inference.infer_shapes(file).graph
    kinds = {v.name: v.type.tensor_type.elem_type for v in (*typed.value_info, *typed.output)}
    nodes: list[NodeProto] = []
    for node in file.graph.node:
        nodes.append(node)
        for position, name in enumerate(node.output):
            unit = _UNITS.get(kinds.get(name, 0))
            if unit is not None and node.op_type not in _EXACT:
                node.output[position] = exact = f"{name}.exact"
                nodes += _make_moving_nodes(exact, name, unit, node.op_type in _BOUNDED, len(nodes))
    del file.graph.node[:]
    file.graph.node.extend(nodes)
    content: bytes = file.SerializeToString()
    return content


def _make_moving_nodes(
    exact: str, name: str, unit: float, is_absolute: bool, seed: int
) -> Iterator[NodeProto]:
    """Yield the nodes that move ``exact``, where it is no integer, and call the result ``name``."""
    random, rounded, is_integer, moved = (
        f"{name}.{part}" for part in ("random", "rounded", "integer", "moved")
    )
    middle = 0.0 if is_absolute else 1.0
    yield helper.make_node(
        "RandomUniformLike",
        [exact],
        [random],
        low=middle - unit,
        high=middle + unit,
        seed=float(seed),
    )
    yield helper.make_node("Add" if is_absolute else "Mul", [exact, random], [moved])
    yield helper.make_node("Round", [exact], [rounded])
    yield helper.make_node("Equal", [exact, rounded], [is_integer])
    yield helper.make_node("Where", [is_integer, exact, moved], [name])


def write_float32(source: Path, target: Path) -> None:
    """Write a copy of a file in which every float16, bfloat16 and float64 is a float32.

    Args:
        source: the file; its external data lies beside it.
        target: the copy; its external data, if it is large, goes beside it.
    """
    model = ir.load(source, format="protobuf")
    graphs = [model.graph, *(function.graph for function in model.functions.values())]
    for graph in graphs:
        for inner in (graph, *graph.subgraphs()):
            _convert(inner)
    save(model, target, outside=count_weight_bytes(model) > _INLINE)


def as_float32(tensor: Tensor) -> Tensor:
    """Return a floating tensor in float32, and any other as it is."""
    return tensor.float() if tensor.is_floating_point() else tensor


def convert_inputs(inputs: InputSet) -> InputSet:
    """Return an input set with floating tensors in float32."""
    return inputs.map(as_float32)


def make_comparable(expected: Tensor, got: Tensor) -> tuple[Tensor, Tensor]:
    """Return a reference of any floating dtype and a float32 result in the narrower dtype."""
    if not (expected.is_floating_point() and got.is_floating_point()):
        return expected, got
    narrow = torch.float32 if expected.dtype == torch.float64 else expected.dtype
    return expected.to(narrow), got.to(narrow)


def find_missing_kernel(path: Path, message: str) -> tuple[str, str] | None:
    """Return operator and dtype of the kernel that onnxruntime lacks; None for another message.

    Args:
        path: the file that it refuses.
        message: what it says.
    """
    found = _MISSING.search(message)
    if found is None:
        return None
    nodes = [
        n for n in ir.load(path, format="protobuf").graph.all_nodes() if n.name == found["name"]
    ]
    dtypes = [v.dtype for n in nodes for v in (*n.outputs, *n.inputs) if v is not None]
    dtype = next((d for d in dtypes if d is not None), None)
    return found["op"], _NAMES.get(dtype, str(dtype).lower()) if dtype is not None else ""


def _convert(graph: ir.Graph | ir.GraphView) -> None:
    for value in graph.initializers.values():
        if value.const_value is not None and value.const_value.dtype in _OTHERS:
            value.const_value = _convert_tensor(value.const_value)
    values = [*graph.inputs, *graph.outputs, *graph.initializers.values()]
    for node in graph:
        values += node.outputs
        for name, attribute in node.attributes.items():
            if attribute.type == ir.AttributeType.TENSOR and attribute.value.dtype in _OTHERS:
                node.attributes[name] = ir.AttrTensor(name, _convert_tensor(attribute.value))
            elif name in _DTYPE_ATTRIBUTES and attribute.value in _OTHERS:
                node.attributes[name] = ir.AttrInt64(name, ir.DataType.FLOAT)
    for value in values:
        if value.dtype in _OTHERS:
            value.dtype = ir.DataType.FLOAT


def _convert_tensor(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    return ir.tensor(np.asarray(tensor.numpy(), dtype=np.float32), name=tensor.name)
