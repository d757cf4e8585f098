"""What `torch.compile` has made of a module."""

from __future__ import annotations

import sys

from torch import nn


def original_of(module: nn.Module) -> nn.Module | None:
    """Return the module behind one that `torch.compile` returned, None for any other.

    Importing torch's compiler takes longer than all else here, and without it nothing can have
    been compiled; so it is looked for, not imported.
    """
    compiler = sys.modules.get("torch._dynamo.eval_frame")
    kind: type[nn.Module] | None = getattr(compiler, "OptimizedModule", None)
    if kind is None or not isinstance(module, kind):
        return None
    return module._modules["_orig_mod"]
