"""Samples of pictures and sound: from the outputs of a proof to the page."""

from __future__ import annotations

import base64
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from report_contents import content, output
from torch import Tensor, nn

from sn_export import export_onnx
from sn_export.proving.output_errors import RunningErrors
from sn_export.reporting import to_html
from sn_export.results import Picture


class Seen(nn.Module):
    """Returns pictures, sound, and an output that is neither."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3 * 16 * 12)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = torch.sigmoid(self.layer(x))
        sound = y.flatten(1)[:, None] - 0.5
        return {
            "rgb": y.view(-1, 3, 16, 12),
            "wave": sound,
            "rows": y,
            "small": y.view(-1, 1, 1, 576),
        }


def pixels_of(picture: Picture, which: str) -> NDArray[Any]:
    """Return the bytes of a picture, shape (height, width, channels)."""
    channels = 1 if which == "difference" else picture.channels
    content = base64.b64decode(getattr(picture, which))
    return np.frombuffer(content, np.uint8).reshape(picture.height, picture.width, channels)


def shown(expected: Tensor, got: Tensor) -> tuple[Picture, ...]:
    """Return the pictures of one output of one input set."""
    errors = RunningErrors("y", None, None)
    errors.is_shown = True
    errors.add("example", expected, got)
    return errors.make_result().pictures


def test_what_looks_like_it_is_shown(tmp_path: Path) -> None:
    """Pictures and sound are found or named; they are in JSON and page, and not in printed text."""
    x = torch.randn(2, 3)
    report = export_onnx(Seen(), (x,), tmp_path / "net.onnx", exporter="torchscript")
    kinds = [[picture.kind for picture in one.pictures] for one in report.parity.outputs]
    assert kinds == [["picture"] * 4, ["sound"] * 4, [], []]
    first = report.parity.outputs[0].pictures[0]
    assert (first.low, first.high) == (0, 1)
    page = to_html(report)
    assert page.count("data:image/png;base64,") == 12
    assert first.model[:40] in report.to_json() and first.model[:40] not in repr(report)


def test_the_bytes_are_those_of_the_output() -> None:
    """White is the upper end of the range, and in the difference the largest error."""
    wanted = torch.zeros(1, 3, 2, 2)
    wanted[0, 0, 0, 1], wanted[0, 2, 1, 0] = 1.0, 0.5
    got = wanted.clone()
    got[0, 1, 1, 1] += 1e-6
    (picture,) = shown(wanted, got)
    assert pixels_of(picture, "model").tolist() == [
        [[0, 0, 0], [255, 0, 0]],
        [[0, 0, 128], [0, 0, 0]],
    ]
    assert pixels_of(picture, "difference")[..., 0].tolist() == [[0, 0], [0, 255]]
    assert picture.largest == pytest.approx(1e-6)


@pytest.mark.parametrize("place", [0, 777, 999])
def test_no_error_is_lost_in_a_large_output(place: int) -> None:
    """One wrong pixel, or one wrong number of a sound, shows also where the sample is reduced."""
    picture, sound = torch.rand(1, 1, 1000, 1000), torch.randn(1, 1, 100_000)
    for wanted, at in ((picture, (0, 0, place, place)), (sound, (0, 0, 100 * place))):
        got = wanted.clone()
        got[at] += 3.0
        (found,) = shown(wanted, got)
        assert pixels_of(found, "difference").max() == 255
        assert len(found.model) <= 70_000


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("shape", [(1, 1, 9, 9), (1, 1, 99)])
def test_no_numbers(value: float, shape: tuple[int, ...]) -> None:
    """NaN and infinities in model or file are shown as an error, and no error as none."""
    wanted = torch.rand(shape)
    broken = wanted.clone()
    broken.view(-1)[4] = value
    for left, right in ((wanted, broken), (broken, wanted), (torch.full(shape, value), wanted)):
        (picture,) = shown(left, right)
        assert pixels_of(picture, "difference").max() == 255
        assert "NaN" in (page := to_html(page_content(picture))) or "∞" in page
    (picture,) = shown(wanted, wanted)
    assert pixels_of(picture, "difference").max() == 0


def test_the_worst_sample_is_shown() -> None:
    """If a sample past the first ones fails, it is shown instead of the last of them."""
    wanted = torch.rand(9, 1, 8, 8)
    got = wanted.clone()
    got[7] += 1
    assert [picture.sample for picture in shown(wanted, got)][
        -1
    ] == "example, number 8 of the batch"


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (["rows"], ValueError, r"'rows', of shape \[2, 576\]"),
        (["other"], ValueError, "'other', the file has"),
        ("rgb", TypeError, "sequence of names"),
    ],
)
def test_images_that_cannot_be(tmp_path: Path, images: Any, error: Any, message: str) -> None:
    """--images that names no output, no picture or is no list is refused before the export."""
    with pytest.raises(error, match=message):
        export_onnx(Seen(), (torch.randn(2, 3),), tmp_path / "net.onnx", images=images)
    assert not list(tmp_path.iterdir())


def page_content(picture: Picture, **changes: Any) -> dict[str, Any]:
    """Return the content of a report with one picture."""
    entry = {name: getattr(picture, name) for name in picture.__dataclass_fields__}
    found = content()
    found["parity"]["outputs"] = [output(pictures=[{**entry, **changes}])]
    return found


@pytest.mark.parametrize(
    "changes",
    [
        {"model": "AAAA"},
        {"file": '"><script>alert(1)</script>'},
        {"width": 10**9},
        {"channels": 2},
        {"height": 0},
    ],
)
def test_bytes_that_are_none(changes: dict[str, Any]) -> None:
    """A report with a picture whose bytes do not suit its size is refused."""
    (picture,) = shown(torch.rand(1, 1, 8, 8), torch.rand(1, 1, 8, 8))
    assert re.search("<img", to_html(page_content(picture)))
    with pytest.raises(ValueError, match="not the content of a report"):
        to_html(page_content(picture, **changes))
