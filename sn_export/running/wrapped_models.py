"""The network within a wrapper that no exporter takes."""

from __future__ import annotations

import sys

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel


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


def unwrap_model(model: nn.Module) -> nn.Module:
    """Return the module to export: the one inside torch's wrappers, or ``model`` itself.

    `torch.nn.DataParallel` and `torch.nn.parallel.DistributedDataParallel` scatter their inputs,
    and `torch.compile` gives a module that runs compiled code; each holds the network as it is,
    with the same parameters. Nested wrappers are taken off one by one. `torch.optim.swa_utils.
    AveragedModel` is a network of its own and stays.

    Args:
        model: any module. It is not changed, and nothing is compiled.
    """
    while True:
        original = original_of(model)
        if original is not None:
            model = original
        elif isinstance(model, (DataParallel, DistributedDataParallel)):
            model = model.module
        else:
            return model
