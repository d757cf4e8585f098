"""Checkpoints: read them safely, load, inspect and convert them."""

from .content import Checkpoint, StateDict
from .convert import Conversion, convert_checkpoint
from .inspection import Inspection, StoredLayer, inspect_checkpoint
from .load import Loaded, load_checkpoint
from .read import read_checkpoint, read_npz
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
