"""A large file is run piece after piece, and says what it says when it is run at once.

`Pieces` is called inside, with borders that a file of this size does not get.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from export_models import EXPORTERS, file_of, run_file
from golden_graphs import NETWORKS
from onnx import TensorProto, external_data_helper, helper, numpy_helper
from torch import Tensor, nn

from sn_export import ParityError, check_parity, export_onnx
from sn_export.proving import external_data, session as onnx_session
from sn_export.proving.external_data import Pieces
from sn_export.proving.session import open_session, run_session
from sn_export.running import tensor_memory

CPU = ("CPUExecutionProvider",)


@pytest.fixture(autouse=True)
def _everything_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_memory, "LARGE", 0)
    monkeypatch.setattr(external_data, "_PIECE", 1)


def _opened(path: Path) -> Pieces:
    """Open a file after putting its weights beside it; shapes are no weights."""
    file = onnx.load(path)
    for entry in file.graph.initializer:
        if entry.data_type == TensorProto.FLOAT:
            entry.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(entry), entry.name))
            external_data_helper.set_external_data(entry, f"{path.name}.data")
    onnx.save(file, path)
    session = open_session(path, CPU)
    assert isinstance(session, Pieces)
    return session


def _weights(**values: Sequence[float]) -> list[TensorProto]:
    return [
        numpy_helper.from_array(np.asarray(value, np.float32), name)
        for name, value in values.items()
    ]


def _run(session: Pieces, **feed: Tensor) -> list[Tensor | None]:
    return run_session(session, feed, "the example input")


def _runs_at_once(session: Pieces, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Note whenever the file is run as a whole."""
    seen: list[bool] = []
    real = Pieces._run_at_once

    def noting(self: Pieces, *args: Any) -> list[Any]:
        seen.append(True)
        return real(self, *args)

    monkeypatch.setattr(Pieces, "_run_at_once", noting)
    return seen


@pytest.mark.parametrize("exporter", EXPORTERS)
@pytest.mark.parametrize("network", NETWORKS)
def test_networks(
    tmp_path: Path, network: str, exporter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of one weight a piece gives every output that it gives at once, and no other."""
    build, inputs = NETWORKS[network]
    path = tmp_path / "net.onnx"
    monkeypatch.setattr(tensor_memory, "LARGE", 2**29)
    export_onnx(build(), inputs(), path, exporter=exporter)
    monkeypatch.setattr(tensor_memory, "LARGE", 0)
    session = _opened(path)
    seen = _runs_at_once(session, monkeypatch)
    args = inputs()
    names = [entry.name for entry in session.get_inputs()]
    found = _run(session, **dict(zip(names, args, strict=True)))
    wanted = run_file(path, *args)
    assert len(session._pieces) > 1 and not seen
    for one, other in zip(found, wanted, strict=True):
        assert one is not None
        np.testing.assert_allclose(one.numpy(), other, rtol=1e-5, atol=1e-6)


def test_one_piece_is_open_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each piece has its own weights alone, and its session is gone when the next one opens."""
    nodes = [
        helper.make_node("Mul", ["x", "a"], ["ax"]),
        helper.make_node("Mul", ["ax", "b"], ["abx"]),
        helper.make_node("Add", ["abx", "a"], ["y"]),  # reads a weight of another piece again
    ]
    path = file_of(tmp_path / "net.onnx", nodes, initializers=_weights(a=[2, 3], b=[5, 7]))
    session = _opened(path)
    opened: list[list[str]] = []
    alive: list[weakref.ref[Any]] = []
    real = onnx_session._open

    def opening(path: Path, providers: Sequence[str], content: bytes) -> Any:
        gc.collect()
        assert all(reference() is None for reference in alive)
        one = real(path, providers, content)
        alive.append(weakref.ref(one))
        opened.append([entry.name for entry in onnx.load_from_string(content).graph.initializer])
        return one

    monkeypatch.setattr(onnx_session, "_open", opening)
    (y,) = _run(session, x=torch.tensor([1.0, 10.0]))
    assert y is not None and y.tolist() == [12.0, 213.0]
    assert opened == [["a"], ["b"], ["a"]]


def test_pieces_are_as_large_as_they_may_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nodes are taken in until their weights exceed the size; a shared weight counts once."""
    names = ("a", "b", "a", "c", "d")
    nodes = [
        helper.make_node("Mul", [f"x{i}" if i else "x", name], [f"x{i + 1}" if i < 4 else "y"])
        for i, name in enumerate(names)
    ]
    weights = _weights(a=[1, 2], b=[3, 4], c=[5, 6], d=[7, 8])
    path = file_of(tmp_path / "net.onnx", nodes, initializers=weights)
    monkeypatch.setattr(external_data, "_PIECE", 16)
    session = _opened(path)
    assert [list(piece.weights) for piece in session._pieces] == [["a", "b"], ["c", "d"]]
    (y,) = _run(session, x=torch.ones(2))
    assert y is not None and y.tolist() == [1 * 3 * 1 * 5 * 7, 2 * 4 * 2 * 6 * 8]


def test_graphs_within_nodes(tmp_path: Path) -> None:
    """What a branch reads from around it, weights and values of earlier pieces, is handed in."""
    branch = helper.make_graph(
        [helper.make_node("Mul", ["early", "b"], ["taken"])],
        "branch",
        [],
        [helper.make_tensor_value_info("taken", TensorProto.FLOAT, None)],
    )
    other = helper.make_graph(
        [helper.make_node("Identity", ["late"], ["other"])],
        "other",
        [],
        [helper.make_tensor_value_info("other", TensorProto.FLOAT, None)],
    )
    nodes = [
        helper.make_node("Mul", ["x", "a"], ["early"]),
        helper.make_node("Add", ["early", "c"], ["late"]),
        helper.make_node("ReduceSum", ["late"], ["total"], keepdims=0),
        helper.make_node("Greater", ["total", "zero"], ["is_positive"]),
        helper.make_node("If", ["is_positive"], ["y"], then_branch=branch, else_branch=other),
    ]
    weights = [
        *_weights(a=[2, 3], b=[5, 7], c=[1, 1]),
        numpy_helper.from_array(np.float32(0), "zero"),
    ]
    path = file_of(tmp_path / "net.onnx", nodes, initializers=weights)
    session = _opened(path)
    for sign in (1.0, -1.0):
        x = torch.tensor([sign, sign])
        (y,) = _run(session, x=x)
        assert y is not None and y.tolist() == run_file(path, x)[0].tolist()


def test_a_value_that_only_the_end_reads(tmp_path: Path) -> None:
    """Outputs of early pieces, an input read at the end, and dead nodes are no obstacle."""
    nodes = [
        helper.make_node("Mul", ["x", "a"], ["early"]),
        helper.make_node("Mul", ["x", "c"], ["dead"]),
        helper.make_node("Mul", ["early", "b"], ["middle"]),
        helper.make_node("Add", ["middle", "x"], ["y"]),
    ]
    weights = _weights(a=[2, 3], b=[5, 7], c=[1, 1])
    path = file_of(tmp_path / "net.onnx", nodes, outputs=("y", "early"), initializers=weights)
    y, early = _run(_opened(path), x=torch.tensor([1.0, 2.0]))
    assert y is not None and y.tolist() == [11.0, 44.0]
    assert early is not None and early.tolist() == [2.0, 6.0]


def test_sequences_are_run_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where something other than a tensor would pass a border, the file is run as a whole."""
    nodes = [
        helper.make_node("Mul", ["x", "a"], ["ax"]),
        helper.make_node("SequenceConstruct", ["ax", "x"], ["pair"]),
        helper.make_node("Mul", ["x", "b"], ["bx"]),
        helper.make_node("ConcatFromSequence", ["pair"], ["both"], axis=0),
        helper.make_node("Sub", ["both", "bx"], ["y"]),
    ]
    path = file_of(tmp_path / "net.onnx", nodes, initializers=_weights(a=[2], b=[3]))
    session = _opened(path)
    seen = _runs_at_once(session, monkeypatch)
    (y,) = _run(session, x=torch.tensor([4.0]))
    assert y is not None and y.tolist() == [-4.0, -8.0]
    assert seen == [True]


def test_weights_that_are_outputs_or_inputs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A weight that is returned, or may be given, is no part of a piece: it is run at once."""
    nodes = [helper.make_node("Mul", ["x", "a"], ["y"])]
    weights = _weights(a=[2.0])
    returned = file_of(tmp_path / "out.onnx", nodes, outputs=("y", "a"), initializers=weights)
    given = file_of(tmp_path / "in.onnx", nodes, inputs=("x", "a"), initializers=weights)
    seen = _runs_at_once(_opened(returned), monkeypatch)
    y, a = _run(_opened(returned), x=torch.tensor([4.0]))
    assert (float(y or 0), float(a or 0)) == (8.0, 2.0)
    (y,) = _run(_opened(given), x=torch.tensor([4.0]), a=torch.tensor([3.0]))
    assert float(y or 0) == 12.0
    assert seen == [True, True]


class Deep(nn.Module):
    """Layers wide enough to lie in the side file."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.utils.parametrizations.spectral_norm(nn.Linear(12, 12)) for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def test_a_wrong_weight_of_any_piece_is_found(tmp_path: Path) -> None:
    """The proof in pieces fails for one altered element, and names the layer that has it."""
    model, x, path = Deep().eval(), torch.randn(2, 12), tmp_path / "net.onnx"
    export_onnx(model, (x,), path, external_data=True)
    assert check_parity(model, path, [x]).passed
    file = onnx.load(path)
    entry = next(e for e in file.graph.initializer if e.name == "layers.1.weight")
    array = numpy_helper.to_array(entry).copy()
    array[3, 4] += 1
    entry.CopyFrom(numpy_helper.from_array(array, entry.name))
    onnx.save(file, path, save_as_external_data=True, location="net.onnx.data", size_threshold=0)
    report = check_parity(model, path, [x])
    assert not report.passed and report.first_divergent == "layers.1"
    with pytest.raises(ParityError):
        report.require_passed("it")


@pytest.mark.parametrize("x", [torch.ones(3), torch.ones(1, 2), torch.ones(2, dtype=torch.int64)])
def test_the_errors_are_those_of_a_whole_file(tmp_path: Path, x: Tensor) -> None:
    """An input of another size, rank or dtype than the file declares is refused either way."""
    nodes = [
        helper.make_node("Mul", ["x", "a"], ["ax"]),
        helper.make_node("Add", ["ax", "b"], ["y"]),
    ]
    path = file_of(tmp_path / "net.onnx", nodes, initializers=_weights(a=[2], b=[5]))
    file = onnx.load(path)
    file.graph.input[0].type.tensor_type.shape.dim.add(dim_value=2)
    onnx.save(file, path)
    session = _opened(path)
    for one in (session, session._whole):
        with pytest.raises(onnx_session.ExportError, match="onnxruntime fails on the example"):
            run_session(one, {"x": x}, "the example input")


def test_a_piece_that_does_not_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where onnxruntime takes the whole and not a piece of it, it is run at once."""
    nodes = [
        helper.make_node("Mul", ["x", "a"], ["ax"]),
        helper.make_node("Add", ["ax", "b"], ["y"]),
    ]
    path = file_of(tmp_path / "net.onnx", nodes, initializers=_weights(a=[2], b=[5]))
    session = _opened(path)
    real = onnx_session._open

    def opening(path: Path, providers: Sequence[str], content: bytes) -> Any:
        if onnx.load_from_string(content).graph.node[0].op_type == "Add":
            raise onnx_session.ExportError("no")
        return real(path, providers, content)

    monkeypatch.setattr(onnx_session, "_open", opening)
    seen = _runs_at_once(session, monkeypatch)
    (y,) = _run(session, x=torch.tensor([3.0]))
    assert y is not None and y.tolist() == [11.0]
    assert seen == [True]


def test_a_file_that_opens_optimised_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where onnxruntime needs its optimisations to load a file, it has the whole file."""
    nodes = [helper.make_node("Mul", ["x", "a"], ["y"])]
    path = file_of(tmp_path / "net.onnx", nodes, initializers=_weights(a=[2.0]))
    _opened(path)
    real = onnx_session._open

    def opening(path: Path, providers: Sequence[str], optimised: bool = True) -> Any:
        if not optimised:
            raise onnx_session.ExportError("no kernel")
        return real(path, providers)

    monkeypatch.setattr(onnx_session, "_open", opening)
    assert isinstance(open_session(path, CPU), ort.InferenceSession)


def test_small_files_are_opened_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Below the limit, and where it is asked for, onnxruntime has the whole file."""
    nodes = [helper.make_node("Mul", ["x", "a"], ["y"])]
    path = file_of(tmp_path / "net.onnx", nodes, initializers=_weights(a=[2.0]))
    _opened(path)
    assert isinstance(open_session(path, CPU, at_once=True), ort.InferenceSession)
    monkeypatch.setattr(tensor_memory, "LARGE", 2**29)
    assert isinstance(open_session(path, CPU), ort.InferenceSession)


def test_a_session_has_the_threads_of_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who gives torch one thread, as in a container, has the proof on one thread, too."""
    path = file_of(tmp_path / "net.onnx", [helper.make_node("Identity", ["x"], ["y"])])
    for threads in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        opened = open_session(path, CPU, at_once=True)
        assert opened.get_session_options().intra_op_num_threads == threads
