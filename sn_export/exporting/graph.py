"""The graph that torch's exporters make: its names, its opset, and what it tells of the machine.

The opsets that can be had are those that an exporter of torch writes and the installed onnxruntime
runs.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

import onnx
import onnx_ir as ir
import torch
from onnx import TensorProto, helper
from torch import nn

from ..errors import ExportError
from ..proving import open_graph, ort
from ..results import EXPORTERS, Exporter
from ..running import InputSet, find_newest_torchscript_opset, make_distinct, make_output_names
from ..text import as_plain_integer, format_count

# What the exporters write about the machine and the caller's source files.
_TRACES = ("pkg.torch.onnx.stack_trace",)
_INT64_INDICES = ("ScatterND", "GatherND")  # their second input
_OLDEST_OPSETS: dict[Exporter, int] = {"dynamo": 17, "torchscript": 11}
_BFLOAT16 = 22
_IR_VERSION = 10  # of the probe: known to every onnxruntime that runs the newest opsets


def strip_traces(model: ir.Model) -> None:
    """Remove what the exporters wrote of the machine and the caller's source files, in place."""
    graphs = [model.graph, *(function.graph for function in model.functions.values())]
    for graph in graphs:
        for node in graph.all_nodes():
            node.doc_string = None
            for key in _TRACES:
                node.metadata_props.pop(key, None)


def rename(graph: ir.Graph, inputs: Sequence[str] | None, outputs: Sequence[str]) -> None:
    """Give a graph's inputs and outputs these names; any other value of that name gets another.

    With ``inputs=["x"]`` and ``outputs=["y"]`` a graph ``input.1 -> Conv -> 5``, in which the
    result of an inner node is called ``x``, becomes ``x -> Conv -> y`` with ``x_1`` inside.

    Args:
        graph: changed in place. An output that is an input, an initializer or another output
            too becomes a copy of it.
        inputs: names of all inputs in order, or None to keep what they are called.
        outputs: names of all outputs in order.
    """
    if len(outputs) != len(graph.outputs) or (inputs and len(inputs) != len(graph.inputs)):
        return  # the proof finds it, and says which inputs or outputs differ
    _separate_outputs(graph)
    places = [*zip(graph.outputs, outputs, strict=True)]
    if inputs is not None:
        places += zip(graph.inputs, inputs, strict=True)
    named = {id(value) for value, _ in places}
    wanted = {name for _, name in places}
    others = [value for value in _iter_values(graph) if id(value) not in named]
    taken = wanted | {value.name for value in others if value.name}
    for value in others:
        if value.name in wanted:
            free = make_distinct([value.name], taken)[0]
            taken.add(free)
            _set_name(graph, value, free)
    for number, (value, _) in enumerate(places):  # two may exchange their names
        _set_name(graph, value, f"__{number}__")
    for value, name in places:
        _set_name(graph, value, name)


def name_dimensions(graph: ir.Graph, axes: Mapping[str, Mapping[int, str]]) -> None:
    """Call dimensions by their names where dynamo of torch 2.6 numbers them, in place.

    With ``axes={"x": {0: "batch"}}``::

        x: [s0, 3], y: [2*s0, 1]  ->  x: [batch, 3], y: [2*batch, 1]
    """
    names: dict[str, str] = {}
    for value in graph.inputs:
        for position, name in axes.get(str(value.name), {}).items():
            size = value.shape[position] if value.shape is not None else None
            number = size.value if isinstance(size, ir.SymbolicDim) else None
            if number is not None and re.fullmatch(r"s\d+", number):
                names[number] = name
    for value in _iter_values(graph) if names else ():
        if value.shape is not None:
            value.shape = ir.Shape([_rename_size(size, names) for size in value.shape])


def _rename_size(size: int | ir.SymbolicDim, names: Mapping[str, str]) -> int | str | None:
    if isinstance(size, int) or size.value is None:
        return size if isinstance(size, int) else None
    return re.sub(r"\w+", lambda word: names.get(word[0], word[0]), size.value)


def _iter_values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph.all_nodes():
        yield from node.outputs


def _set_name(graph: ir.Graph, value: ir.Value, name: str) -> None:
    if value.is_initializer():
        graph.initializers.pop(str(value.name))
        value.name = name
        graph.register_initializer(value)
    else:
        value.name = name


def _separate_outputs(graph: ir.Graph) -> None:
    seen: set[int] = {id(value) for value in (*graph.inputs, *graph.initializers.values())}
    for index, value in enumerate(list(graph.outputs)):
        if id(value) in seen:
            node = ir.node("Identity", [value])
            copy = node.outputs[0]
            copy.shape, copy.type = value.shape, value.type
            graph.append(node)
            graph.outputs[index] = value = copy
        seen.add(id(value))


def widen_indices(graph: ir.Graph) -> None:
    """Cast indices in int32 to int64, the only type that some operators take.

    The dynamo exporter writes int32 indices for ``index_put``, which an inverse STFT needs, and
    that of torch 2.6 does not say that they are::

        ScatterND(x, indices, y)  ->  ScatterND(x, Cast(indices, to=INT64), y)
    """
    for node in graph.all_nodes():
        index = node.inputs[1] if node.op_type in _INT64_INDICES else None
        if index is not None and index.dtype != ir.DataType.INT64:
            cast = ir.node("Cast", [index], {"to": ir.DataType.INT64})
            cast.outputs[0].shape = index.shape
            cast.outputs[0].dtype = ir.DataType.INT64
            assert node.graph is not None
            node.graph.insert_before(node, cast)
            node.replace_input_with(1, cast.outputs[0])


def set_opset(model: ir.Model, wanted: int | None) -> None:
    """Give a model the opset that was asked for, if none of its operators changes with it.

    The dynamo exporter writes opset 18 where an older one is asked for.

    Raises:
        ExportError: if an operator of the model has another definition in that opset.
    """
    found = model.opset_imports.get("", 0)
    _drop_left_over(model, found)
    if wanted is None or found == wanted:
        return
    names = {node.op_type for node in model.graph.all_nodes() if node.domain == ""}
    changed = sorted(
        name for name in names if _find_since(name, found) != _find_since(name, wanted)
    )
    if changed:
        raise ExportError(
            f"opset {wanted} was asked for and the exporter wrote {found}, in which "
            f"{', '.join(changed)} differ. Try opset {found}, or the other exporter if it makes "
            f"opset {wanted}"
        )
    model.opset_imports[""] = wanted
    for function in model.functions.values():
        function.opset_imports[""] = wanted


def _drop_left_over(model: ir.Model, opset: int) -> None:
    """Take out the attributes that onnx leaves where it converts a model to an older opset.

    They say there what the older operator does anyway: parts of one size, axes as they are given.
    """
    for node in model.graph.all_nodes():
        for name, dropped in (("num_outputs", len(node.outputs)), ("noop_with_empty_axes", 0)):
            attribute = node.attributes.get(name)
            if node.domain or attribute is None or attribute.value != dropped:
                continue
            if name not in onnx.defs.get_schema(node.op_type, opset).attributes:
                del node.attributes[name]


def _find_since(name: str, opset: int) -> int:
    try:
        return int(onnx.defs.get_schema(name, opset).since_version)
    except onnx.defs.SchemaError:
        return 0


def require_opset(
    opset: int | None, exporters: Sequence[Exporter]
) -> tuple[int | None, tuple[Exporter, ...]]:
    """Return the opset, or None for torch's default, with the exporters that make it.

    Raises:
        TypeError: if it is no integer.
        ValueError: if it is none of `find_opsets` the exporters.
    """
    if opset is None:
        return None, tuple(exporters)
    number = as_plain_integer(opset)
    if number is None:
        raise TypeError(f"opset_version must be an integer, got {type(opset).__name__}")
    able = tuple(name for name in find_exporters(number) if name in exporters)
    if not able:
        ranges = ((find_opsets(name), name) for name in exporters)
        wanted = " or ".join(f"{opsets[0]} to {opsets[-1]} ({name})" for opsets, name in ranges)
        raise ValueError(
            f"opset_version must be {wanted} with torch {torch.__version__}, onnx "
            f"{onnx.__version__} and onnxruntime {ort.__version__}, got {number}"
        )
    return number, able


def find_exporters(opset: int | None) -> tuple[Exporter, ...]:
    """Return the exporters that make files of an opset; all of them for None."""
    return tuple(name for name in EXPORTERS if opset is None or opset in find_opsets(name))


def choose_opset(dtype: str | None, exporters: Sequence[Exporter]) -> int | None:
    """Return the opset for a network of this dtype, None for torch's own default.

    Convolutions and much else have no bfloat16 before opset 22, which one of the exporters may
    lack.
    """
    newest = max(find_opsets(name)[-1] for name in exporters)
    return min(_BFLOAT16, newest) if dtype == "bfloat16" else None


@functools.cache
def find_opsets(exporter: Exporter) -> range:
    """Return the opsets that an exporter writes, onnx knows and onnxruntime runs; tried once.

    The TorchScript exporter refuses what is newer than torch's constant; the dynamo exporter lets
    onnx convert its file to any that onnx knows.
    """
    newest = onnx.defs.onnx_opset_version()
    if exporter == "torchscript":
        newest = min(newest, find_newest_torchscript_opset())
    oldest = _OLDEST_OPSETS[exporter]
    newest = next(opset for opset in range(newest, oldest - 1, -1) if _runs(opset))
    return range(oldest, newest + 1)


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
    try:
        open_graph(probe.SerializeToString())
    except Exception:
        return False
    return True


def name_inputs(
    model: nn.Module, example: InputSet, chosen: Sequence[str] | None
) -> dict[str, str]:
    """Return the names in the file by the name in the forward's signature, in its order.

    For ``forward(x, pair)`` and ``chosen=["image"]``: ``{"x": "image", "pair_0": "pair_0",
    "pair_1": "pair_1"}``.

    Args:
        model: its parameters and buffers keep their names.
        example: the example input, bound.
        chosen: names that the user wants, for the first inputs or all.

    Raises:
        TypeError: if ``chosen`` is no sequence of text.
        ValueError: if it has more names than there are tensors, or one twice.
    """
    signature = [name for name, _ in example.named_tensors()]
    wanted = _require_names("input_names", chosen, signature, "among the arguments of the example")
    rest = make_distinct(signature[len(wanted) :], {*wanted, *_list_state(model)})
    return dict(zip(signature, [*wanted, *rest], strict=True))


def name_outputs(
    model: nn.Module,
    paths: Iterable[Sequence[str]],
    chosen: Sequence[str] | None,
    inputs: Sequence[str],
) -> list[str]:
    """Return the names of the outputs: those chosen, the rest from the structure of the result.

    Args:
        model: its parameters keep their names.
        paths: where the tensors stand in what the forward returned for the example.
        chosen: names that the user wants, for the first outputs or all.
        inputs: the names of the file's inputs, which stay.

    Raises:
        TypeError: if ``chosen`` is no sequence of text.
        ValueError: if it has more names than there are tensors, or one twice or of an input.
    """
    found = make_output_names(tuple(path) for path in paths)
    wanted = _require_names("output_names", chosen, found, "in the model's output")
    both = next((name for name in wanted if name in inputs), None)
    if both is not None:
        raise ValueError(f"output_names has '{both}', which is the name of an input")
    taken = {*wanted, *inputs, *_list_state(model)}
    rest = found[len(wanted) :]
    free = make_distinct([f"output_{name}" if name in taken else name for name in rest], taken)
    return [*wanted, *free]


def _require_names(
    option: str, chosen: Sequence[str] | None, found: Sequence[str], where: str
) -> list[str]:
    if chosen is None:
        return []
    if isinstance(chosen, str) or not isinstance(chosen, Iterable):
        raise TypeError(f"{option} must be a sequence of names, got {chosen!r}")
    names = list(chosen)
    if not all(isinstance(name, str) and name for name in names):
        raise TypeError(f"{option} must be a sequence of names, got {names!r}")
    if len(names) > len(found):
        raise ValueError(
            f"{option} has {format_count(len(names), 'name')} for "
            f"{format_count(len(found), 'tensor')} {where}: {', '.join(found)}"
        )
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{option} has '{twice}' twice")
    return names


def _list_state(model: nn.Module) -> set[str]:
    return {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
