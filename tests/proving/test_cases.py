"""A saved case replays a proof without the model, and a bad one is refused in one sentence.

`Case` is taken from inside, to write files that no proof would save.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from export_models import (
    EXPORTERS,
    Head,
    Liar,
    contents_of,
    file_of,
    images,
    rows,
    small_net,
)
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from sn_export import ExportError, ParityError, SnExportError, check_case, export_onnx
from sn_export.proving import open_case, write_case
from sn_export.proving.cases import Case


class Mixed(Head):
    """Takes and gives several dtypes, by keyword."""

    def forward(self, x: Tensor, index: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Return floats, integers and booleans."""
        y = self.layer(x) * mask
        return {"y": y, "index": index + 1, "mask": ~mask}


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_replay(tmp_path: Path, exporter: str) -> None:
    """A case holds every input set of the proof and gives the report of the proof again.

    So it does where the disk takes no longer name, such as that of external data.
    """
    path, case = tmp_path / "net.onnx", tmp_path / "net.npz"
    report = export_onnx(
        small_net("hook"), images(), path, exporter=exporter, inputs=[images(9)], save_case=case
    )
    assert sorted(contents_of(tmp_path)) == ["net.npz", "net.onnx"]
    assert check_case(path, case) == report.parity
    longest = path.rename(tmp_path / f"{'x' * 250}.onnx")
    assert check_case(str(longest), str(case)).samples == 5


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_replay_of_many_dtypes(tmp_path: Path, exporter: str) -> None:
    """Integers, booleans and keyword inputs are replayed, exactly."""
    path, case = tmp_path / "net.onnx", tmp_path / "net.npz"
    mask = torch.tensor([[True, False, True]])
    inputs = {"mask": mask, "x": rows(), "index": torch.tensor([3, 2**60])}
    report = export_onnx(Mixed(), (), path, kwargs=inputs, exporter=exporter, save_case=case)
    replayed = check_case(path, case)
    assert replayed == report.parity
    assert [output.dtype for output in replayed.outputs] == ["float32", "int64", "bool"]


def test_bfloat16(tmp_path: Path) -> None:
    """bfloat16 is kept bit for bit."""
    tensor = torch.randn(40).to(torch.bfloat16)
    case = Case(("x",), ("y",), (None,), (None,), [("one", [tensor], [tensor])])
    write_case(tmp_path / "case.npz", case)
    with open_case(tmp_path / "case.npz") as (_, sets):
        ((label, inputs, outputs),) = list(sets)
    assert label == "one"
    for found in (*inputs, *outputs):
        assert found.dtype == torch.bfloat16
        assert torch.equal(found.view(torch.int16), tensor.view(torch.int16))
    node = helper.make_node("Identity", ["x"], ["y"])
    path = file_of(tmp_path / "one.onnx", [node], dtype=TensorProto.BFLOAT16)
    assert check_case(path, tmp_path / "case.npz", rtol=0, atol=0).passed


def test_a_worse_file_fails(tmp_path: Path) -> None:
    """A file of another model fails on the case, with the numbers."""
    path, case = tmp_path / "net.onnx", tmp_path / "net.npz"
    export_onnx(Head(), rows(), path, exporter="torchscript", save_case=case)
    file = onnx.load(path)
    (entry,) = (i for i in file.graph.initializer if i.name == "layer.bias")
    entry.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(entry) + 0.5, entry.name))
    onnx.save(file, path)
    report = check_case(path, case)
    assert not report.passed
    assert report.outputs[0].max_abs == pytest.approx(0.5, abs=1e-5)
    assert check_case(path, case, atol=1.0).passed


def test_saved_tolerances_apply(tmp_path: Path) -> None:
    """The tolerances of the proof are saved, and can be replaced."""
    path, case = tmp_path / "net.onnx", tmp_path / "net.npz"
    export_onnx(Liar(), rows(), path, exporter="torchscript", atol={0: 1.0}, save_case=case)
    assert check_case(path, case).outputs[0].atol == 1.0
    assert not check_case(path, case, atol=0.1, rtol=0.0).passed


def test_same_bytes(tmp_path: Path) -> None:
    """The same export writes the same case."""
    for name in ("a", "b"):
        torch.manual_seed(3)
        export_onnx(
            Head(), rows(), tmp_path / "n.onnx", exporter="torchscript", save_case=tmp_path / name
        )
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert str(tmp_path).encode() not in (tmp_path / "a").read_bytes()


def test_other_names_and_numbers(tmp_path: Path) -> None:
    """Inputs with other names go by position; another number of them is an error."""
    path, case = tmp_path / "net.onnx", tmp_path / "net.npz"
    model = Head()
    export_onnx(model, rows(), path, exporter="torchscript", save_case=case)
    export_onnx(model, rows(), path, exporter="torchscript", input_names=["other"])
    assert check_case(path, case).passed
    add = helper.make_node("Add", ["a", "b"], ["y"])
    two = file_of(tmp_path / "two.onnx", [add], ("a", "b"))
    with pytest.raises(ExportError) as caught:
        check_case(two, case)
    assert str(caught.value) == "the file takes the inputs ['a', 'b'], the case has ['x']"
    nodes = [helper.make_node("Identity", ["x"], [name]) for name in ("y", "z")]
    two = file_of(tmp_path / "two.onnx", nodes, ("x",), ("y", "z"))
    with pytest.raises(ExportError) as caught:
        check_case(two, case)
    assert str(caught.value) == "the file has 2 outputs, the case 'net.npz' 1"


@pytest.mark.parametrize("earlier", [True, False])
def test_nothing_is_left_of_a_failure(
    tmp_path: Path, earlier: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a proof there is no case; and a case that cannot be moved takes the file back."""
    path, case = tmp_path / "net.onnx", tmp_path / "cases" / "net.npz"
    case.parent.mkdir()
    if earlier:
        path.write_bytes(onnx.ModelProto(ir_version=8).SerializeToString())
        case.write_bytes(b"an earlier case")
    before = contents_of(tmp_path)
    with pytest.raises(ParityError):
        export_onnx(Liar(), rows(), path, exporter="torchscript", save_case=case)
    assert contents_of(tmp_path) == before
    real = os.replace

    def replace(source: Path, destination: Path) -> None:
        if destination == case and "replaced" not in str(source):
            raise OSError(28, "No space left on device")
        real(source, destination)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(ExportError, match="No space left on device"):
        export_onnx(Head(), rows(), path, exporter="torchscript", save_case=case)
    assert contents_of(tmp_path) == before


def test_bad_targets(tmp_path: Path) -> None:
    """A place where no case can be written is refused before anything runs."""
    path = tmp_path / "net.onnx"
    absent = tmp_path / "absent" / "net.npz"
    for case, error, message in (
        (absent, FileNotFoundError, f"cannot write '{absent}': no folder '{absent.parent}'"),
        (tmp_path, IsADirectoryError, f"cannot write '{tmp_path}': it is a folder"),
        (path, ValueError, f"save_case must be another file than path, got '{path}'"),
    ):
        with pytest.raises(error) as caught:
            export_onnx(Head(), rows(), path, save_case=case)
        assert str(caught.value) == message
    assert contents_of(tmp_path) == {}


def _good() -> dict[str, Any]:
    return {
        "format": "sn_export.case",
        "version": 1,
        "inputs": ["x"],
        "outputs": ["y"],
        "rtol": [None],
        "atol": [None],
        "sets": [{"label": "one", "inputs": ["float32"], "outputs": ["float32"]}],
    }


def _write(path: Path, content: Any, **arrays: Any) -> None:
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    given: dict[str, Any] = {"input_0_0": np.ones(3, "f4"), "output_0_0": np.ones(3, "f4")}
    given = {key: value for key, value in {**given, **arrays}.items() if value is not None}
    with path.open("wb") as file:
        np.savez(file, case=np.frombuffer(text, np.uint8), **given)


@pytest.fixture
def identity(tmp_path: Path) -> Path:
    """A file that returns its input."""
    return file_of(tmp_path / "one.onnx", [helper.make_node("Identity", ["x"], ["y"])])


def test_case_by_hand(tmp_path: Path, identity: Path) -> None:
    """The format is as documented: a case written by hand is read."""
    _write(tmp_path / "case.npz", _good())
    assert check_case(identity, tmp_path / "case.npz", rtol=0, atol=0).passed


_BROKEN: dict[str, tuple[Any, dict[str, Any], str]] = {
    "not json": (b"{", {}, "'case' is no JSON"),
    "not utf-8": (b"\xff\xfe\x00", {}, "'case' is no JSON"),
    "a list": ([1], {}, "'case' does not say that its format is 'sn_export.case'"),
    "deep": (b"[" * 100_000, {}, "'case' is no JSON"),
    "version": (_good() | {"version": 2}, {}, "it has version 2, wanted 1"),
    "no sets": (_good() | {"sets": []}, {}, "'case' lacks names, tolerances or sets"),
    "names": (_good() | {"inputs": "x"}, {}, "'case' lacks names, tolerances or sets"),
    "tolerance": (_good() | {"rtol": ["1"]}, {}, "'case' lacks names, tolerances or sets"),
    "negative": (_good() | {"atol": [-1]}, {}, "'case' lacks names, tolerances or sets"),
    "large": (_good() | {"atol": [10**400]}, {}, "'case' lacks names, tolerances or sets"),
    "dtype": (
        _good() | {"sets": [{"label": "", "inputs": ["object"], "outputs": ["float32"]}]},
        {},
        "'case' lacks names, tolerances or sets",
    ),
    "fewer arrays": (_good(), {"output_0_0": None}, "it has no array 'output_0_0'"),
    "another dtype": (
        _good(),
        {"input_0_0": np.ones(3)},
        "'input_0_0' holds float64, wanted float32 for float32",
    ),
    "objects": (
        _good(),
        {"input_0_0": np.array([print], dtype=object)},
        "array 'input_0_0': ValueError: Object arrays cannot be loaded",
    ),
}


@pytest.mark.parametrize(("content", "arrays", "message"), _BROKEN.values(), ids=_BROKEN)
def test_broken_case(
    tmp_path: Path, identity: Path, content: Any, arrays: dict[str, Any], message: str
) -> None:
    """What is wrong with a case is told in one sentence that names it."""
    case = tmp_path / "case.npz"
    _write(case, content, **arrays)
    with pytest.raises(SnExportError) as caught:
        check_case(identity, case)
    assert str(caught.value).startswith(f"cannot read the case '{case}': {message}")


class _Trap:
    def __reduce__(self) -> Any:
        return os.mkdir, ("sprung",)


def _archive(compression: int, content: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive:
        archive.writestr("case.npy", content)
    return stream.getvalue()


def _header(shape: tuple[int, ...]) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        stream, {"descr": "|u1", "fortran_order": False, "shape": shape}
    )
    return stream.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no archive",
        bytes(range(256)) * 9,
        pickle.dumps(_Trap()),
        _archive(zipfile.ZIP_STORED, b""),
        _archive(zipfile.ZIP_STORED, b"no array"),
        _archive(zipfile.ZIP_STORED, _header((2**50,))),
        _archive(zipfile.ZIP_DEFLATED, _header((10**6,)) + bytes(10**6)),
    ],
)
def test_file_that_is_no_case(
    tmp_path: Path, identity: Path, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another file is refused in one sentence, and nothing in it runs or unpacks to any size."""
    monkeypatch.chdir(tmp_path)
    case = tmp_path / "case.npz"
    case.write_bytes(content)
    with pytest.raises(SnExportError, match="cannot read the case"):
        check_case(identity, case)
    assert not (tmp_path / "sprung").exists()


def test_truncated_case(tmp_path: Path, identity: Path) -> None:
    """No part of a case is taken for the whole."""
    case = tmp_path / "case.npz"
    _write(case, _good())
    content = case.read_bytes()
    for end in range(0, len(content), 97):
        case.write_bytes(content[:end])
        with pytest.raises(SnExportError, match="cannot read the case"):
            check_case(identity, case)


def test_absent_files(tmp_path: Path, identity: Path) -> None:
    """A file that is not there is named."""
    absent = tmp_path / "absent"
    with pytest.raises(FileNotFoundError) as caught:
        check_case(identity, absent)
    assert str(caught.value) == f"no case at '{absent}'"
    with pytest.raises(FileNotFoundError) as caught:
        check_case(absent, absent)
    assert str(caught.value) == f"no ONNX file at '{absent}'"


@pytest.mark.parametrize("option", ["onnx_path", "case_path"])
def test_what_is_no_path(identity: Path, option: str) -> None:
    """It is refused with the name of the argument."""
    paths: dict[str, Any] = {"onnx_path": identity, "case_path": identity, option: 5}
    with pytest.raises(TypeError, match=f"{option} must be the path of a file, got 5"):
        check_case(**paths)


def test_model_is_untouched_and_case_is_complete(tmp_path: Path) -> None:
    """A case of a model with a dynamic size holds the other sizes too."""
    path, case = tmp_path / "net.onnx", tmp_path / "net.npz"
    model = nn.Sequential(Head())
    batch = torch.export.Dim("batch", min=2, max=9)
    report = export_onnx(model, rows(), path, dynamic_shapes=({0: batch},), save_case=case)
    assert check_case(path, case) == report.parity
    with open_case(case) as (_, sets):
        heights = {inputs[0].shape[0] for _, inputs, _ in sets}
    assert len(heights) > 1
