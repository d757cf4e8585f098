"""The exported graph is that of the plain network."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import onnx
import pytest
import torch
from export_models import (
    EXPORTERS,
    KINDS,
    all_names,
    bare_export,
    images,
    large_net,
    plain_twin,
    plain_values,
    set_mode,
    small_net,
    trained,
)
from fingerprint import contents, same_bits
from onnx import numpy_helper
from torch import Tensor, nn

from sn_export import ExportReport, export_onnx

_ARITHMETIC = {"Div", "ReduceSum", "ReduceL2", "Sqrt", "Mul", "MatMul", "Reciprocal", "Transpose"}


@dataclass
class Exported:
    """A model, its report, its file, and the file that torch makes of the plain twin."""

    model: nn.Module
    report: ExportReport
    file: onnx.ModelProto
    bare: onnx.ModelProto
    content: bytes


def _export(
    folder: Path, build: Callable[[str], nn.Module], kind: str, exporter: str, mode: str, x: Tensor
) -> Exported:
    torch.manual_seed(1)
    model = set_mode(trained(build(kind), x), mode)
    report = export_onnx(model, (x,), folder / "net.onnx", exporter=exporter)
    twin = plain_twin(model, build)
    bare_export(twin, (x,), folder / "bare.onnx", exporter)
    file = onnx.load(folder / "net.onnx")
    bare = onnx.load(folder / "bare.onnx")
    return Exported(model, report, file, bare, (folder / "net.onnx").read_bytes())


@pytest.fixture(
    scope="module",
    params=[
        *[
            ("small", kind, exporter, mode)
            for kind in KINDS
            for exporter in EXPORTERS
            for mode in ("train", "eval")
        ],
        *[("large", kind, exporter, "train") for kind in KINDS for exporter in EXPORTERS],
    ],
    ids="-".join,
)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A network of one size and kind, exported from one mode."""
    size, kind, exporter, mode = request.param
    folder = tmp_path_factory.mktemp("graph")
    if size == "small":
        return _export(folder, small_net, kind, exporter, mode, images())
    return _export(folder, large_net, kind, exporter, mode, torch.randn(1, 512, 4, 4))


def test_operators_are_those_of_the_plain_network(exported: Exported) -> None:
    """The file has the operators of the plain twin's own export, in the same order."""
    operators = [node.op_type for node in exported.file.graph.node]
    assert operators == [node.op_type for node in exported.bare.graph.node]
    assert not _ARITHMETIC & set(operators)


def test_initializers_are_those_of_the_plain_network(exported: Exported) -> None:
    """The file has the initializers of the plain twin's own export: names, order and bytes."""
    ours = {i.name: numpy_helper.to_array(i) for i in exported.file.graph.initializer}
    bare = {i.name: numpy_helper.to_array(i) for i in exported.bare.graph.initializer}
    assert list(ours) == list(bare)
    assert [a.tobytes() for a in ours.values()] == [a.tobytes() for a in bare.values()]


def test_weights_are_the_evaluated_ones_bit_for_bit(exported: Exported) -> None:
    """Each initializer carries the plain name and the very bits that an eval forward uses."""
    ours = {i.name: numpy_helper.to_array(i) for i in exported.file.graph.initializer}
    values = plain_values(exported.model)
    assert values
    for name, value in values.items():
        assert ours[name].shape == tuple(value.shape)
        assert ours[name].tobytes() == contents(value)


def test_no_name_speaks_of_spectral_norm(exported: Exported) -> None:
    """No name in the graph and no byte of the file tells of u, v, the original or sigma."""
    suspicious = re.compile(r"_u$|_v$|_orig|original|parametriz|sigma|spectral", re.IGNORECASE)
    assert [name for name in all_names(exported.file.graph) if suspicious.search(name)] == []
    for word in (b"weight_u", b"weight_v", b"weight_orig", b"parametriz", b"spectral"):
        assert word not in exported.content


def test_report_lists_what_was_frozen(exported: Exported) -> None:
    """The report names each tensor under spectral norm as it was found, and the file made."""
    assert [info.name for info in exported.report.frozen] == list(plain_values(exported.model))
    assert exported.report.path.name == "net.onnx"
    assert exported.report.opset == exported.file.opset_import[0].version
    assert exported.report.parity.passed


def test_plain_network_without_spectral_norm(tmp_path: Path) -> None:
    """A network without spectral norm is exported and proved too, with nothing frozen."""
    report = export_onnx(small_net("plain"), images(), tmp_path / "net.onnx")
    assert report.frozen == ()
    assert report.parity.passed


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_both_kinds_in_one_network(tmp_path: Path, exporter: str) -> None:
    """Hook and parametrization may stand side by side; both names come out plain."""
    hook, parametrization = small_net("hook"), small_net("parametrization")
    model = nn.Sequential(*hook[:4], parametrization[4])
    export_onnx(model, (images(),), tmp_path / "net.onnx", exporter=exporter)
    names = {i.name for i in onnx.load(tmp_path / "net.onnx").graph.initializer}
    assert {"0.weight", "0.bias", "4.weight", "4.bias"} <= names


@pytest.mark.parametrize("exporter", EXPORTERS)
@pytest.mark.parametrize("kind", KINDS)
def test_root_module_under_spectral_norm(tmp_path: Path, kind: str, exporter: str) -> None:
    """A model that is itself the layer under spectral norm keeps the name ``weight``."""
    model = trained(small_net(kind)[4], torch.randn(2, 144))
    export_onnx(model, (torch.randn(2, 144),), tmp_path / "net.onnx", exporter=exporter)
    found = {i.name: i for i in onnx.load(tmp_path / "net.onnx").graph.initializer}
    array = numpy_helper.to_array(found["weight"])
    assert same_bits(torch.from_numpy(array.copy()), plain_values(model)["weight"])


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_opset_is_the_one_asked_for(tmp_path: Path, exporter: str) -> None:
    """``opset_version`` reaches the file and the report."""
    model = small_net("hook")[4]
    path = tmp_path / "net.onnx"
    report = export_onnx(model, (torch.randn(2, 144),), path, exporter=exporter, opset_version=18)
    assert report.opset == 18
    assert {"": 18}.items() <= {e.domain: e.version for e in onnx.load(path).opset_import}.items()


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_names_of_inputs_and_outputs(tmp_path: Path, exporter: str) -> None:
    """``input_names`` and ``output_names`` name the file's inputs and outputs, and the report's."""
    path = tmp_path / "net.onnx"
    report = export_onnx(
        small_net("hook"),
        images(),
        path,
        exporter=exporter,
        input_names=["picture"],
        output_names=["score"],
    )
    graph = onnx.load(path).graph
    assert ([i.name for i in graph.input], [o.name for o in graph.output]) == (
        ["picture"],
        ["score"],
    )
    assert [o.name for o in report.parity.outputs] == ["score"]


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_file_passes_the_full_check(tmp_path: Path, exporter: str) -> None:
    """The file passes the full check of `onnx.checker`."""
    path = tmp_path / "net.onnx"
    export_onnx(small_net("hook"), images(), path, exporter=exporter)
    onnx.checker.check_model(str(path), full_check=True)
