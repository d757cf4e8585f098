"""The network within a wrapper that no exporter takes."""

from __future__ import annotations

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from ..compiled import original_of


def unwrapped(model: nn.Module) -> nn.Module:
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
