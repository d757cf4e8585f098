"""The pytest plugin: what the fixture does in the test files of a user."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from importlib import metadata, resources
from pathlib import Path
from typing import get_args

import jsonschema
import pytest

from sn_export.pytest_plugin import EXPORTERS, name_report
from sn_export.results import Exporter

pytest_plugins = ("pytester",)

# An installed package is found by its entry point; from a checkout the file has to be named.
_IS_INSTALLED = any(e.name == "sn_export" for e in metadata.entry_points(group="pytest11"))
PLUGIN = () if _IS_INSTALLED else ("-p", "sn_export.pytest_plugin")

HEAD = """
import pytest
import torch
from torch import nn
from torch.nn.utils.spectral_norm import spectral_norm

EXAMPLE = (torch.randn(2, 3),)

def critic():
    return nn.Sequential(spectral_norm(nn.Linear(3, 4)), nn.ReLU(), nn.Linear(4, 1))

class Liar(nn.Module):
    "Its file gives something else than it does."
    def __init__(self):
        super().__init__()
        self.body = critic()
    def forward(self, x):
        return self.body(x) + (0 if torch.jit.is_tracing() else 1)
"""


def _run(
    pytester: pytest.Pytester, test: str, *args: str, exporter: str | None = "torchscript"
) -> pytest.RunResult:
    pytester.makepyfile(test_them=HEAD + textwrap.dedent(test))
    chosen = (f"--onnx-exporter={exporter}",) if exporter else ()
    return pytester.runpytest_inprocess(*PLUGIN, "-p", "no:cacheprovider", *chosen, *args)


def test_entry_point() -> None:
    """The package declares the plugin to pytest."""
    root = Path(__file__).resolve().parent.parent
    text = (root / "pyproject.toml").read_text()
    assert '[project.entry-points.pytest11]\nsn_export = "sn_export.pytest_plugin"\n' in text


def test_exporters_are_those_of_export_onnx() -> None:
    """--onnx-exporter takes the exporters of export_onnx, without importing torch."""
    assert set(EXPORTERS) == {"auto", *get_args(Exporter)}


def test_it_exports_proves_and_restores(pytester: pytest.Pytester) -> None:
    """The fixture returns the report, writes to tmp_path, and restores the model."""
    result = _run(
        pytester,
        """
        def test_it(assert_onnx_parity, tmp_path):
            model = critic()
            weight = model[0].weight_orig
            report = assert_onnx_parity(model, EXAMPLE)
            assert report.parity.passed and report.exporter == "torchscript"
            assert report.path == tmp_path / "model.onnx" and report.path.is_file()
            assert model[0].weight_orig is weight and model.training
            again = assert_onnx_parity(model, EXAMPLE, samples=1)
            assert again.path == tmp_path / "model-2.onnx" and again.parity.samples == 2

        def test_path(assert_onnx_parity, tmp_path):
            report = assert_onnx_parity(critic(), EXAMPLE, path=tmp_path / "own.onnx")
            assert report.path == tmp_path / "own.onnx" and report.path.is_file()
        """,
    )
    result.assert_outcomes(passed=2)


def test_failure_is_an_assertion_with_the_report(pytester: pytest.Pytester) -> None:
    """A failed proof names output and error, and shows no line of the plugin."""
    result = _run(
        pytester,
        """
        def test_it(assert_onnx_parity):
            assert_onnx_parity(Liar(), EXAMPLE)
        """,
    )
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        [
            ">*assert_onnx_parity(Liar(), EXAMPLE)",
            "E*AssertionError: the file made by the torchscript exporter does not reproduce*",
            "E*: FAILED, max_abs 1, *elements are outside atol*the model says*the file*",
            "test_them.py:*: AssertionError",
        ]
    )
    assert "pytest_plugin.py" not in result.stdout.str()
    assert "ParityError" not in result.stdout.str()


def test_no_line_of_the_package_is_shown(pytester: pytest.Pytester) -> None:
    """Any failure shows the message and the line of the test, no line of the package."""
    test = """
    class Broken(nn.Linear):
        def forward(self, x):
            raise RuntimeError("it is broken")

    def test_parity(assert_onnx_parity):
        assert_onnx_parity(Liar(), EXAMPLE)

    def test_model(assert_onnx_parity):
        assert_onnx_parity(Broken(3, 4), EXAMPLE)
    """
    pytester.makepyfile(test_them=HEAD + textwrap.dedent(test))
    # A process of its own: torch imports parts of itself after an error, once for each process.
    result = pytester.runpytest_subprocess(*PLUGIN, "--onnx-exporter=torchscript", "--tb=long")
    result.assert_outcomes(failed=2)
    shown = result.stdout.str()
    assert "it is broken" in shown and "does not reproduce" in shown
    assert "pytest_plugin.py" not in shown and "export.py" not in shown


def test_other_errors_pass_through(pytester: pytest.Pytester) -> None:
    """An error other than a failed proof is raised unchanged."""
    result = _run(
        pytester,
        """
        def test_option(assert_onnx_parity):
            with pytest.raises(ValueError, match="samples must be"):
                assert_onnx_parity(critic(), EXAMPLE, samples=-1)

        def test_model(assert_onnx_parity):
            with pytest.raises(TypeError, match="torch.nn.Module"):
                assert_onnx_parity("critic", EXAMPLE)
        """,
    )
    result.assert_outcomes(passed=2)


def test_a_test_may_choose_its_exporter(pytester: pytest.Pytester) -> None:
    """The exporter that a test chooses precedes that of the command line."""
    result = _run(
        pytester,
        """
        def test_it(assert_onnx_parity):
            report = assert_onnx_parity(critic(), EXAMPLE, exporter="torchscript")
            assert report.exporter == "torchscript"
        """,
        exporter="dynamo",
    )
    result.assert_outcomes(passed=1)


def test_reports(pytester: pytest.Pytester) -> None:
    """Each call writes JSON, HTML and Markdown, passed or failed, below where pytest started."""
    result = _run(
        pytester,
        """
        @pytest.mark.parametrize("name", ["a/b", "a|b"])
        def test_good(assert_onnx_parity, name, tmp_path, monkeypatch):
            monkeypatch.chdir(tmp_path)
            assert_onnx_parity(critic(), EXAMPLE)
            assert_onnx_parity(critic(), EXAMPLE)

        def test_bad(assert_onnx_parity):
            assert_onnx_parity(Liar(), EXAMPLE)
        """,
        "--onnx-report-dir=made/reports",
    )
    result.assert_outcomes(passed=2, failed=1)
    folder = pytester.path / "made" / "reports"
    names = sorted(path.name for path in folder.iterdir())
    assert len(names) == 5 * 3  # none was written over
    (failed,) = folder.glob("*test_bad*.json")
    content = json.loads(failed.read_text())
    assert (content["path"], content["parity"]["passed"]) == (None, False)
    schema = json.loads((resources.files("sn_export.reporting") / "report.schema.json").read_text())
    jsonschema.validate(content, schema)
    result.stdout.fnmatch_lines([f"*report: {failed.with_suffix('.html')}"])
    assert "Not proved" in failed.with_suffix(".html").read_text()
    assert "Not proved" in failed.with_suffix(".md").read_text()
    passed = list(folder.glob("*test_good_a_b*-2.json"))
    assert len(passed) == 2
    for path in passed:
        content = json.loads(path.read_text())
        assert content["parity"]["passed"] is True
        assert content["frozen"][0]["sigma_exact"] > 0
        assert set(content["files"]) == {"model-2.onnx"}


def test_a_report_folder_that_cannot_be(pytester: pytest.Pytester) -> None:
    """A file in place of the report folder is refused before any test runs."""
    pytester.makefile(".txt", taken="")
    result = _run(pytester, "def test_it(): pass", "--onnx-report-dir=taken.txt")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*--onnx-report-dir: cannot make the folder 'taken.txt': *"])


def test_unknown_exporter(pytester: pytest.Pytester) -> None:
    """For an unknown exporter the message lists the known ones."""
    result = _run(pytester, "def test_it(): pass", exporter="jax")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*--onnx-exporter*jax*dynamo*torchscript*"])


def test_workers(pytester: pytest.Pytester) -> None:
    """Under xdist every test has a report of its own in one folder."""
    pytest.importorskip("xdist", reason="pytest-xdist is not installed")
    pytester.makepyfile(
        test_them=HEAD
        + textwrap.dedent(
            """
            @pytest.mark.parametrize("i", range(4))
            def test_it(assert_onnx_parity, i):
                assert_onnx_parity(critic(), EXAMPLE, samples=0)
            """
        )
    )
    result = pytester.runpytest_subprocess(
        *PLUGIN, "-n2", "--onnx-exporter=torchscript", "--onnx-report-dir=reports"
    )
    result.assert_outcomes(passed=4)
    names = {path.stem for path in (pytester.path / "reports").glob("*.html")}
    assert names == {name_report(f"test_them.py::test_it[{i}]") for i in range(4)}


def test_starting_pytest_imports_no_torch(pytester: pytest.Pytester) -> None:
    """pytest starts without importing torch."""
    pytester.makepyfile(
        """
        import sys

        def test_it():
            assert "sn_export.pytest_plugin" in sys.modules
            assert not {"torch", "onnx", "numpy", "jinja2"} & set(sys.modules)
        """
    )
    pytester.runpytest_subprocess(*PLUGIN).assert_outcomes(passed=1)


@pytest.mark.parametrize(
    "nodeid",
    ["tests/test_a.py::test_b[x/../y]", "t.py::test[é\n<>:|?*]", "t.py::test[" + "x" * 500 + "]"],
)
def test_names_are_safe(nodeid: str, tmp_path: Path) -> None:
    """The name of a report is short, of letters, digits, - and _, and differs between tests."""
    name = name_report(nodeid)
    assert name.isascii()
    assert name.replace("-", "").replace("_", "").isalnum()
    assert len(name) < 120
    (tmp_path / f"{name}.html").touch()
    assert name_report(nodeid + " ") != name != name_report(nodeid, 2)


def test_help() -> None:
    """pytest --help lists the options."""
    command = [sys.executable, "-m", "pytest", *PLUGIN, "--help"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "--onnx-exporter" in text
    assert "--onnx-report-dir" in text
