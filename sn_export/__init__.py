"""Exact export of PyTorch models with spectral normalisation to ONNX."""

import lazy_loader

# The public names stand in __init__.pyi alone, and are imported when first asked for:
# ``sn-export --help`` needs no torch.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
