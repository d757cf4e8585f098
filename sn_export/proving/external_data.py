"""ONNX files with their weights in the file or in one side file.

A file whose weights would fill the memory runs piece after piece, each with its weights alone.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
from onnx import GraphProto, ModelProto, NodeProto, TensorProto

from ..errors import ExportError
from ..files import name_side_file, read_onnx
from ..text import quote_name

# Large weights start at a page (of 64 KiB, as Windows has them), so that the file can be mapped.
# onnx-ir does that by itself before 1.1.
_PAGE = 2**16
_PACKS_DENSELY = "alignment" in inspect.signature(ir.save).parameters
_ARGUMENT = 256  # elements at most in shapes, axes and the like, which operators read first
_PIECE = 2**28  # bytes of weights in one piece, where that holds a whole node


def count_weight_bytes(model: ir.Model) -> int:
    """Return how many bytes the initializers of ``model`` take."""
    values = model.graph.initializers.values()
    return sum(value.const_value.nbytes for value in values if value.const_value is not None)


def save(
    model: ir.Model, path: Path, *, outside: bool, release: Callable[[], None] = lambda: None
) -> ModelProto:
    """Write ``model`` to ``path``, with the weights in its side file if they go ``outside``.

    Small weights stay in the file, and there is no side file if none is left for it.

    Args:
        model: a graph with its weights.
        path: the file.
        outside: whether there is a side file.
        release: called whenever a weight has been read, to free the memory that this took.

    Returns:
        The model without its weights, which are among its inputs.
    """
    weights = _find_weights(model)
    bare = _drop_data(weights, model)
    if outside:
        data = name_side_file(path)
        options: dict[str, Any] = {"alignment": _PAGE} if _PACKS_DENSELY else {}
        ir.save(model, path, external_data=data.name, callback=lambda *_: release(), **options)
        release()
        if data.is_file() and not data.stat().st_size:
            data.unlink()
    else:
        _write_whole(bare, weights, path, release)
    named = {value.name: value for value in bare.graph.initializer}
    del bare.graph.initializer[:]
    bare.graph.initializer.extend(value for name, value in named.items() if name not in weights)
    bare.graph.input.extend(
        onnx.helper.make_tensor_value_info(name, named[name].data_type, named[name].dims)
        for name in weights
    )
    return bare


def _find_weights(model: ir.Model) -> dict[str, Any]:
    """Return the initializers that are larger than shapes, axes and other arguments, by name."""
    return {
        name: tensor
        for name, value in model.graph.initializers.items()
        if (tensor := value.const_value) is not None
        and tensor.size > _ARGUMENT
        and tensor.dtype != ir.DataType.STRING
        and tensor.nbytes >= tensor.size  # elements smaller than a byte are packed
        and not value.is_graph_input()
    }


def _drop_data(weights: Mapping[str, Any], model: ir.Model) -> ModelProto:
    """Return a model in which each of the weights has a dtype and a shape, and no data."""
    initializers = model.graph.initializers
    try:
        for name, tensor in weights.items():
            shape = ir.Shape(list(tensor.shape))
            initializers[name].const_value = ir.ExternalTensor(
                "", None, None, tensor.dtype, shape=shape, name=name
            )
        bare: ModelProto = ir.to_proto(model)
    finally:
        for name, tensor in weights.items():
            initializers[name].const_value = tensor
    for value in bare.graph.initializer:
        if value.name in weights:
            value.ClearField("data_location")
            value.ClearField("external_data")
    return bare


def _write_whole(
    bare: ModelProto,
    weights: Mapping[str, Any],
    path: Path,
    release: Callable[[], None],
) -> None:
    """Write a model with its weights, each from where it lies: protobuf would copy them twice.

    A message is a row of fields, and each begins with its number and its length::

        ... | graph 3180: nodes ... | initializer 1052: name, shape ... | data 1024: ... | ...

    Args:
        bare: as `_drop_data` returns it.
        weights: by name.
        path: the file.
        release: called whenever a weight has been read.
    """
    rest, graph = ModelProto(), GraphProto()
    rest.CopyFrom(bare)
    rest.ClearField("graph")
    graph.CopyFrom(bare.graph)
    graph.ClearField("initializer")
    parts = [graph.SerializeToString()]
    sizes = [len(parts[0])]
    for value in bare.graph.initializer:
        content, size = value.SerializeToString(), 0
        if value.name in weights:
            size = weights[value.name].nbytes
            content += _encode_field(TensorProto, "raw_data", size)
        parts.append(_encode_field(GraphProto, "initializer", len(content) + size) + content)
        sizes.append(len(parts[-1]) + size)
    with path.open("wb") as file:
        file.write(
            rest.SerializeToString() + _encode_field(ModelProto, "graph", sum(sizes)) + parts[0]
        )
        for value, part in zip(bare.graph.initializer, parts[1:], strict=True):
            file.write(part)
            if value.name in weights:
                weights[value.name].tofile(file)
                release()


def _encode_field(message: Any, name: str, length: int) -> bytes:
    """Return how a field of so many bytes begins: its number and its length, each a varint."""
    found = bytearray()
    for number in (message.DESCRIPTOR.fields_by_name[name].number << 3 | 2, length):
        while number > 0x7F:
            found.append(number & 0x7F | 0x80)
            number >>= 7
        found.append(number)
    return bytes(found)


def find_stale_data(made: Path, target: Path) -> list[Path]:
    """Return the side file of the ONNX file at ``target``, if ``made`` in its place reads none.

    A file that only has the name of a side file, and is not named in the ONNX file, is not stale.
    """
    data = name_side_file(target)
    if name_side_file(made).exists() or not data.is_file() or not target.is_file():
        return []
    try:
        tensors = read_onnx(target).graph.initializer
    except Exception:  # what is there is no ONNX file
        return []
    entries = [entry for tensor in tensors for entry in tensor.external_data]
    is_read = any(entry.key == "location" and entry.value == data.name for entry in entries)
    return [data] if is_read else []


def require_data_inside(path: Path) -> None:
    """Raise if an ONNX file names data outside of its folder, by a path or behind a link.

    onnxruntime refuses that itself only since 1.24.

    Raises:
        ExportError: naming the data, or the file if it is no ONNX file.
    """
    try:
        model = read_onnx(path)
    except Exception as error:  # what cannot be checked is not loaded
        raise ExportError(f"cannot load '{path.name}': it is no ONNX file, or damaged") from error
    folders = {path.parent.resolve(), path.resolve().parent}
    for name in sorted(set(_list_data(model))):
        what = f"cannot load '{path.name}': its data {quote_name(name)}"
        try:
            data = Path(os.path.realpath(path.parent / name))
        except ValueError as error:  # a zero byte
            raise ExportError(f"{what} have a name that no file can have") from error
        if not any(data.is_relative_to(folder) for folder in folders):
            raise ExportError(f"{what} lie outside of its folder")
        if os.path.exists(data) and not os.path.isfile(data):
            raise ExportError(f"{what} are no regular file")


def _list_data(message: Any) -> Iterator[str]:
    """Yield the path of the data of each tensor, wherever in a model it is.

    Graphs hold tensors, and so do attributes, functions, and the graphs in these.
    """
    if isinstance(message, TensorProto):
        entries = (entry for entry in message.external_data if entry.key == "location")
        yield from (os.fsdecode(entry.value) for entry in entries)
        return
    for kind, value in message.ListFields():
        if kind.message_type is not None:
            for one in [value] if hasattr(value, "ListFields") else value:
                yield from _list_data(one)


class Pieces:
    """An onnxruntime session with a large file, that reads its weights a piece at a time.

    Every node runs once, in the order of the file, on the file's own weights. Only what
    onnxruntime would fuse across the border of two pieces runs unfused.

    Args:
        whole: a session with the whole file, for its names, and for runs that cannot be cut; it has
            not read the weights yet.
        path: the file.
        open_piece: makes a session of a model's bytes, with its external data beside ``path``.
    """

    def __init__(self, whole: Any, path: Path, open_piece: Callable[[bytes], Any]) -> None:
        self._whole = whole
        self._file = read_onnx(path)
        self._open = open_piece
        self._pieces = _cut(self._file.graph)
        self.get_inputs = whole.get_inputs
        self.get_outputs = whole.get_outputs
        self.get_providers = whole.get_providers

    def run_with_ort_values(
        self, outputs: Sequence[str] | None, feed: Mapping[str, Any]
    ) -> list[Any]:
        """Return the outputs that are named, or all, as a session of the whole file does."""
        names = [entry.name for entry in self.get_outputs()] if outputs is None else outputs
        made = {name for piece in self._pieces for name in piece.makes}
        if not made.issuperset(names):
            return self._run_at_once(outputs, feed)
        values = dict(feed)
        for position, piece in enumerate(self._pieces):
            if not piece.makes:
                continue  # nodes that nothing reads
            given = {name: values[name] for name in piece.takes if name in values}
            if not all(value.is_tensor() for value in given.values()):
                return self._run_at_once(outputs, feed)  # a sequence has no type of its own
            try:
                session = self._open(_make_model(self._file, piece, given).SerializeToString())
            except ExportError:  # it cannot be loaded without the nodes around it
                return self._run_at_once(outputs, feed)
            results = session.run_with_ort_values(piece.makes, given)
            del session  # and with it the weights
            later = {name for other in self._pieces[position + 1 :] for name in other.takes}
            values.update(zip(piece.makes, results, strict=True))
            values = {n: value for n, value in values.items() if n in later or n in names}
        return [values[name] for name in names]

    def _run_at_once(self, outputs: Sequence[str] | None, feed: Mapping[str, Any]) -> list[Any]:
        results: list[Any] = self._whole.run_with_ort_values(outputs, feed)
        return results


@dataclass
class _Piece:
    """Consecutive nodes, the weights they read, and the values that they take and make."""

    nodes: list[NodeProto] = field(default_factory=list)
    weights: dict[str, TensorProto] = field(default_factory=dict)
    takes: list[str] = field(default_factory=list)
    makes: list[str] = field(default_factory=list)


def _cut(graph: GraphProto) -> list[_Piece]:
    weights = {entry.name: entry for entry in graph.initializer}
    if any(entry.name in weights for entry in graph.input):
        return []  # weights that may be given anew with each run
    pieces, size = [_Piece()], 0
    for node in graph.node:
        read = {name: weights[name] for name in _reads(node) if name in weights}
        more = sum(_measure_size(read[name]) for name in read.keys() - pieces[-1].weights.keys())
        if size + more > _PIECE and pieces[-1].nodes:
            pieces.append(_Piece())
            size, more = 0, sum(map(_measure_size, read.values()))
        pieces[-1].nodes.append(node)
        pieces[-1].weights |= read
        size += more
    needed = {entry.name for entry in graph.output}
    for piece in reversed(pieces):
        made = {name for node in piece.nodes for name in node.output if name}
        read = dict.fromkeys(name for node in piece.nodes for name in _reads(node))
        piece.makes = sorted(made & needed)
        piece.takes = [name for name in read if name not in made and name not in weights]
        needed |= set(piece.takes)
    return pieces


def _reads(node: NodeProto) -> Iterator[str]:
    """Yield what a node reads, and what the graphs in it may read from around them."""
    yield from filter(None, node.input)
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            yield from (entry.name for entry in graph.output)
            for inner in graph.node:
                yield from _reads(inner)


def _make_model(file: ModelProto, piece: _Piece, given: Mapping[str, Any]) -> ModelProto:
    model = ModelProto(ir_version=file.ir_version)
    model.opset_import.extend(file.opset_import)
    model.functions.extend(file.functions)
    graph = model.graph
    graph.name = file.graph.name
    graph.node.extend(piece.nodes)
    graph.initializer.extend(piece.weights.values())
    declared = {entry.name: entry for entry in file.graph.input}  # with the sizes that vary
    for name, value in given.items():
        made = onnx.helper.make_tensor_value_info(name, value.element_type(), value.shape())
        graph.input.append(declared.get(name, made))
    for name in piece.makes:
        graph.output.add(name=name)
    return model


def _measure_size(tensor: TensorProto) -> int:
    lengths = (int(entry.value) for entry in tensor.external_data if entry.key == "length")
    return next(lengths, tensor.ByteSize())
