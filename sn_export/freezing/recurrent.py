"""LSTM, GRU and RNN read their weights from ``_flat_weights``, a list of their own."""

from __future__ import annotations

import weakref

from torch import Tensor, nn

from .undo import Edits


def plan_flat_weights(edits: Edits, module: nn.Module, frozen: dict[str, Tensor]) -> None:
    """Give ``module`` a list of flat weights with the frozen tensors of one module in it.

    A new list, so that the module's own list object comes back unchanged. The weak
    references beside it tell the module that its weights are the ones of the last forward.
    """
    if not isinstance(module, nn.RNNBase):
        return
    names = module._flat_weights_names
    flat = [frozen.get(name, w) for name, w in zip(names, module._flat_weights, strict=True)]
    attributes = edits.of(module.__dict__)
    attributes.added["_flat_weights"] = flat
    attributes.added["_flat_weight_refs"] = [None if w is None else weakref.ref(w) for w in flat]
    parameters = edits.of(module._parameters)
    position = {name: index for index, name in enumerate(names)}
    parameters.order = sorted(parameters.remaining(), key=lambda n: position.get(n, len(names)))
