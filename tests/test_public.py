"""The public names: all there, and cheap to have until they are used."""

from __future__ import annotations

import subprocess
import sys

import pytest

import sn_export


@pytest.mark.parametrize("name", sn_export.__all__)
def test_every_public_name_is_there(name: str) -> None:
    """Each name is what its module defines, and says so in a docstring."""
    value = getattr(sn_export, name)
    assert value.__name__ == name
    assert value.__module__.startswith("sn_export.")
    assert value.__doc__
    assert name in dir(sn_export)


def test_a_name_that_is_not_there() -> None:
    """An unknown name is an AttributeError, as of any module."""
    with pytest.raises(AttributeError, match="No sn_export attribute frozen"):
        _ = sn_export.frozen  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "code",
    [
        "import sn_export",
        "from typer.testing import CliRunner; from sn_export.cli.app import app; "
        "assert CliRunner().invoke(app, ['--help']).exit_code == 0; "
        "assert CliRunner().invoke(app, ['onnx', '--help']).exit_code == 0; "
        "assert CliRunner().invoke(app, ['--version']).exit_code == 0",
    ],
    ids=["import", "help"],
)
def test_no_torch_until_it_is_needed(code: str) -> None:
    """Importing the package, asking for help and for the version do not import torch."""
    check = "import sys; heavy = {'torch', 'onnx', 'numpy'} & set(sys.modules); assert not heavy"
    subprocess.run([sys.executable, "-c", f"{code}; {check}"], check=True)
