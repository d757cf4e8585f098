"""onnxruntime, of any build. None is a dependency: each is installed over the others."""

from __future__ import annotations

from typing import Any

from ..errors import MissingRuntimeError

_INSTALL = (
    "install one build of it, 'pip install onnxruntime', or onnxruntime-gpu for CUDA: each is "
    "installed over the others"
)


def _import_runtime() -> Any:
    """Return the module onnxruntime.

    Raises:
        MissingRuntimeError: if it is not installed, or is what an uninstalled build left behind.
    """
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        if error.name != "onnxruntime":
            raise
        raise MissingRuntimeError(
            f"exports are proved by onnxruntime, which is missing; {_INSTALL}"
        ) from None
    if not hasattr(onnxruntime, "InferenceSession"):
        where = ", ".join(getattr(onnxruntime, "__path__", ()))
        raise MissingRuntimeError(
            f"onnxruntime in {where} is not whole, as where one of two builds was uninstalled; "
            f"uninstall all of them and {_INSTALL}"
        )
    return onnxruntime


ort = _import_runtime()
