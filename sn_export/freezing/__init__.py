"""Freezing: the walk, the plan and the exact undo. It knows nothing of ONNX."""

import lazy_loader

# The names stand in __init__.pyi alone. The records in info.py need no torch, so
# that those of an export, and `sn-export --help`, come without it.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
