"""The safety net: no exported graph keeps arithmetic that depends on initializers alone."""

from ...results import FoldedInitializer
from .fold import fold_initializers

__all__ = ["FoldedInitializer", "fold_initializers"]
