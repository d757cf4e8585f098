"""Write a graph, with its weights in the file or in one side file."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
