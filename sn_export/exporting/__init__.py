"""The one job: freeze, export, prove, publish; and leave the model as it was."""

from .export import export_onnx
from .onnx_file import require_metadata

__all__ = [
    "export_onnx",
    "require_metadata",
]
