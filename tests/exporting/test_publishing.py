"""A file appears only when it is proved, whole, and always the same."""

from __future__ import annotations

import errno
import math
import os
import resource
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from export_models import (
    EXPORTERS,
    KINDS,
    Head,
    Liar,
    NotANumber,
    Raising,
    Unsupported,
    contents_of,
    images,
    rows,
    run_file,
    small_net,
)
from safetensors.torch import save_file
from torch import nn

from sn_export import ExportError, ParityError, SnExportError, export_onnx
from sn_export.exporting import onnx_file
from sn_export.files import TEXT_FORMATS
from sn_export.proving import save

EARLIER = onnx.ModelProto(ir_version=8, producer_name="an earlier file").SerializeToString()


@pytest.mark.parametrize("network", [Liar, NotANumber, Unsupported, Raising])
@pytest.mark.parametrize("exporter", EXPORTERS)
def test_failure_leaves_the_folder(tmp_path: Path, exporter: str, network: type[Head]) -> None:
    """On failure what was at the target is there, byte for byte, and nothing else."""
    (tmp_path / "net.onnx").write_bytes(EARLIER)
    (tmp_path / "net.onnx.data").write_bytes(b"its weights")
    before = contents_of(tmp_path)
    with pytest.raises(SnExportError):
        export_onnx(network(), rows(), tmp_path / "net.onnx", exporter=exporter, external_data=True)
    assert contents_of(tmp_path) == before


@pytest.mark.parametrize("network", [Liar, NotANumber])
@pytest.mark.parametrize("exporter", EXPORTERS)
def test_parity_error_carries_the_report(
    tmp_path: Path, exporter: str, network: type[Head]
) -> None:
    """A ParityError says what differs and carries the measured report; no file is written."""
    with pytest.raises(ParityError, match="does not reproduce the model") as caught:
        export_onnx(network(), rows(), tmp_path / "net.onnx", exporter=exporter)
    (output,) = caught.value.report.outputs
    assert not caught.value.report.passed
    assert caught.value.report.samples == 4
    assert output.reason
    if network is Liar:
        assert output.max_abs == pytest.approx(0.5, abs=1e-5)
    else:
        assert "NaN" in output.reason
    assert contents_of(tmp_path) == {}


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_one_changed_bit_of_a_weight_is_found(
    tmp_path: Path, exporter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file whose weight differs in one high bit of one element is not published."""
    real = torch.onnx.export

    def export(model: nn.Module, *args: object, **kwargs: object) -> object:
        with torch.no_grad():
            model.get_parameter("layer.bias")[1] += 0.25
        return real(model, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.onnx, "export", export)
    with pytest.raises(ParityError) as caught:
        export_onnx(Head(), rows(), tmp_path / "net.onnx", exporter=exporter)
    assert caught.value.report.outputs[0].worst_index[-1] == 1
    assert contents_of(tmp_path) == {}


def test_tolerance_decides(tmp_path: Path) -> None:
    """``rtol`` and ``atol`` reach the comparison: a difference of 0.5 passes with atol 1."""
    report = export_onnx(Liar(), rows(), tmp_path / "net.onnx", exporter="torchscript", atol=1.0)
    assert report.parity.outputs[0].atol == 1.0
    with pytest.raises(ParityError):
        export_onnx(
            Liar(), rows(), tmp_path / "no.onnx", exporter="torchscript", atol=0.1, rtol=0.0
        )
    assert list(contents_of(tmp_path)) == ["net.onnx"]


@pytest.mark.parametrize("exporter", EXPORTERS)
@pytest.mark.parametrize("external", [True, False, "auto"])
def test_external_data(tmp_path: Path, exporter: str, external: bool) -> None:
    """Weights go to one side file where asked for, else the file stands alone; both run."""
    model = small_net("hook")
    path = tmp_path / "net.onnx"
    export_onnx(model, images(), path, exporter=exporter, external_data=external)
    names = ["net.onnx", "net.onnx.data"] if external is True else ["net.onnx"]
    assert sorted(contents_of(tmp_path)) == names
    graph = onnx.load(path, load_external_data=False).graph
    weight = next(i for i in graph.initializer if i.name == "4.weight")
    assert (weight.data_location == onnx.TensorProto.EXTERNAL) is (external is True)
    expected = model.eval()(images()).detach()
    torch.testing.assert_close(torch.from_numpy(run_file(path, images())[0]), expected)


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_both_files_move_together(tmp_path: Path, exporter: str) -> None:
    """A file and its side file can be read after both were moved to another folder."""
    export_onnx(
        small_net("hook"), images(), tmp_path / "net.onnx", exporter=exporter, external_data=True
    )
    (tmp_path / "moved").mkdir()
    for name in ("net.onnx", "net.onnx.data"):
        (tmp_path / name).rename(tmp_path / "moved" / name)
    assert run_file(tmp_path / "moved" / "net.onnx", images())[0].shape == (2, 3)


def test_side_file_that_nothing_reads_any_more_goes(tmp_path: Path) -> None:
    """A file that stands alone leaves no side file of the one that it replaces, others stay."""
    path = tmp_path / "net.onnx"
    export_onnx(small_net("hook"), images(), path, exporter="torchscript", external_data=True)
    export_onnx(small_net("hook"), images(), path, exporter="torchscript", external_data=False)
    assert sorted(contents_of(tmp_path)) == ["net.onnx"]
    (tmp_path / "net.onnx.data").write_text("somebody's own")
    export_onnx(small_net("hook"), images(), path, exporter="torchscript", external_data=False)
    assert contents_of(tmp_path)["net.onnx.data"] == b"somebody's own"


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_no_empty_side_file(tmp_path: Path, exporter: str) -> None:
    """Weights that are all too small for one leave none, and take an earlier one's with them."""
    path = tmp_path / "net.onnx"
    export_onnx(small_net("hook"), images(), path, exporter=exporter, external_data=True)
    assert sorted(contents_of(tmp_path)) == ["net.onnx", "net.onnx.data"]
    report = export_onnx(Head(), rows(), path, exporter=exporter, external_data=True)
    assert report.parity.passed
    assert sorted(contents_of(tmp_path)) == ["net.onnx"]


def test_past_the_limit_of_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that pass a single file's limit go to a side file, or are refused if forbidden."""
    monkeypatch.setattr(onnx_file, "_INLINE_LIMIT", 100)
    path = tmp_path / "net.onnx"
    with pytest.raises(ExportError, match="pass external_data='auto' or True"):
        export_onnx(small_net("hook"), images(), path, exporter="torchscript", external_data=False)
    assert contents_of(tmp_path) == {}
    export_onnx(small_net("hook"), images(), path, exporter="torchscript")
    assert sorted(contents_of(tmp_path)) == ["net.onnx", "net.onnx.data"]


@pytest.mark.parametrize("shape", [(), (0,), (3,), (300,), (30, 11)])
@pytest.mark.parametrize(
    "dtype", ["FLOAT", "DOUBLE", "FLOAT16", "BFLOAT16", "INT64", "BOOL", "INT4", "STRING"]
)
def test_written_as_protobuf_writes_it(tmp_path: Path, dtype: str, shape: tuple[int, ...]) -> None:
    """A file has, field for field, what protobuf would write, with weights of any dtype.

    The function that writes files is called inside, since torch makes few of these dtypes.
    """
    kind = ir.DataType[dtype]
    content = np.arange(math.prod(shape)).reshape(shape) % 2
    values = []
    for name in "wv":
        weight: ir.TensorProtocol = (
            ir.StringTensor([b"x"] * content.size, shape=ir.Shape(shape), name=name)
            if dtype == "STRING"
            else ir.Tensor(content.astype(kind.numpy()), dtype=kind, name=name)
        )
        made = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(kind))
        made.const_value = weight
        values.append(made)
    node = ir.node("Identity", [values[0]], name="n")
    graph = ir.Graph([], node.outputs, nodes=[node], initializers=values, opset_imports={"": 21})
    model = ir.Model(graph, ir_version=10)
    model.metadata_props["key"] = "value"
    save(model, tmp_path / "net.onnx", outside=False)
    assert onnx.load(tmp_path / "net.onnx") == ir.to_proto(model)


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_large_weights_start_at_a_page(tmp_path: Path, exporter: str) -> None:
    """Of any length that stands before them in the side file, so that it can be mapped."""
    model = nn.Sequential(
        nn.Linear(1001, 300), nn.Tanh(), nn.utils.spectral_norm(nn.Linear(300, 901))
    )
    path = tmp_path / "net.onnx"
    export_onnx(model, (rows(1001),), path, exporter=exporter, external_data=True)
    offsets = [
        int(place["offset"])
        for tensor in onnx.load(path, load_external_data=False).graph.initializer
        if (place := {entry.key: entry.value for entry in tensor.external_data})
        and int(place["length"]) > 2**20
    ]
    assert len(offsets) == 2
    assert all(offset % 4096 == 0 for offset in offsets)


@pytest.mark.parametrize("earlier", [True, False])
@pytest.mark.parametrize("fails_at", [1, 2])
def test_failing_rename_rolls_both_files_back(
    tmp_path: Path, fails_at: int, earlier: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If one of two files cannot be moved into place, both places are as before."""
    if earlier:
        (tmp_path / "net.onnx").write_bytes(EARLIER)
        (tmp_path / "net.onnx.data").write_bytes(b"its weights")
    before = contents_of(tmp_path)
    real, calls = os.replace, []

    def replace(source: str, destination: str) -> None:
        if Path(destination).parent == tmp_path:  # onnx-ir moves its own files in the workspace
            calls.append(destination)
            if len(calls) == fails_at:
                raise OSError(errno.ENOSPC, "No space left on device")
        real(source, destination)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(ExportError) as caught:
        export_onnx(
            small_net("hook"),
            images(),
            tmp_path / "net.onnx",
            exporter="torchscript",
            external_data=True,
        )
    assert str(caught.value) == f"cannot write '{tmp_path / 'net.onnx'}': No space left on device"
    assert len(calls) >= fails_at
    assert contents_of(tmp_path) == before


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_earlier_file_is_replaced(tmp_path: Path, exporter: str) -> None:
    """A proved file takes the place of an earlier one, and nothing else is in the folder."""
    path = tmp_path / "net.onnx"
    path.write_bytes(EARLIER)
    export_onnx(Head(), rows(), path, exporter=exporter)
    assert list(contents_of(tmp_path)) == ["net.onnx"]
    onnx.checker.check_model(str(path), full_check=True)


@pytest.mark.parametrize("external", [True, False])
@pytest.mark.parametrize("exporter", [*EXPORTERS, "auto"])
def test_full_disk(tmp_path: Path, exporter: str, external: bool) -> None:
    """The disk is said to be full, no other exporter is recommended, the old file stays."""
    path = tmp_path / "net.onnx"
    path.write_bytes(EARLIER)
    before = contents_of(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(ExportError) as caught:
            export_onnx(Head(), rows(), path, exporter=exporter, external_data=external)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(caught.value) == f"cannot write '{path}': File too large"
    assert contents_of(tmp_path) == before


def _checkpoint(path: Path, suffix: str) -> Path:
    state = {"w" * 40: torch.ones(3)}
    if suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    return path


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("name", ["net.onnx", "net", "net.model"])
def test_what_is_no_onnx_file_is_not_replaced(tmp_path: Path, name: str, suffix: str) -> None:
    """A checkpoint stays, byte for byte, unless it is to be overwritten."""
    path = _checkpoint(tmp_path / name, suffix)
    before = contents_of(tmp_path)
    with pytest.raises(FileExistsError, match=r"is no ONNX file; pass overwrite=True to write it"):
        export_onnx(Head(), rows(), path, exporter="torchscript")
    assert contents_of(tmp_path) == before
    export_onnx(Head(), rows(), path, exporter="torchscript", overwrite=True)
    onnx.checker.check_model(onnx.load(path))


@pytest.mark.parametrize("name", ["ck.pt", "ck.PTH", "net.safetensors", "a.npz"])
def test_suffixes_of_other_formats(tmp_path: Path, name: str) -> None:
    """An ONNX file with the name of another format is written where it is wanted alone."""
    with pytest.raises(ValueError, match="suffix of another format; pass overwrite=True"):
        export_onnx(Head(), rows(), tmp_path / name, exporter="torchscript")
    assert not list(tmp_path.iterdir())
    export_onnx(Head(), rows(), tmp_path / name, exporter="torchscript", overwrite=True)


def test_suffixes_of_other_formats_are_known(tmp_path: Path) -> None:
    """Those of checkpoints, arrays, reports and other formats of models are refused."""
    known = "bin ckpt h5 pkl pt pt2 pth safetensors npy npz html md ort py tflite txt zip"
    for suffix in known.split():
        with pytest.raises(ValueError, match=f"and .{suffix} is the suffix of another format"):
            export_onnx(Raising(), rows(), tmp_path / f"a.{suffix}")


@pytest.mark.parametrize("external", [True, False])
def test_place_of_external_data_where_no_file_can_be(tmp_path: Path, external: bool) -> None:
    """It is refused before the model runs, also where the weights would fit into the file."""
    (tmp_path / "net.onnx.data").mkdir()
    with pytest.raises(IsADirectoryError) as caught:
        export_onnx(Raising(), rows(), tmp_path / "net.onnx", external_data=external)
    assert str(caught.value) == f"cannot write '{tmp_path / 'net.onnx.data'}': it is a folder"


def test_suffixes_that_onnx_writes_text_to(tmp_path: Path) -> None:
    """They are refused even with overwrite; the list is that of the installed onnx."""
    known = onnx.serialization.registry._extension_to_format.items()  # no public list of them
    assert {suffix for suffix, kind in known if kind != "protobuf"} == set(TEXT_FORMATS)
    for suffix in TEXT_FORMATS:
        with pytest.raises(ValueError, match=r"onnx writes text to .* let it end in \.onnx"):
            export_onnx(Raising(), rows(), tmp_path / f"net{suffix}", overwrite=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("length", [240, 241, 246, 250, 251, 255])
@pytest.mark.parametrize("external", [True, "auto"])
def test_long_names(tmp_path: Path, external: bool, length: int) -> None:
    """A name with no room for those that are made from it is refused before the model runs."""
    path = tmp_path / ("n" * (length - 5) + ".onnx")
    fits = length <= 240 if external is True else length <= 250
    if fits:
        export_onnx(
            small_net("hook"), images(), path, exporter="torchscript", external_data=external
        )
        assert path.name in contents_of(tmp_path)
        return
    with pytest.raises(OSError, match=r"^cannot write .*: File name too long") as caught:
        export_onnx(Raising(), rows(), path, external_data=external)
    if length <= 250:
        assert "names that are 15 bytes longer are needed while its" in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["empty", "another order of fields"])
def test_onnx_files_of_any_form_are_replaced(tmp_path: Path, kind: str) -> None:
    """A new empty file is a place for one; protobuf may have its fields in any order."""
    path = tmp_path / "net.onnx"
    model = onnx.ModelProto(ir_version=8).SerializeToString()
    graph = onnx.ModelProto(graph=onnx.GraphProto(name="g")).SerializeToString()
    path.write_bytes(b"" if kind == "empty" else graph + model)
    export_onnx(Head(), rows(), path, exporter="torchscript")


def test_target_may_be_a_string(tmp_path: Path) -> None:
    """The path may be a string; the report gives it as a Path."""
    path = str(tmp_path / "net.onnx")
    assert export_onnx(Head(), rows(), path, exporter="torchscript").path == Path(path)


def test_relative_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bare file name is written to the current folder."""
    monkeypatch.chdir(tmp_path)
    export_onnx(small_net("hook"), images(), "net.onnx", exporter="torchscript", external_data=True)
    assert sorted(contents_of(tmp_path)) == ["net.onnx", "net.onnx.data"]


def test_absent_folder(tmp_path: Path) -> None:
    """A folder that does not exist is named before anything runs."""
    path = tmp_path / "absent" / "net.onnx"
    with pytest.raises(FileNotFoundError) as caught:
        export_onnx(Raising(), rows(), path)
    assert str(caught.value) == f"cannot write '{path}': no folder '{tmp_path / 'absent'}'"


def test_target_that_is_a_folder(tmp_path: Path) -> None:
    """A target that is a folder is refused before anything runs."""
    with pytest.raises(IsADirectoryError) as caught:
        export_onnx(Raising(), rows(), tmp_path)
    assert str(caught.value) == f"cannot write '{tmp_path}': it is a folder"


@pytest.mark.parametrize("external", [True, False])
@pytest.mark.parametrize("exporter", EXPORTERS)
@pytest.mark.parametrize("kind", KINDS)
def test_same_bytes_every_time(tmp_path: Path, kind: str, exporter: str, external: bool) -> None:
    """Twice, from two folders, for two instances with equal weights: the same bytes."""
    torch.manual_seed(4)
    model, other = small_net(kind), small_net(kind)
    other.load_state_dict(model.state_dict())
    written = []
    for number, one in enumerate((model, model, other)):
        folder = tmp_path / f"folder {number}"
        folder.mkdir()
        export_onnx(
            one, images(number), folder / "net.onnx", exporter=exporter, external_data=external
        )
        written.append(contents_of(folder))
    assert written[0] == written[1] == written[2]


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_nothing_of_the_machine_in_the_file(tmp_path: Path, exporter: str) -> None:
    """No path, stack trace or home folder is in the bytes, nor in any documentation string."""
    path = tmp_path / "net.onnx"
    export_onnx(nn.Sequential(Head("hook"), Head()), rows(), path, exporter=exporter)
    content = path.read_bytes()
    for text in (
        str(tmp_path),
        str(Path.cwd()),
        str(Path.home()) + os.sep,
        sys.prefix,
        __file__,
        "site-packages",
        "dist-packages",
        ".py",
        "File ",
        ", line ",
        "stack_trace",
        "Traceback",
    ):
        assert text.encode() not in content, text
    graph = onnx.load(path).graph
    assert {graph.doc_string, *(node.doc_string for node in graph.node)} == {""}


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_file_that_the_checker_finds_fault_with(
    tmp_path: Path, exporter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not published, though onnxruntime would run it.

    The checker is replaced, since no exporter is known to write such a file.
    """

    def check(path: str, full_check: bool = False) -> None:
        raise onnx.checker.ValidationError("an attribute is missing")

    monkeypatch.setattr(onnx.checker, "check_model", check)
    with pytest.raises(ExportError, match="is not valid ONNX: an attribute is missing"):
        export_onnx(Head(), rows(), tmp_path / "net.onnx", exporter=exporter)
    assert contents_of(tmp_path) == {}
