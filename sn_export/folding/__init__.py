"""The safety net: no exported graph keeps arithmetic that depends on initializers alone."""

from .fold import FoldedInitializer, fold_initializers

__all__ = ["FoldedInitializer", "fold_initializers"]
