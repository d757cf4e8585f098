"""Layers that lack a weight and hold, under names derived from it, what it is computed from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..vectors import fits, is_named_as_vector

SUFFIXES = ("_bar", "_orig", "_raw", "_org")


class MissingWeight(NamedTuple):
    """A weight that a layer has not got.

    Attributes:
        tensor: its name.
        raw: name of the parameter that the optimizer trains.
        value: that parameter.
        state: names of what could be singular vectors and sigma, in the layer.
        is_matrix: whether one that is named as a vector fits the matrix of the weight.
    """

    tensor: str
    raw: str
    value: Tensor
    state: tuple[str, ...]
    is_matrix: bool = True


def plain_name(raw: str) -> str:
    """Return ``raw`` without its suffix; without a suffix it stays."""
    return next((raw.removesuffix(s) for s in SUFFIXES if raw.endswith(s)), raw) or raw


def missing_weights(layer: nn.Module, operators: bool = False) -> Iterator[MissingWeight]:
    """Yield the weights that ``layer`` lacks and has the raw parameter of.

    Args:
        layer: where to look.
        operators: take vectors by their names alone, too. Those of a convolution as an operator
            have the sizes of its input and output.
    """
    for raw, value in layer._parameters.items():
        tensor = plain_name(raw)
        if value is None or is_lazy(value) or tensor in layer._parameters or tensor == raw:
            continue
        beside = {
            name: entry
            for container in (layer._parameters, layer._buffers)
            for name, entry in container.items()
            if entry is not None and name != raw and name.startswith(tensor + "_")
        }
        fitting = {name for name, entry in beside.items() if fits(name, entry, value)}
        state = tuple(
            name
            for name, entry in beside.items()
            if entry.numel() == 1 or name in fitting or (operators and _is_flat(name, entry))
        )
        yield MissingWeight(tensor, raw, value, state, any(map(is_named_as_vector, fitting)))


def _is_flat(name: str, entry: Tensor) -> bool:
    """Whether ``entry`` is named as a vector and is one, or one image; no low-rank factor."""
    is_single = entry.ndim == 1 or (entry.ndim > 1 and entry.shape[0] == 1)
    return is_named_as_vector(name) and is_single and not entry.requires_grad
