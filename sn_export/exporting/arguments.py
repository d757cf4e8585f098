"""What `sn_export.export_onnx` is given, refused before anything runs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..errors import SnExportError
from ..files import (
    are_one_place,
    as_path,
    require_place,
    require_replaceable,
    require_writable,
    side_file,
)
from ..results import EXPORTERS, Exporter
from ..text import plain_integer


def as_args(args: Any) -> tuple[Any, ...]:
    """Return the positional arguments of a call.

    Raises:
        TypeError: if they are neither a tensor nor a tuple or list.
    """
    if isinstance(args, Tensor):
        return (args,)
    if isinstance(args, (tuple, list)):
        return tuple(args)
    raise TypeError(f"args must be a tuple of arguments or a tensor, got {type(args).__name__}")


def require_initialized(model: nn.Module) -> None:
    """Raise a `SnExportError` for a parameter or buffer of a lazy module that has not run yet."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            raise SnExportError(
                f"'{name}' has no shape yet, since its lazy module never ran: run the model once"
            )


def require_target(path: str | os.PathLike[str], overwrite: bool) -> Path:
    """Return the path of the ONNX file to write.

    Raises:
        TypeError: if it is no path.
        ValueError: if it names no file, or one of another format and ``overwrite`` is False.
        OSError: if it cannot be there, or its external data beside it, or if something else than
            an ONNX file is there and ``overwrite`` is False.
    """
    target = _require_file(path, "path")
    require_place(side_file(target))
    if not overwrite:
        require_replaceable(target, "pass overwrite=True to write it all the same")
    return target


def require_case(path: str | os.PathLike[str], target: Path) -> Path:
    """Return the path of a saved case beside ``target``; raises as `require_target` does."""
    case = _require_file(path, "save_case")
    if are_one_place(case, target) or are_one_place(case, side_file(target)):
        raise ValueError(f"save_case must be another file than path, got '{path}'")
    return case


def _require_file(path: str | os.PathLike[str], option: str) -> Path:
    target = as_path(path, option)
    if not target.name:
        raise ValueError(f"{option} must name a file, got '{path}'")
    require_writable(target)
    return target


def require_samples(samples: int) -> int:
    """Return a number of random inputs.

    Raises:
        ValueError: if it is no integer, or negative.
    """
    number = plain_integer(samples)
    if number is None or number < 0:
        raise ValueError(f"samples must be an integer of 0 or more, got {samples!r}")
    return number


def require_options(exporter: Any, external_data: Any, freeze: Any) -> tuple[Exporter, ...]:
    """Return the exporters to try, in order.

    Raises:
        ValueError: for an option outside its range.
    """
    if exporter not in ("auto", *EXPORTERS):
        raise ValueError(f"exporter must be 'auto', 'dynamo' or 'torchscript', got {exporter!r}")
    if external_data not in ("auto", True, False):
        raise ValueError(f"external_data must be 'auto', True or False, got {external_data!r}")
    if freeze not in ("spectral_norm", "all"):
        raise ValueError(f"freeze must be 'spectral_norm' or 'all', got {freeze!r}")
    return EXPORTERS if exporter == "auto" else (exporter,)
