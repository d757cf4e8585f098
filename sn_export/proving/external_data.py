"""ONNX files with their weights in the file or in one side file."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from ..files import side_file

# Large weights start at a page (of 64 KiB, as Windows has them), so that the file can be mapped.
# onnx-ir does that by itself before 1.1.
_PAGE = 2**16
_PACKS_DENSELY = "alignment" in inspect.signature(ir.save).parameters


def weight_bytes(model: ir.Model) -> int:
    """Return how many bytes the initializers of ``model`` take."""
    values = model.graph.initializers.values()
    return sum(value.const_value.nbytes for value in values if value.const_value is not None)


def save(
    model: ir.Model, path: Path, *, outside: bool, release: Callable[[], None] = lambda: None
) -> None:
    """Write ``model`` to ``path``, with the weights in its side file if they go ``outside``.

    Small weights stay in the file, and there is no side file if none is left for it.

    Args:
        model: a graph with its weights.
        path: the file.
        outside: whether there is a side file.
        release: called whenever a weight has been read, to free what that took.
    """
    data = side_file(path)
    options: dict[str, Any] = {"alignment": _PAGE} if _PACKS_DENSELY else {}
    name = data.name if outside else None
    ir.save(model, path, external_data=name, callback=lambda *_: release(), **options)
    release()
    if outside and data.is_file() and not data.stat().st_size:
        data.unlink()


def find_stale_data(made: Path, target: Path) -> list[Path]:
    """Return the side file of the ONNX file at ``target``, if ``made`` in its place reads none.

    A file that only has the name of a side file, and is not named in the ONNX file, is not stale.
    """
    data = side_file(target)
    if side_file(made).exists() or not data.is_file() or not target.is_file():
        return []
    try:
        tensors = onnx.load(target, load_external_data=False).graph.initializer
    except Exception:  # what is there is no ONNX file
        return []
    entries = [entry for tensor in tensors for entry in tensor.external_data]
    is_read = any(entry.key == "location" and entry.value == data.name for entry in entries)
    return [data] if is_read else []
