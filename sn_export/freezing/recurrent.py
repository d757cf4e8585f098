"""LSTM, GRU and RNN read their weights from ``_flat_weights``, a list of their own."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

from torch import Tensor, nn

from .frozen import FrozenWeight
from .undo import Edits


def plan_flat_weights(edits: Edits, weights: Iterable[FrozenWeight]) -> None:
    """Give every recurrent module among the sites a list of flat weights with the frozen ones.

    A new list, so that the module's own list object comes back unchanged. The weak
    references beside it tell the module that its weights are the ones of the last forward.
    """
    recurrent: dict[nn.RNNBase, dict[str, Tensor]] = {}
    for weight in weights:
        module = weight.site.module
        if isinstance(module, nn.RNNBase):
            recurrent.setdefault(module, {})[weight.site.tensor] = weight.tensor
    for module, frozen in recurrent.items():
        _plan_module(edits, module, frozen)


def _plan_module(edits: Edits, module: nn.RNNBase, frozen: dict[str, Tensor]) -> None:
    names = module._flat_weights_names
    flat = [frozen.get(name, w) for name, w in zip(names, module._flat_weights, strict=True)]
    attributes = edits.of(module.__dict__)
    attributes.added["_flat_weights"] = flat
    attributes.added["_flat_weight_refs"] = [None if w is None else weakref.ref(w) for w in flat]
    parameters = edits.of(module._parameters)
    position = {name: index for index, name in enumerate(names)}
    parameters.order = sorted(parameters.remaining(), key=lambda n: position.get(n, len(names)))
