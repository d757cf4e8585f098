"""What a file declares of its outputs is what was seen, and onnx's inference is no proof."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from export_models import EXPORTERS, file_of
from onnx import helper
from torch import Tensor, nn

from sn_export import export_onnx
from sn_export.errors import ExportError
from sn_export.proving.declared_sizes import correct_declared_sizes
from sn_export.running import InputSet, Reference


def declared_sizes(path: Path) -> list[int | str]:
    """Return the sizes that a file declares of its output."""
    dims = onnx.load(path).graph.output[0].type.tensor_type.shape.dim
    return [dim.dim_param or dim.dim_value for dim in dims]


@pytest.mark.parametrize("exporter", EXPORTERS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_average_pool_with_ceil_mode(tmp_path: Path, exporter: Any, dynamic: bool) -> None:
    """Torch and onnxruntime agree on 11 elements, where onnx infers 12: the file says 11."""
    model, x = nn.AvgPool2d(3, 3, padding=1, ceil_mode=True), torch.randn(2, 1, 32, 32)
    shapes = ({0: torch.export.Dim("b", min=1, max=8)},) if dynamic else None
    path = tmp_path / "net.onnx"
    report = export_onnx(model, (x,), path, exporter=exporter, dynamic_shapes=shapes)
    assert declared_sizes(path) == ["b" if dynamic else 2, 1, 11, 11]
    assert any("11" in note for note in report.parity.notes)


def declaring(path: Path) -> Path:
    """Write a file that declares its output as [2, 6]."""
    file_of(path, [helper.make_node("Relu", ["x"], ["y"])], ("x",))
    file = onnx.load(path)
    file.graph.output[0].type.tensor_type.ClearField("shape")
    for size in (2, 6):
        file.graph.output[0].type.tensor_type.shape.dim.add(dim_value=size)
    onnx.save(file, path)
    return path


def seen(*sizes: int) -> list[Reference]:
    """Return references with outputs of two rows and so many columns."""
    return [Reference(InputSet((), {}, f"t={n}"), (torch.zeros(2, n),)) for n in sizes]


@pytest.mark.parametrize(("size", "notes"), [(6, 0), (9, 1)])
def test_a_size_that_was_always_another_is_corrected(tmp_path: Path, size: int, notes: int) -> None:
    """A file that says what was seen stays as it is."""
    path = declaring(tmp_path / "net.onnx")
    assert len(correct_declared_sizes(path, seen(size, size))) == notes
    assert declared_sizes(path) == [2, size]


def test_a_size_that_varies_and_is_declared_fixed(tmp_path: Path) -> None:
    """Both sizes are told, and the file leaves that dimension open if no exporter is left."""
    path = declaring(tmp_path / "net.onnx")
    with pytest.raises(ExportError, match="dimension 1 of the output 'y' at 6, and it is 9"):
        correct_declared_sizes(path, seen(6, 9), leaves_open=False)
    (note,) = correct_declared_sizes(path, seen(6, 9))
    assert "dimension 1 of the output 'y' at 6, and it is 9 for t=9: it is left open" in note
    first, second = onnx.load(path).graph.output[0].type.tensor_type.shape.dim
    assert first.dim_value == 2 and second.WhichOneof("value") is None


class Counted(nn.Module):
    """Returns as many columns as the input has rows, which the exporter takes for fixed."""

    def forward(self, x: Tensor) -> Tensor:
        """Return row numbers."""
        steps = torch.arange(x.shape[0], device=x.device)
        return torch.relu(steps.to(x.dtype) + x.mean())


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_sizes_of_outputs_that_follow_the_input(tmp_path: Path, exporter: Any) -> None:
    """Whatever the exporter declares, the file is proved at other sizes and says no wrong one."""
    path, dims = tmp_path / "net.onnx", {"x": {0: torch.export.Dim("rows")}}
    export_onnx(Counted(), (torch.randn(5, 3),), path, exporter=exporter, dynamic_shapes=dims)
    assert declared_sizes(path) != [5]


@pytest.mark.parametrize("declared", [None, [[2, 6]]])
def test_a_rank_that_is_another(tmp_path: Path, declared: Any) -> None:
    """The file has the number of dimensions that was seen, and leaves open which varies."""
    path = declaring(tmp_path / "net.onnx")
    outputs = [torch.zeros(1, 2, n) for n in (3, 4)]
    references = [Reference(InputSet((), {}, str(i)), (y,)) for i, y in enumerate(outputs)]
    notes = correct_declared_sizes(path, references, declared, leaves_open=False)
    assert notes == (
        "the exporter has given the output 'y' 2 dimensions, and it has 3: it says so now",
    )
    assert declared_sizes(path) == [1, 2, 0]
