"""A weight that somebody's code may normalise, and what that code gives for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..names import is_named_as_vector, plain_name
from .sandbox import compute_in_sandbox, copied_attributes
from .singular_vectors import fits, is_multiple, is_rescaled


@dataclass(frozen=True)
class Candidate:
    """A raw weight with what may be its singular vectors; no family decides without `confirm`.

    Attributes:
        tensor: name of the weight in the plain network.
        raw: name of the parameter that the optimizer trains.
        weight: that parameter.
        state: names of what could be singular vectors and sigma.
        is_certain: whether vectors by their names fit the matrix of a weight that is missing. Then
            the code may do more than to divide.
    """

    tensor: str
    raw: str
    weight: Tensor
    state: tuple[str, ...] = ()
    is_certain: bool = False

    def confirm(
        self, run: Callable[[], Any], modules: Iterable[nn.Module], holder: object = None
    ) -> Tensor | None:
        """Return the normalised weight that the user's code gives, or None.

        Args:
            run: calls that code, which finds copies of what it may write. Whatever it raises
                means that the module is not what it looked like.
            modules: those whose code may run.
            holder: an object with attributes that it may write too, such as a hook.
        """
        try:
            with nullcontext() if holder is None else copied_attributes(holder):
                value = compute_in_sandbox(run, modules)
        except Exception:
            return None
        return value if self.accepts(value) else None

    def accepts(self, value: Any) -> bool:
        """Whether ``value`` is the raw weight, normalised.

        Each row or column may have a factor of its own where there are vectors, as heads and
        groups do that are normalised one by one; without vectors that is weight norm.
        """
        if not isinstance(value, Tensor) or value.shape != self.weight.shape:
            return False
        has_vectors = any(map(is_named_as_vector, self.state))
        compare = is_rescaled if has_vectors else is_multiple
        return self.is_certain or compare(self.weight, value)


def missing_weights(layer: nn.Module, operators: bool = False) -> Iterator[Candidate]:
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
        yield Candidate(tensor, raw, value, state, any(map(is_named_as_vector, fitting)))


def _is_flat(name: str, entry: torch.Tensor) -> bool:
    """Whether ``entry`` is named as a vector and is one, or one image; no low-rank factor."""
    is_single = entry.ndim == 1 or (entry.ndim > 1 and entry.shape[0] == 1)
    return is_named_as_vector(name) and is_single and not entry.requires_grad
