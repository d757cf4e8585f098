"""``exporter="auto"``, and what is said when an exporter fails.

`explain_failure` is called inside, for errors that torch raises for no network of this size.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from export_models import EXPORTERS, FRAMES, Head, Liar, assert_as_before, contents_of, rows
from fingerprint import fingerprint
from torch import Tensor, nn

from sn_export import (
    ExportError,
    ParityError,
    ReparametrizationNotRecognisedWarning,
    SnExportError,
    TracedDecisionWarning,
    export_onnx,
)
from sn_export.exporting.failures import describe_failures, explain_failure
from sn_export.text import strip_frames


class Branching(nn.Module):
    """Decides by a value, which torch.export does not take; all rows here decide alike."""

    def forward(self, y: Tensor) -> Tensor:
        if y.sum() > -1e6:  # the line that fails
            return y
        return -y


class Deep(Head):
    """Has the branch two modules down."""

    def prepare(self) -> None:
        self.body = nn.Sequential(nn.Identity(), Branching())

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(self.layer(x))
        return y


class Singular(Head):
    """Uses an operator that neither exporter knows."""

    def prepare(self) -> None:
        self.end = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.end(torch.linalg.eigvals(self.layer(x)).real)
        return y


def test_the_dynamo_exporter_comes_first(tmp_path: Path) -> None:
    """What it can do, it does; nothing else is tried."""
    report = export_onnx(Head(), rows(), tmp_path / "net.onnx")
    assert (report.exporter, report.attempts) == ("dynamo", ())
    assert report.metadata["sn_export.exporter"] == "dynamo"


@pytest.mark.parametrize("training", [True, False])
def test_the_other_where_it_cannot_export(tmp_path: Path, training: bool) -> None:
    """The report says which exporter made the file and why the other did not; a warning, where."""
    model = Deep().train(training)
    before = fingerprint(model)
    with pytest.warns(TracedDecisionWarning, match="the line that fails") as noted:
        report = export_onnx(model, rows(), tmp_path / "net.onnx", metadata={"a": "b"})
    assert [warning.filename for warning in noted] == [__file__]
    assert "(in 'body.1' (Branching); at " in str(noted[0].message)
    assert "proved for 4 input sets alone" in str(noted[0].message)
    assert_as_before(before, model)
    assert report.exporter == "torchscript"
    assert report.metadata["sn_export.exporter"] == "torchscript"
    (attempt,) = report.attempts
    assert attempt.exporter == "dynamo"
    assert "the dynamo exporter cannot export Deep" in attempt.error
    assert json.loads(report.to_json())["attempts"] == [
        {"exporter": "dynamo", "error": attempt.error}
    ]
    assert sorted(contents_of(tmp_path)) == ["net.onnx"]


class Lying(Head):
    """Computes something else while the dynamo exporter looks."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y + 0.5 if torch.compiler.is_compiling() else y


def test_the_other_where_the_file_does_not_prove(tmp_path: Path) -> None:
    """A file that differs from the model is not published, the other exporter's is."""
    report = export_onnx(Lying(), rows(), tmp_path / "net.onnx", save_case=tmp_path / "net.npz")
    assert report.exporter == "torchscript"
    assert "the file made by the dynamo exporter does not reproduce" in report.attempts[0].error
    assert sorted(contents_of(tmp_path)) == ["net.npz", "net.onnx"]


def test_neither(tmp_path: Path) -> None:
    """Where both fail, both reasons are told and nothing is written."""
    with pytest.raises(ExportError) as caught:
        export_onnx(Singular(), rows(height=3), tmp_path / "net.onnx")
    first, second = str(caught.value).split("\n")
    assert first.startswith("the dynamo exporter cannot export Singular")
    assert second.startswith("the torchscript exporter cannot export Singular")
    assert "try exporter" not in str(caught.value)
    assert contents_of(tmp_path) == {}
    with pytest.raises(ParityError) as differing:
        export_onnx(Liar(), rows(), tmp_path / "net.onnx")
    assert "dynamo" in str(differing.value) and "torchscript" in str(differing.value)
    assert contents_of(tmp_path) == {}


def test_what_both_exporters_meet_is_told_once() -> None:
    """What onnxruntime says of one exporter's file names the exporter, of both it stands alone."""
    first, second = ExportError("cannot load it"), ExportError("no kernel")
    assert describe_failures([("dynamo", first), ("torchscript", second)]) == (
        "with the dynamo exporter: cannot load it\nwith the torchscript exporter: no kernel"
    )
    assert describe_failures([("dynamo", first), ("torchscript", first)]) == str(first)


def test_random_models_are_not_tried_twice(tmp_path: Path) -> None:
    """No exporter can reproduce a model that draws random numbers."""

    class Noise(Head):
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.layer(x)
            return y + torch.rand_like(y)

    with pytest.raises(ParityError) as caught:
        export_onnx(Noise(), rows(), tmp_path / "net.onnx")
    assert "not deterministic" in str(caught.value)
    assert "torchscript" not in str(caught.value)


def test_failure_says_where_and_what_to_try(tmp_path: Path) -> None:
    """The module, the line of the user's forward, advice, and torch's own error as the cause."""
    with pytest.raises(ExportError) as caught:
        export_onnx(Deep(), rows(), tmp_path / "net.onnx", exporter="dynamo")
    text = str(caught.value)
    line = next(
        i
        for i, code in enumerate(Path(__file__).read_text().splitlines(), 1)
        if code.endswith("# the line that fails")
    )
    assert "in 'body.1' (Branching)" in text
    assert f"at {__file__}:{line}: if y.sum() > -1e6:" in text
    assert "torch.where" in text
    assert text.endswith("try exporter='torchscript'")
    assert isinstance(caught.value.__cause__, torch.onnx.errors.OnnxExporterError)


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_missing_operator_is_named_with_its_place(tmp_path: Path, exporter: str) -> None:
    """An operator without an ONNX form is told with the module and line that use it."""
    with pytest.raises(ExportError) as caught:
        export_onnx(Singular(), rows(height=3), tmp_path / "net.onnx", exporter=exporter)
    text = str(caught.value)
    assert "linalg_eig" in text
    assert f"at {__file__}:" in text and "torch.linalg.eigvals(self.layer(x)).real" in text
    assert "write that operator with others" in text
    assert "freeze=" not in text


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_other_parametrizations_are_left_on_request(tmp_path: Path, exporter: str) -> None:
    """Where one that is left in stops the exporter, the option that takes it out is told."""
    model = nn.Sequential(nn.utils.parametrizations.orthogonal(nn.Linear(3, 3)), Head())
    with pytest.raises(ExportError, match="freeze='all'"):
        export_onnx(model, rows(), tmp_path / "net.onnx", exporter=exporter, freeze="spectral_norm")
    assert export_onnx(model, rows(), tmp_path / "net.onnx", exporter=exporter).parity.passed


class ReadsRaw(Head):
    """Reads the direction of weight norm in its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))
        nn.init.ones_(self.normed.parametrizations.weight.original0)  # type: ignore[union-attr, index]

    def forward(self, x: Tensor) -> Tensor:
        raw = self.normed.parametrizations.weight.original1  # type: ignore[union-attr, index]
        y: Tensor = self.layer(self.normed(x) + raw.sum())
        return y


def test_a_forward_that_reads_raw_weights(tmp_path: Path) -> None:
    """Where the forward needs what a block takes away, the option that leaves it is told."""
    with pytest.raises(ExportError, match=r"What to try: .*freeze='spectral_norm'"):
        export_onnx(ReadsRaw(), rows(), tmp_path / "net.onnx")
    with pytest.warns(ReparametrizationNotRecognisedWarning, match=r"'normed\.weight'"):
        export_onnx(ReadsRaw(), rows(), tmp_path / "net.onnx", freeze="spectral_norm")


def test_fixed_dimension_says_what_to_try(tmp_path: Path) -> None:
    """A dimension that the forward fixes is told with the advice to declare it otherwise."""

    class Fixed(Head):
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.layer(x)
            return y + torch.arange(2.0)[:, None]

    with pytest.raises(SnExportError) as caught:
        export_onnx(
            Fixed(),
            rows(),
            tmp_path / "net.onnx",
            exporter="dynamo",
            dynamic_shapes={"x": {0: torch.export.Dim("n", min=2)}},
        )
    assert "'n'" in str(caught.value) or "(n)" in str(caught.value)
    assert "leave it fixed" in str(caught.value) or "leave that dimension" in str(caught.value)


class Pair(Head):
    """Takes two tensors of one height, so that neither's can vary alone."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        result: Tensor = self.layer(x) + y
        return result


@pytest.mark.parametrize("hint", ["b", torch.export.Dim.DYNAMIC], ids=str)
@pytest.mark.parametrize(("given", "name"), [(2, "x"), (2, "y"), (1, "y"), (0, "x")])
def test_dimension_that_another_fixes_is_named(
    tmp_path: Path, given: int, name: str, hint: Any
) -> None:
    """Said by input and position with any form of call, and with the advice for dimensions."""
    tensors = {"x": rows(), "y": rows(seed=1)}
    args = tuple(tensors.values())[:given]
    kwargs = dict(list(tensors.items())[given:])
    with pytest.raises(ExportError) as caught:
        export_onnx(
            Pair(),
            args,
            tmp_path / "net.onnx",
            exporter="dynamo",
            kwargs=kwargs,
            dynamic_shapes={name: {0: hint}},
        )
    text = str(caught.value)
    if torch.__version__ < "2.13":
        assert f"Constraints violated (dimension 0 of '{name}')" in text
    else:
        assert f"a static shape of 2 for dimension 0 of '{name}'. What to try: leave that" in text
    assert "declare it as torch.export.Dim.AUTO" in text


@pytest.mark.parametrize(
    ("said", "names"),
    [
        ("dimension inputs['y'].shape[0]", "dimension 0 of 'y'"),
        ("dimension inputs[1].shape[2]", "dimension 2 of 'y'"),
        ("dimension inputs['args'][1].shape[0]", "dimension 0 of 'y'"),
        ("2 <= L['args'][0].size()[0] = L['y'].size()[1]", "2 <= dimension 0 of 'x' = dimension 1"),
        ("inputs[2].shape[0], inputs['z'].shape[0]", "inputs[2].shape[0], inputs['z'].shape[0]"),
    ],
)
def test_dimensions_as_each_torch_says_them(said: str, names: str) -> None:
    """By name, by position or within the arguments of a call; what is unknown stays."""
    assert names in explain_failure(ValueError(said), Pair(), None, None, ["x", "y"]).text


@pytest.mark.parametrize(
    ("said", "text"),
    [
        (f"no such size\n{FRAMES}", "no such size"),
        (f"no such size\n{FRAMES.split(chr(10), 1)[1]}", "no such size"),
        ("KeyError: 'x'\n\nAt:\n  /torch/onnx/utils.py(12): f\n  /a.py(3): g", "KeyError: 'x'"),
        ("KeyError: 'x'\nAt:\n  /torch/onnx/utils.py(12): f\n  /a.py(3): g", "KeyError: 'x'"),
        ("two lines\nof text", "two lines\nof text"),
        ("Exception raised from here\nAt: noon", "Exception raised from here\nAt: noon"),
    ],
)
def test_frames_are_cut(said: str, text: str) -> None:
    """What C++ adds to an error's text is left out, in the words of an export too."""
    assert strip_frames(said) == text
    assert str(explain_failure(ValueError(said), Pair(), None, None, [])) == f"ValueError: {text}"


@pytest.mark.parametrize("exporter", ["onnx", None, "Dynamo", 3])
def test_unknown_exporter(tmp_path: Path, exporter: Any) -> None:
    """An exporter that does not exist is told with those that do."""
    with pytest.raises(ValueError, match="exporter must be 'auto', 'dynamo' or 'torchscript'"):
        export_onnx(Head(), rows(), tmp_path / "net.onnx", exporter=exporter)


def test_programs_go_on_from_the_report(tmp_path: Path) -> None:
    """The report has the ExportedProgram and the ONNXProgram of the frozen network."""
    model = Head()
    report = export_onnx(model, rows(), tmp_path / "net.onnx")
    assert report.onnx_program is not None and report.exported_program is not None
    again = report.exported_program.module()(rows())
    torch.testing.assert_close(again, model.eval()(rows()))
    assert "parametrizations" not in "".join(report.exported_program.state_dict)
    report.onnx_program.save(tmp_path / "again.onnx")
    traced = export_onnx(model, rows(), tmp_path / "net.onnx", exporter="torchscript")
    assert traced.onnx_program is None and traced.exported_program is None
    assert "onnx_program" not in json.loads(report.to_json())


class Spread(Head):
    """Returns a distribution, which checks its arguments by their values."""

    def forward(self, x: Tensor) -> Any:
        y: Tensor = self.layer(x)
        return y, torch.distributions.Normal(y, torch.sigmoid(y)).stddev


def test_checks_of_arguments_are_no_decisions(tmp_path: Path) -> None:
    """What torch's distributions check of their arguments decides nothing that a file could do."""
    report = export_onnx(Spread(), rows(), tmp_path / "net.onnx")
    assert report.parity.passed
