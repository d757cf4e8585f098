"""The one job: freeze, export, prove, publish; and leave the model as it was."""

from .export import export_onnx as export_onnx
from .onnx_file import require_metadata as require_metadata
