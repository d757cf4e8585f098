"""The records of `find_spectral_norm` and `find_parametrizations`. They need no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from ..text import qualify

Group = Literal["spectral_norm", "weight_norm", "orthogonal", "parametrization", "pruning"]

GROUPS: tuple[Group, ...] = get_args(Group)


@dataclass(frozen=True)
class ParametrizationInfo:
    """The record of one tensor that `find_parametrizations` returns.

    Attributes:
        module: qualified name of the module, ``""`` for the root.
        tensor: name of the tensor in that module, such as ``"weight"``.
        kind: ``"spectral_norm"`` (of any implementation, anywhere in a chain),
            ``"orthogonal"``, ``"weight_norm"`` (hook or parametrization), ``"parametrization"``
            for a chain without these, or ``"pruning"``.
        shape: shape of the tensor that the network uses.
        dtype: its dtype, such as ``"float32"``.
        is_applied: False where the network never runs the hook: on the ``out_proj`` of
            `torch.nn.MultiheadAttention` or a `torch.nn.ParameterList`, which nothing calls.
    """

    module: str
    tensor: str
    kind: Group
    shape: tuple[int, ...]
    dtype: str
    is_applied: bool = True

    @property
    def name(self) -> str:
        """Qualified name of the tensor."""
        return qualify(self.module, self.tensor)


@dataclass(frozen=True)
class UnconvergedSigma:
    """A stored sigma that is far below the true one.

    Attributes:
        name: qualified name of the tensor.
        stored: ``u^H W v`` from the stored singular vectors.
        true: the largest singular value of the weight matrix.
        is_exact: False where ``true`` is only a lower bound.
    """

    name: str
    stored: float
    true: float
    is_exact: bool

    def __str__(self) -> str:
        """Return it as ``'fc.weight': stored 0.0019, true 1.13``."""
        least = "" if self.is_exact else "at least "
        return f"'{self.name}': stored {self.stored:.3g}, true {least}{self.true:.3g}"


@dataclass(frozen=True)
class SpectralNormInfo:
    """The record of one tensor that `find_spectral_norm` returns.

    Attributes:
        module: qualified name of the module, ``""`` for the root.
        tensor: name of the tensor in that module, such as ``"weight"``.
        kind: the implementation of spectral norm: torch's ``"hook"`` or ``"parametrization"``;
            handwritten as a ``"wrapper"`` that sets the weight of a layer, a ``"prehook"`` that
            does so, or a ``"mixin"`` that normalises in forward; or the class of an adapter.
        shape: shape of the tensor that the network uses.
        dtype: its dtype, such as ``"float32"``.
        dim: the dimension that becomes the rows of the weight matrix.
        eps: added to norms for stability; None where the implementation has none.
        n_power_iterations: power iterations per forward in train mode; None for a
            vector, whose norm needs no iteration.
        sigma: ``u^H W v`` from the stored singular vectors; of handwritten kinds what the next
            eval forward divides by. NaN on the meta device, and where only an adapter knows.
        is_applied: False where the network never uses the normalised weight: a hook on the
            ``out_proj`` of `torch.nn.MultiheadAttention`, or on a `torch.nn.ParameterList`, which
            are never called.
        sigma_exact: the largest singular value of the weight matrix; None where it was not
            asked for, would take too long, or sigma is no norm of a matrix.
    """

    module: str
    tensor: str
    kind: str
    shape: tuple[int, ...]
    dtype: str
    dim: int
    eps: float | None
    n_power_iterations: int | None
    sigma: float = math.nan
    is_applied: bool = True
    sigma_exact: float | None = None

    @property
    def name(self) -> str:
        """Qualified name of the tensor."""
        return qualify(self.module, self.tensor)
