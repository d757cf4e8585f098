"""A site: one tensor of one module that is computed rather than stored."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, Protocol, TypeVar

from torch import Tensor, nn

from ..text import name_dtype, qualify
from .edits import Edits
from .info import Group, ParametrizationInfo, SpectralNormInfo

M = TypeVar("M", bound=nn.Module)

# ``module.__dict__`` in a third of the time where each module has a class of its own: Python looks
# through the class for any name, and its cache of types does not hold thousands of them.
get_attributes: Callable[[nn.Module], dict[str, Any]] = vars(nn.Module)["__dict__"].__get__


class Site(ABC):
    """One tensor that is computed; every method but `plan` leaves the model as it is.

    Attributes:
        path: qualified name of the module.
        module: holds the tensor.
        attributes: the module's own, by `get_attributes`.
        tensor: its name in the module.
        unapplied: why no forward uses the computed value; empty where one does.
    """

    __slots__ = ("attributes", "module", "path", "tensor", "unapplied")
    kind: ClassVar[str]
    group: Group = "spectral_norm"

    def __init__(self, path: str, module: nn.Module, tensor: str) -> None:
        self.path = path
        self.module = module
        self.attributes = get_attributes(module)
        self.tensor = tensor
        self.unapplied = ""

    @property
    def name(self) -> str:
        """Qualified name of the tensor."""
        return qualify(self.path, self.tensor)

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
    def caller(self) -> nn.Module | None:
        """The module whose call sets the tensor; None where reading it computes it."""
        return None

    @property
    def keeps_raw_name(self) -> bool:
        """Whether the raw parameter has the name of the weight: other code may read it raw."""
        return False

    @property
    def is_applied(self) -> bool:
        """Whether a forward pass of the model uses the computed value at all."""
        return not self.unapplied

    def get_value_in_use(self) -> Tensor:
        """Return the tensor that stands there now, which a forward reads if nothing computes it."""
        in_use: Tensor = getattr(self.module, self.tensor)
        return in_use.detach().clone()

    @abstractmethod
    def value(self) -> Tensor:
        """Return the weight that an eval-mode forward would use now, without side effect."""

    @abstractmethod
    def plan(self, edits: Edits, frozen: Tensor) -> None:
        """Add the edits that put ``frozen`` in the place of the computed tensor."""

    def register(self, edits: Edits, frozen: Tensor) -> None:
        """Plan to hold ``frozen`` where the plain network does: a weight stands before its bias.

        Parameters ``{"bias": b}`` become ``{"weight": frozen, "bias": b}``.
        """
        name = self.tensor
        kind = "_parameters" if isinstance(frozen, nn.Parameter) else "_buffers"
        content = edits.edit(self.attributes[kind])
        content[name] = frozen
        successor = name.replace("weight", "bias")
        if successor in content and successor != name:
            names = list(content)
            for later in names[names.index(successor) : names.index(name)]:
                content[later] = content.pop(later)

    def make_matrix(self) -> Tensor | None:
        """Return the raw weight as the matrix whose norm sigma estimates; None if it is none."""
        return None

    def describe(self) -> SpectralNormInfo | ParametrizationInfo:
        """Return what `find_spectral_norm` lists; of other groups what `make_info` returns."""
        return self.make_info(self.value())

    def make_norm_info(
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
            dtype=name_dtype(tensor),
            dim=dim,
            eps=eps,
            n_power_iterations=n_power_iterations,
            sigma=sigma,
            is_applied=self.is_applied,
        )

    def make_info(self, value: Tensor) -> ParametrizationInfo:
        """Return what `find_parametrizations` lists.

        Args:
            value: what `value` returned.
        """
        return ParametrizationInfo(
            module=self.path,
            tensor=self.tensor,
            kind=self.group,
            shape=tuple(value.shape),
            dtype=name_dtype(value),
            is_applied=self.is_applied,
        )

    def follow_mode(self, training: bool) -> None:  # noqa: B027
        """Give hidden submodules the train/eval mode that the module got while it was frozen."""


Found = tuple[nn.Module, list[Site]]


class Kind(Protocol):
    """An implementation of a reparametrization: finds its sites in one module."""

    def __call__(self, path: str, module: nn.Module) -> Iterable[Site]:
        """Return the sites of ``module`` itself, not of its children."""
        ...


def require_module(model: M) -> M:
    """Return ``model`` if it is a module, and raise a TypeError that says what it is if not."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    return model


def find_owner_of_state_hook(entry: Any) -> Any:
    """Return the pre-hook that a hook on the state dict belongs to, if it is one of torch's."""
    return getattr(getattr(entry, "hook", entry), "fn", None)
