"""A site: one tensor of one module that is computed rather than stored."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol, TypeVar, get_args

from torch import Tensor, nn

from ..text import dtype_name, qualified
from .undo import Edits

M = TypeVar("M", bound=nn.Module)
Group = Literal["spectral_norm", "weight_norm", "orthogonal", "parametrization", "pruning"]
GROUPS: tuple[Group, ...] = get_args(Group)


@dataclass(frozen=True)
class ParametrizationInfo:
    """What `find_parametrizations` tells about one tensor.

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
        return qualified(self.module, self.tensor)


@dataclass(frozen=True)
class SpectralNormInfo:
    """What `find_spectral_norm` tells about one tensor.

    Attributes:
        module: qualified name of the module, ``""`` for the root.
        tensor: name of the tensor in that module, such as ``"weight"``.
        kind: the implementation of spectral norm: torch's ``"hook"`` or ``"parametrization"``;
            handwritten as a ``"wrapper"`` that sets the weight of a layer, a ``"prehook"`` that
            does so, or a ``"mixin"`` that normalises in forward; or the class of an adapter.
        shape: shape of the tensor.
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
        return qualified(self.module, self.tensor)


class Site(ABC):
    """One tensor that is computed; every method but `plan` leaves the model as it is."""

    __slots__ = ("module", "path", "tensor")
    kind: ClassVar[str]
    group: Group = "spectral_norm"

    def __init__(self, path: str, module: nn.Module, tensor: str) -> None:
        self.path = path
        self.module = module
        self.tensor = tensor

    @property
    def name(self) -> str:
        """Qualified name of the tensor."""
        return qualified(self.path, self.tensor)

    @property
    @abstractmethod
    def sources(self) -> Iterable[Tensor]:
        """The tensors that the value is computed from."""

    @property
    def hidden(self) -> Iterable[nn.Module]:
        """Submodules that disappear with the site, so that the walk need not enter them."""
        return ()

    @property
    def is_buffer(self) -> bool:
        """Whether the plain network holds this tensor as a buffer."""
        return False

    @property
    def is_applied(self) -> bool:
        """Whether a forward pass of the model uses the computed value at all."""
        return True

    @abstractmethod
    def value(self) -> Tensor:
        """Return the weight that an eval-mode forward would use now, without side effect."""

    @abstractmethod
    def plan(self, edits: Edits, frozen: Tensor) -> None:
        """Add the edits that put ``frozen`` in the place of the computed tensor."""

    def matrix(self) -> Tensor | None:
        """Return the raw weight as the matrix whose norm sigma estimates; None if it is none."""
        return None

    def describe(self) -> SpectralNormInfo | ParametrizationInfo:
        """Return what `find_spectral_norm` lists; of other groups what `outline` returns."""
        return self.outline(self.value())

    def norm_info(
        self,
        tensor: Tensor,
        dim: int = 0,
        eps: float | None = None,
        n_power_iterations: int | None = None,
        sigma: float = math.nan,
    ) -> SpectralNormInfo:
        """Return what `find_spectral_norm` lists, with shape and dtype of ``tensor``."""
        return SpectralNormInfo(
            module=self.path,
            tensor=self.tensor,
            kind=self.kind,
            shape=tuple(tensor.shape),
            dtype=dtype_name(tensor),
            dim=dim,
            eps=eps,
            n_power_iterations=n_power_iterations,
            sigma=sigma,
            is_applied=self.is_applied,
        )

    def outline(self, value: Tensor) -> ParametrizationInfo:
        """Return what `find_parametrizations` lists.

        Args:
            value: what `value` returned.
        """
        return ParametrizationInfo(
            module=self.path,
            tensor=self.tensor,
            kind=self.group,
            shape=tuple(value.shape),
            dtype=dtype_name(value),
            is_applied=self.is_applied,
        )

    def follow_mode(self, training: bool) -> None:  # noqa: B027
        """Take over a train/eval mode that the module was given while frozen."""


class Kind(Protocol):
    """An implementation of a reparametrization: finds its sites in one module."""

    def __call__(self, path: str, module: nn.Module) -> Iterable[Site]:
        """Return the sites of ``module`` itself, not of its children."""
        ...


def plan_registration(edits: Edits, module: nn.Module, name: str, value: Tensor) -> None:
    """Register ``value`` where the plain network has it: a weight stands before its bias."""
    edit = edits.of(module._parameters if isinstance(value, nn.Parameter) else module._buffers)
    edit.added[name] = value
    successor = name.replace("weight", "bias")
    if successor != name and (successor in edit.before or successor in edit.added):
        edit.before_others = [*(edit.before_others or ()), (name, successor)]


def require_module(model: M) -> M:
    """Return ``model`` if it is a module, and raise a TypeError that says what it is if not."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    return model
