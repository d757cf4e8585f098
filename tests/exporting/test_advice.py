"""What an error of an export says is true: the cause, the line of the model, and what to try."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort
import pytest
import torch
from export_models import assert_as_before
from fingerprint import fingerprint
from torch import Tensor, nn
from torch.nn.utils import spectral_norm
from torch.torch_version import TorchVersion

from sn_export import ExportError, ParityError, SnExportError, check_parity, export_onnx
from sn_export.exporting.failures import explain_failure


def test_no_line_of_the_caller_is_named(tmp_path: Path) -> None:
    """Where a layer of torch's fails, no line of a file that only calls the exporter is told."""
    lengths = torch.full((4,), 50), torch.full((4,), 30)
    args = (torch.randn(50, 4, 20).log_softmax(2), torch.randint(1, 20, (4, 30)), *lengths)
    with pytest.raises(ExportError, match=r"in the forward \(CTCLoss\)") as caught:
        export_onnx(nn.CTCLoss(), args, tmp_path / "net.onnx", exporter="torchscript", samples=0)
    assert Path(__file__).name not in str(caught.value)


class Doubled(nn.Module):
    """Reads its weight by ``.data``, or by ``detach``."""

    def __init__(self, detached: bool = False) -> None:
        super().__init__()
        self.linear, self.detached = spectral_norm(nn.Linear(3, 3)), detached
        self.scale = nn.Parameter(torch.ones(3, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Return the output of the layer and that of another weight."""
        y: Tensor = self.linear(x)
        return y + x @ (self.scale.detach() if self.detached else self.scale.data * 2)


def test_a_forward_that_reads_data_does_not_end_the_process(tmp_path: Path) -> None:
    """Dynamo of torch crashes there, alone; it is refused with what works, and auto goes on."""
    x, path = torch.randn(2, 3), tmp_path / "net.onnx"
    with pytest.raises(ExportError, match=r"reads a tensor by \.data.* use \.detach") as caught:
        export_onnx(Doubled(), (x,), path, exporter="dynamo")
    assert "exporter='torchscript'" in str(caught.value)
    assert export_onnx(Doubled(detached=True), (x,), path, exporter="dynamo").parity.passed
    assert export_onnx(Doubled(), (x,), path).exporter == "torchscript"


class Noisy(nn.Module):
    """Adds noise of a scale that it is given."""

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        """Return the input with noise."""
        return x + scale * torch.randn_like(x)


def test_noise_of_scale_zero_is_proved_as_the_error_says(tmp_path: Path) -> None:
    """A model that draws random numbers is refused with what gets a proof, and that does."""
    x, path = torch.randn(2, 3), tmp_path / "net.onnx"
    with pytest.raises(ParityError, match="with 0 as its value in the example and samples=0"):
        export_onnx(Noisy(), (x, torch.tensor(1.0)), path)
    assert export_onnx(Noisy(), (x, torch.tensor(0.0)), path, samples=0).parity.passed


class Encoder(nn.Module):
    """A variational encoder, with noise by torch's functions, methods and distributions."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.scale = spectral_norm(nn.Linear(8, 4)), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Return a draw, of which the mean is left without noise."""
        mean, scale = self.mean(x), self.scale(x).exp()
        drawn = torch.distributions.Normal(mean, scale, validate_args=False)
        rows = x.shape[0]
        steps = torch.empty(rows, 4).normal_() * x.new_empty(rows, 1).uniform_(0, 1)
        noise = torch.randn_like(mean) + torch.randn(rows, 4) + torch.rand(4) + steps
        total: Tensor = mean + noise * scale + drawn.rsample() - drawn.sample()
        return nn.functional.dropout(total, 0.5, training=True)


class Speech(nn.Module):
    """The noise of VITS: random durations, and a prior with a scale of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.names, self.prior = nn.Embedding(9, 8), spectral_norm(nn.Conv1d(8, 16, 3, padding=1))
        self.out = nn.ConvTranspose1d(8, 1, 4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return a waveform."""
        hidden = self.names(x).transpose(1, 2)
        mean, logs = self.prior(hidden).chunk(2, 1)
        lengths = torch.randn(hidden.size(0), 2, hidden.size(2)).to(hidden) * 0.8
        z = mean + torch.randn_like(mean) * torch.exp(logs) * 0.667
        wave: Tensor = self.out(z * torch.sigmoid(lengths.sum(1, keepdim=True))).tanh()
        return wave


@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
@pytest.mark.parametrize(
    ("build", "x"),
    [(Encoder, torch.randn(2, 8)), (Speech, torch.randint(0, 9, (2, 7)))],
    ids=["vae", "vits"],
)
def test_a_file_without_the_noise(
    tmp_path: Path, build: type[nn.Module], x: Tensor, exporter: Any
) -> None:
    """It is proved at other sizes against the model without it; file and report say so."""
    model, path = build(), tmp_path / "net.onnx"
    before = fingerprint(model)
    report = export_onnx(
        model,
        (x,),
        path,
        exporter=exporter,
        draws="zeros",
        dynamic_shapes={"x": {0: torch.export.Dim("b", min=1, max=64)}},
    )
    assert_as_before(before, model)
    assert report.parity.notes[0].startswith("draws='zeros': every random number")
    file = onnx.load(path)
    assert {entry.key: entry.value for entry in file.metadata_props}["sn_export.draws"] == "zeros"
    assert not any("Random" in node.op_type for node in file.graph.node)
    assert check_parity(model, path, x, draws="zeros").passed
    assert not check_parity(model, path, x).passed
    if isinstance(model, Encoder):
        with torch.no_grad():
            (found,) = ort.InferenceSession(str(path)).run(None, {"x": x.numpy()})
            torch.testing.assert_close(torch.as_tensor(found), model.eval().mean(x))


class Indexed(nn.Module):
    """Draws whole numbers."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the input and a number."""
        return x + torch.randint(0, 1000, x.shape)


def test_draws_that_stay_random_are_said(tmp_path: Path) -> None:
    """No file is made of a model that still draws, nor with another word for the draws."""
    with pytest.raises(ParityError, match="draws what draws='zeros' does not replace"):
        export_onnx(Indexed(), torch.randn(2, 3), tmp_path / "net.onnx", draws="zeros")
    with pytest.raises(ValueError, match="draws must be None or 'zeros', got 'ones'"):
        export_onnx(Indexed(), torch.randn(2, 3), tmp_path / "net.onnx", draws="ones")  # type: ignore[arg-type]


class Failing(nn.Module):
    """A layer under spectral norm, before something that no exporter takes."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = spectral_norm(nn.Linear(16, 16))
        self.seen: list[str] = []


class Unsupported(Failing):
    """An operator that ONNX lacks."""

    def forward(self, x: Tensor) -> Tensor:
        """Return Bessel functions."""
        return torch.special.bessel_j0(self.layer(x))  # fails


class Complex(Failing):
    """Complex numbers."""

    def forward(self, x: Tensor) -> Tensor:
        """Return magnitudes."""
        y = self.layer(x)
        return torch.fft.ifft2(torch.fft.fft2(y) * torch.exp(1j * y)).abs()  # fails


class Deciding(Failing):
    """Control flow by values, so that what tracing made differs."""

    def forward(self, x: Tensor) -> Tensor:
        """Return some rows."""
        y = self.layer(x)
        count = int(y.abs().sum().item() * 7)  # fails
        return y.repeat(count % 5 + 1, 1) if count > 2 else y


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        """Return singular values."""
        return torch.linalg.svdvals(y)  # fails


class Custom(Failing):
    """A function with a derivative of its own."""

    def forward(self, x: Tensor) -> Tensor:
        """Return singular values."""
        return _Function.apply(self.layer(x))  # type: ignore[no-any-return,no-untyped-call]


class Noting(Failing):
    """A side effect in Python."""

    def forward(self, x: Tensor) -> Tensor:
        """Return Bessel functions, after a note."""
        self.seen.append(str(x.shape))
        return torch.special.i0(self.layer(x))  # fails


@pytest.mark.parametrize(
    ("kind", "advice"),
    [
        (Unsupported, "write that operator with others that ONNX has"),
        (Complex, "ONNX has no complex numbers"),
        (Deciding, "torch.where or torch.cond"),
        (Custom, "write that operator with others that ONNX has"),
        (Noting, "write that operator with others that ONNX has"),
    ],
)
def test_the_more_telling_cause_comes_first(
    tmp_path: Path, kind: type[Failing], advice: str
) -> None:
    """The first line names the user's line and what to try, which is said once, in no circle."""
    with warnings.catch_warnings(), pytest.raises(SnExportError) as caught:
        warnings.simplefilter("ignore")  # of torch's tracing
        export_onnx(kind(), (torch.randn(4, 16),), tmp_path / "net.onnx")
    text = str(caught.value)
    first, *others = text.split("\n")
    assert f"at {__file__}:" in first and first.partition(". What to try")[0].endswith("# fails")
    assert text.count(advice) == 1 and advice in first
    assert others and "exporter=" not in text and "/" + tmp_path.name not in "".join(others)


@pytest.mark.parametrize(
    ("kind", "exporter", "following"),
    [
        (Unsupported, "dynamo", ["torchscript", "auto"]),
        (Complex, "dynamo", []),  # the other takes less of them
        (Complex, "torchscript", ["auto"]),
    ],
)
def test_advice_comes_to_an_end(
    tmp_path: Path, kind: type[Failing], exporter: Any, following: list[str]
) -> None:
    """An exporter alone advises the other where that may do, that one both, and both none."""
    advised = []
    while exporter:
        with pytest.raises(SnExportError) as caught:
            export_onnx(kind(), (torch.randn(4, 16),), tmp_path / "net.onnx", exporter=exporter)
        text = str(caught.value)
        assert ("ONNX has no complex numbers" in text) == (kind is Complex)
        exporter = text.partition("try exporter='")[2].rstrip("'")
        advised.append(exporter)
    assert advised == [*following, ""]


@pytest.mark.parametrize(
    ("text", "since"),
    [("'tuple' object has no attribute 'dtype'", "2.9"), ("Node arity mismatch", "2.13")],
)
def test_what_a_newer_torch_can_is_said_to_an_older_one(
    monkeypatch: pytest.MonkeyPatch, text: str, since: str
) -> None:
    """The advice names the version; whoever has it is not told. Older ones are not installed."""
    error, model = AttributeError(text), nn.Linear(1, 1)
    for installed, told in (("2.6.0", [True]), (since, [])):
        monkeypatch.setattr(torch, "__version__", TorchVersion(installed))
        advice = explain_failure(error, model, None, None, ()).advice
        assert [f"use torch {since} or newer" in one for one in advice] == told
