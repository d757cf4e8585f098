"""The public names: all there, and cheap to have until they are used."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import mypy.api
import pytest
from torch import nn
from typer.testing import CliRunner

import sn_export
import sn_export.checkpoints
import sn_export.freezing
import sn_export.reporting
from sn_export.cli.app import app

_ROOT = Path(__file__).resolve().parent.parent
_CACHE = _ROOT / ".mypy_cache"  # scripts/test has filled it
_FACES = [sn_export, sn_export.checkpoints, sn_export.freezing, sn_export.reporting]


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


def test_no_public_name_is_any(tmp_path: Path) -> None:
    """A type checker knows every public name, also of the wings that have a face to import."""
    names = [f"sn_export.{name}" for name in sn_export.__all__]
    for face in _FACES:
        names += [f"{face.__name__}.{name}" for name in face.__all__]
    modules = "".join(f"import {face.__name__}\n" for face in _FACES)
    program = tmp_path / "program.py"
    program.write_text(modules + "".join(f"reveal_type({name})\n" for name in names))
    shown, errors, _ = mypy.api.run(
        ["--config-file", str(_ROOT / "pyproject.toml"), "--cache-dir", str(_CACHE), str(program)]
    )
    assert not errors
    revealed = re.findall(r'note: Revealed type is "(.*)"', shown)
    assert len(revealed) == len(names), shown
    unknown = [name for name, kind in zip(names, revealed, strict=True) if kind == "Any"]
    assert unknown == []


@pytest.mark.parametrize("face", [sn_export, sn_export.freezing], ids=lambda face: face.__name__)
def test_names_stand_once(face: ModuleType) -> None:
    """A lazily loaded face has each name once, in its stub alone, imported from one place."""
    assert face.__file__ is not None
    stub = ast.parse(Path(face.__file__).with_suffix(".pyi").read_text())
    assert {type(statement) for statement in stub.body} == {ast.ImportFrom}
    names = [a.asname for node in stub.body for a in node.names]  # type: ignore[attr-defined]
    assert sorted(names) == sorted(set(names)) == sorted(face.__all__)
    code = ast.walk(ast.parse(Path(face.__file__).read_text()))
    assert not set(names) & {node.id for node in code if isinstance(node, ast.Name)}


@pytest.mark.parametrize("wing", ["distributed", "exporting", "files", "proving", "running"])
def test_inner_faces_are_imports_alone(wing: str) -> None:
    """A face for the package itself imports each name once, from one place, as one for others."""
    face = importlib.import_module(f"sn_export.{wing}")
    assert face.__file__ is not None
    _, *imports = ast.parse(Path(face.__file__).read_text()).body
    assert {type(statement) for statement in imports} == {ast.ImportFrom}
    found = [alias for node in imports for alias in node.names]  # type: ignore[attr-defined]
    names = [alias.name for alias in found]
    assert names == [alias.asname for alias in found]
    assert len(names) == len(set(names))


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


@pytest.mark.parametrize("left", [None, ModuleType("onnxruntime")], ids=["none", "remains"])
def test_without_onnxruntime(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: ModuleType | None
) -> None:
    """Without a whole onnxruntime one error says what to install; the block needs none.

    Modules that imported it are taken out of `sys.modules`, which is how it was at the start.
    """
    for name in list(sys.modules):
        if re.match(
            r"sn_export\.(proving|exporting|distributed)\b|sn_export\.cli\.\w+_command", name
        ):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(vars(sn_export), "export_onnx", raising=False)
    monkeypatch.setitem(sys.modules, "onnxruntime", left)
    with pytest.raises(sn_export.MissingRuntimeError, match="pip install onnxruntime") as caught:
        _ = sn_export.export_onnx
    assert isinstance(caught.value, ImportError)
    assert sn_export.find_spectral_norm(nn.Linear(2, 2)) == []
    case = [str(tmp_path / "a.onnx"), "--case", str(tmp_path / "a.npz")]
    for path in tmp_path / "a.onnx", tmp_path / "a.npz":
        path.write_bytes(b"")
    result = CliRunner().invoke(app, ["check", *case])
    assert result.exit_code == 2
    assert "pip install onnxruntime" in result.stderr


@pytest.mark.parametrize("script", sorted((_ROOT / "scripts").glob("*.py")), ids=lambda p: p.name)
def test_modules_that_a_script_names_are_there(script: Path) -> None:
    """What a script attacks or measures by the path of a module has not been moved away."""
    for name in re.findall(r'"([a-z_]+/[a-z_]+\.py)"', script.read_text()):
        places = (_ROOT, Path(sn_export.__file__).parent)
        assert any((root / name).is_file() for root in places), name
