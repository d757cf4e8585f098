"""The JSON of a report follows the schema that the package ships."""

from __future__ import annotations

import dataclasses
import json
import math
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from export_models import EXPORTERS, Head, Liar, images, rows, small_net
from report_contents import content as report_content

from sn_export import (
    Distance,
    ExportReport,
    OutputParity,
    ParametrizationInfo,
    ParityError,
    ParityReport,
    Rounding,
    SpectralNormInfo,
    export_onnx,
)
from sn_export.results import (
    REPORT_SCHEMA,
    Divergence,
    FileInput,
    Histogram,
    ModuleParity,
    Picture,
)


@pytest.fixture(scope="module")
def schema() -> Any:
    """Return the schema that the package ships."""
    return json.loads((resources.files("sn_export.reporting") / "report.schema.json").read_text())


@pytest.mark.parametrize("passed", [True, False])
def test_contents_of_tests_follow_the_schema(schema: Any, passed: bool) -> None:
    """The contents that the tests of the pages use follow the schema."""
    jsonschema.validate(report_content(passed), schema)


def test_schema_is_sound(schema: Any) -> None:
    """The schema is valid itself, and has the version that reports state."""
    jsonschema.Draft202012Validator.check_schema(schema)
    assert schema["properties"]["schema"]["const"] == REPORT_SCHEMA


@pytest.mark.parametrize("per_module", [True, False])
@pytest.mark.parametrize("exporter", EXPORTERS)
def test_report_follows_the_schema(
    tmp_path: Path, schema: Any, exporter: str, per_module: bool
) -> None:
    """A report follows the schema, with and without modules."""
    report = export_onnx(
        small_net("hook"),
        images(),
        tmp_path / "net.onnx",
        exporter=exporter,
        per_module=per_module,
        metadata={"own": "key"},
    )
    content = json.loads(report.to_json())
    jsonschema.validate(content, schema)
    assert content["schema"] == REPORT_SCHEMA
    assert bool(content["parity"]["modules"]) == per_module
    assert content["metadata"] == dict(report.metadata)


def test_failed_report_follows_the_schema(tmp_path: Path, schema: Any) -> None:
    """The report of a failure with NaN and infinities follows the schema."""
    report = export_onnx(Head(), rows(), tmp_path / "net.onnx", exporter="torchscript")
    with pytest.raises(ParityError) as caught:
        export_onnx(Liar(), rows(), tmp_path / "no.onnx", exporter="torchscript")
    export = caught.value.export
    assert export is not None
    jsonschema.validate(json.loads(export.to_json()), schema)
    worst = dataclasses.replace(
        caught.value.report.outputs[0],
        max_abs=math.nan,
        max_rel=math.inf,
        worst_expected=-math.inf,
        histogram=None,
    )
    failed = dataclasses.replace(caught.value.report, outputs=(worst,))
    content = json.loads(dataclasses.replace(report, parity=failed).to_json())
    jsonschema.validate(content, schema)
    assert content["path"] is None
    assert content["parity"]["first_divergent"] == ""
    assert content["parity"]["divergence"]["reason"] == caught.value.report.divergence.reason  # type: ignore[union-attr]


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_inputs_of_the_file(tmp_path: Path, exporter: str) -> None:
    """Each input has its name, dtype and shape, with the names of dimensions that vary."""
    report = export_onnx(
        small_net("hook"),
        images(),
        tmp_path / "net.onnx",
        exporter=exporter,
        dynamic_shapes={"input": {0: "batch"}},
        input_names=["image"],
        samples=0,
    )
    assert report.inputs == (FileInput("image", "float32", ("batch", 1, 8, 8)),)
    assert report.model == type(small_net("hook")).__name__


def test_printed_reports_are_short(tmp_path: Path) -> None:
    """A printed report is its verdict, what made the file, and a line for each output."""
    report = export_onnx(small_net("hook"), images(), tmp_path / "a.onnx", exporter="torchscript")
    verdict, *outputs = str(report).splitlines()
    assert verdict.startswith(f"proved: {tmp_path / 'a.onnx'} (opset ")
    assert verdict.endswith(f", torchscript, {len(report.frozen)} tensors frozen)")
    assert outputs == str(report.parity).splitlines()
    assert [line.split(":")[0] for line in outputs] == [o.name for o in report.parity.outputs]
    with pytest.raises(ParityError) as caught:
        export_onnx(Liar(), rows(), tmp_path / "no.onnx", exporter="torchscript")
    lines = str(caught.value.export).splitlines()
    assert lines[0].startswith(f"not proved, so '{tmp_path / 'no.onnx'}' was not written (opset ")
    assert "FAILED" in lines[1] and len(lines) < 6


@pytest.mark.parametrize(
    ("kind", "place"),
    [
        (OutputParity, "output"),
        (Histogram, "histogram"),
        (Distance, "distance"),
        (Rounding, "rounding"),
        (Picture, "picture"),
        (ModuleParity, "module"),
        (FileInput, "input"),
        (SpectralNormInfo, "frozen"),
        (ParametrizationInfo, "parametrization"),
    ],
)
def test_every_field_is_described(schema: Any, kind: Any, place: str) -> None:
    """The schema has exactly the fields of the records, and requires all of them."""
    fields = {field.name for field in dataclasses.fields(kind)}
    described = schema["$defs"][place]
    assert set(described["properties"]) == set(described["required"]) == fields


def test_every_field_of_the_report_is_described(schema: Any) -> None:
    """The schema has the fields of the report too, and those that its JSON adds."""
    fields = {field.name for field in dataclasses.fields(ExportReport)} - {"onnx_program"}
    top = fields | {"schema", "target"}
    assert set(schema["required"]) == top
    added = {"files", "command", "notes", "suspects"}  # by saving it and by the command line
    assert set(schema["properties"]) == top | added
    parity = {field.name for field in dataclasses.fields(ParityReport)}
    added = {"passed", "modules", "first_divergent"}
    assert set(schema["$defs"]["parity"]["properties"]) == parity | added
    divergence = {field.name for field in dataclasses.fields(Divergence)}
    assert set(schema["$defs"]["divergence"]["properties"]) == divergence - {"modules", "first"}


@pytest.mark.parametrize(
    "change",
    [
        {"schema": 2},
        {"opset": "18"},
        {"parity": {}},
        {"exporter": "tensorflow"},
        {"frozen": [{}]},
    ],
)
def test_the_schema_refuses(tmp_path: Path, schema: Any, change: dict[str, Any]) -> None:
    """Another version, a wrong type or a missing field is not valid."""
    report = export_onnx(Head(), rows(), tmp_path / "net.onnx", exporter="torchscript")
    content = json.loads(report.to_json()) | change
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(content, schema)
