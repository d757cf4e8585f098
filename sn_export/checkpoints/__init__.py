"""Checkpoints: read safely, spelled differently, inspected and converted, without model code."""

from .content import Checkpoint, StateDict
from .convert import Conversion, convert_checkpoint
from .inspection import Inspection, StoredLayer, inspect_checkpoint
from .load import Loaded, load_checkpoint
from .npz_file import read_npz
from .read import read_checkpoint
from .reparametrizations import Spelling

__all__ = [
    "Checkpoint",
    "Conversion",
    "Inspection",
    "Loaded",
    "Spelling",
    "StateDict",
    "StoredLayer",
    "convert_checkpoint",
    "inspect_checkpoint",
    "load_checkpoint",
    "read_checkpoint",
    "read_npz",
]
