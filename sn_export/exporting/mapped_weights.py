"""Weights of torch's programs that lie in the file that was made of them, not in memory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from ..files import side_file
from ..running import is_dense, is_large


def map_weights(program: Any, model: nn.Module, path: Path) -> None:
    """Let the frozen weights in ``program`` be read from ``path`` when somebody asks for them.

    The mapping is private and belongs to the file, not to its name: it stays good when the file
    is moved, replaced or deleted, and what is written to the weights does not reach the file.

    Args:
        program: torch's ONNXProgram, with its ExportedProgram.
        model: the model, as it was before freezing; its own tensors are left alone.
        path: the file made of ``program``.
    """
    data = side_file(path)
    size = data.stat().st_size if data.is_file() else 0
    # Other systems do not let a file be replaced while it is mapped.
    if os.name != "posix" or not is_large(size):
        return
    try:
        content = torch.from_file(str(data), shared=False, size=size, dtype=torch.uint8).numpy()
    except RuntimeError:  # a file system that maps nothing: they stay in memory
        return
    own = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    initializers = program.model.graph.initializers
    for entry in onnx.load(path, load_external_data=False).graph.initializer:
        place = {item.key: item.value for item in entry.external_data}
        value = initializers.get(entry.name)
        weight = getattr(value.const_value, "raw", None) if value is not None else None
        if not place or not isinstance(weight, Tensor) or id(weight) in own or not weight.numel():
            continue
        start, length = int(place["offset"]), int(place["length"])
        if not _is_as_in_file(weight) or length != weight.nbytes or start % weight.itemsize:
            continue
        # Each with a storage of its own: torch saves a tensor with all that it shares one with.
        flat = torch.frombuffer(content, dtype=weight.dtype, count=weight.numel(), offset=start)
        weight.data = flat.view(weight.shape)


def _is_as_in_file(weight: Tensor) -> bool:
    return weight.is_cpu and is_dense(weight) and weight.is_contiguous()
