"""Layers that lack a weight and hold, under names derived from it, what it is computed from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..vectors import fits

SUFFIXES = ("_bar", "_orig", "_raw", "_org")


class MissingWeight(NamedTuple):
    """A weight that a layer has not got.

    Attributes:
        tensor: its name.
        raw: name of the parameter that the optimizer trains.
        value: that parameter.
        state: names of what could be singular vectors and sigma, in the layer.
    """

    tensor: str
    raw: str
    value: Tensor
    state: tuple[str, ...]


def plain_name(raw: str) -> str:
    """Return ``raw`` without its suffix; without a suffix it stays."""
    return next((raw.removesuffix(s) for s in SUFFIXES if raw.endswith(s)), raw) or raw


def missing_weights(layer: nn.Module) -> Iterator[MissingWeight]:
    """Yield the weights that ``layer`` lacks and has the raw parameter of."""
    for raw, value in layer._parameters.items():
        tensor = plain_name(raw)
        if value is None or is_lazy(value) or tensor in layer._parameters or tensor == raw:
            continue
        state = tuple(
            name
            for container in (layer._parameters, layer._buffers)
            for name, entry in container.items()
            if entry is not None
            and name != raw
            and name.startswith(tensor + "_")
            and (entry.numel() == 1 or fits(name, entry, value))
        )
        yield MissingWeight(tensor, raw, value, state)
