"""Checkpoints: read safely, spelled differently, inspected and converted, without model code."""

from ..errors import CheckpointError
from .content import Checkpoint, StateDict
from .convert import Conversion, convert_checkpoint
from .inspection import Inspection, StoredLayer, inspect_checkpoint
from .load import Loaded, load_checkpoint
from .read import read_checkpoint

__all__ = [  # noqa: RUF022 - grouped by topic
    # Reading
    "read_checkpoint",
    "Checkpoint",
    "StateDict",
    # Looking
    "inspect_checkpoint",
    "Inspection",
    "StoredLayer",
    # Respelling
    "convert_checkpoint",
    "Conversion",
    # Loading
    "load_checkpoint",
    "Loaded",
    # Errors
    "CheckpointError",
]
