"""Modules whose tensors networks use without ever calling them."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

# The first is the out_proj of attention, which reads its weight.
_NEVER_CALLED = (NonDynamicallyQuantizableLinear, nn.ParameterList, nn.ParameterDict)


def is_never_called(module: nn.Module) -> bool:
    """Whether networks use the tensors of ``module`` without calling it, so that no hook runs."""
    return isinstance(module, _NEVER_CALLED)
