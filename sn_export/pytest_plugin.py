"""Parity as a test: the fixture `assert_onnx_parity`, found by pytest on its own.

::

    def test_critic(assert_onnx_parity):
        report = assert_onnx_parity(Critic().eval(), (torch.randn(2, 3, 32, 32),))
        assert report.opset >= 18

pytest loads this file at every start, so torch is imported when the fixture is used.
"""

from __future__ import annotations

import hashlib
import os
import re
from itertools import count
from pathlib import Path
from typing import Any, Protocol, get_args

import pytest

from .results import ExporterChoice, ExportReport

EXPORTERS = get_args(ExporterChoice)
_REPORT_DIR = pytest.StashKey[Path]()
_LONGEST = 80  # of a name in the report folder; file systems take 255 bytes


class AssertOnnxParity(Protocol):
    """The type of the fixture."""

    def __call__(
        self, model: Any, args: Any, *, path: str | os.PathLike[str] | None = None, **options: Any
    ) -> ExportReport:
        """Export, prove and restore; see `assert_onnx_parity`."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options to pytest's command line."""
    group = parser.getgroup("sn_export", "parity of ONNX exports (sn_export)")
    group.addoption(
        "--onnx-exporter",
        choices=EXPORTERS,
        help="exporter for assert_onnx_parity where the test does not choose one",
    )
    group.addoption(
        "--onnx-report-dir",
        metavar="DIR",
        help="write a report of each assert_onnx_parity here, as JSON, HTML and Markdown",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Make the report folder; a relative path starts where pytest was started."""
    given = config.getoption("--onnx-report-dir")
    if given is None:
        return
    folder = config.invocation_params.dir / given
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise pytest.UsageError(
            f"--onnx-report-dir: cannot make the folder '{given}': {error.strerror}"
        ) from error
    config.stash[_REPORT_DIR] = folder


@pytest.fixture
def assert_onnx_parity(request: pytest.FixtureRequest) -> AssertOnnxParity:
    """Return a function that exports a model, proves the file and restores the model.

    It takes the model, the positional arguments of an example call, and the options of
    `sn_export.export_onnx`. Without ``path`` the file is made in the test's ``tmp_path``. It
    returns the `sn_export.ExportReport`. Where the file does not reproduce the model it raises an
    AssertionError that says which outputs differ and by how much; what `export_onnx` raises
    otherwise passes through.
    """
    calls = count(1)
    config = request.config

    def check(
        model: Any, args: Any, *, path: str | os.PathLike[str] | None = None, **options: Any
    ) -> ExportReport:
        __tracebackhide__ = True
        from . import ParityError, SnExportError, export_onnx

        number = next(calls)
        folder = config.stash.get(_REPORT_DIR, None)
        exporter = config.getoption("--onnx-exporter")
        if exporter is not None:
            options.setdefault("exporter", exporter)
        if folder is not None:
            options.setdefault("sigma_exact", True)
            options.setdefault("per_module", True)
        if path is None:
            tmp_path: Path = request.getfixturevalue("tmp_path")
            path = tmp_path / f"model{_make_suffix(number)}.onnx"
        name = name_report(request.node.nodeid, number)
        try:
            report = export_onnx(model, args, path, **options)
        except ParityError as error:
            _write(folder, name, error.export)
            failure = str(error)
        except SnExportError as error:
            raise error.with_traceback(None) from error.__cause__  # our own frames help nobody
        else:
            _write(folder, name, report)
            return report
        if folder is not None:
            failure += f"\nreport: {folder / name}.html"
        raise AssertionError(failure)

    return check


def name_report(nodeid: str, call: int = 1) -> str:
    """Return the name, without suffix, of the report of a test's n-th call.

    It is readable, and valid in every file system. A piece of the hash of the whole node id keeps
    tests apart whose readable names are equal, in every worker of a parallel run.

    Example: ``name_report("tests/test_a.py::test_b[1]", 2)`` is
    ``"tests_test_a_py_test_b_1-a558577d-2"``.
    """
    digest = hashlib.sha256(nodeid.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    readable = re.sub(r"[^A-Za-z0-9]+", "_", nodeid).strip("_")[-_LONGEST:].lstrip("_")
    return f"{readable}-{digest}{_make_suffix(call)}"


def _make_suffix(call: int) -> str:
    return f"-{call}" if call > 1 else ""


def _write(folder: Path | None, name: str, report: Any) -> None:
    if folder is None:
        return
    from .reporting import REPORT_SUFFIXES, save_report

    for suffix in REPORT_SUFFIXES:
        save_report(report, folder / f"{name}{suffix}")
