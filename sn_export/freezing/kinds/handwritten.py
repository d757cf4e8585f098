"""What handwritten families share: a site whose module has answered, the class of a frozen one.

Handwritten spectral norm is code, so it cannot be taken out of a module like a hook. The
instance is given a subclass of its class, under the same name, in which the methods that
normalise return the frozen weight. The user's class is shared, and stays as it is.
"""

from __future__ import annotations

import copyreg
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from ..edits import Edits
from ..info import SpectralNormInfo
from ..introspection.candidates import ITERATIONS, find_proportion
from ..introspection.source_code import find_torch_base
from ..site import Site


@dataclass(frozen=True)
class Answer:
    """What a module's own code gave when it was run.

    Attributes:
        raw: name of the parameter that the optimizer trains.
        value: the normalised weight of the next eval-mode forward.
        state: names of singular vectors and sigmas, beside ``raw``.
    """

    raw: str
    value: Tensor
    state: tuple[str, ...]


class HandwrittenSite(Site):
    """A tensor that the user's own code computes; that code was run when the site was found."""

    __slots__ = ("answer", "owner")

    def __init__(
        self, path: str, module: nn.Module, tensor: str, answer: Answer, owner: nn.Module
    ) -> None:
        super().__init__(path, module, tensor)
        self.answer = answer
        self.owner = owner  # the module whose code it is

    @property
    def sources(self) -> Iterable[Tensor]:
        """The raw weight, and the singular vectors that the module stores."""
        module, owner = self.module, self.owner
        places = (module._parameters, module._buffers, owner._parameters, owner._buffers)
        for name in (self.answer.raw, *self.answer.state):
            for container in places:
                tensor = container.get(name)
                if tensor is not None:
                    yield tensor
                    break

    @property
    def keeps_raw_name(self) -> bool:
        """True where the module's own forward normalises the parameter ``weight`` itself."""
        return self.answer.raw == self.tensor

    def value(self) -> Tensor:
        """Return what the module answered when it was found."""
        return self.answer.value if self.is_applied else self.get_value_in_use()

    def take_away(self, edits: Edits) -> None:
        """Plan to remove what the weight is computed from, and the weight that code has set."""
        for module in dict.fromkeys((self.module, self.owner)):
            for container in (module._parameters, module._buffers):
                edits.remove(container, (self.answer.raw, *self.answer.state))
        for container in (self.module.__dict__, self.module._buffers):
            edits.remove(container, (self.tensor,))

    def describe(self) -> SpectralNormInfo:
        """Return what `find_spectral_norm` lists; sigma is what an eval forward divides by."""
        raw = next(iter(self.sources))
        value = self.answer.value
        return self.make_norm_info(
            value,
            dim=self._choose_dim(raw),
            n_power_iterations=self._find_iterations(),
            sigma=_find_sigma(raw, value),
        )

    def _choose_dim(self, raw: Tensor) -> int:
        lengths = {max(t.shape) for t in self.sources if t is not raw and t.ndim in (1, 2)}
        return 1 if raw.shape[1] in lengths and raw.shape[0] not in lengths else 0

    def _find_iterations(self) -> int | None:
        for name in ITERATIONS:
            count = getattr(self.owner, name, None)
            if isinstance(count, int):
                return count
        return None


def _find_sigma(raw: Tensor, value: Tensor) -> float:
    if raw.is_meta:
        return float("nan")
    sigma = find_proportion(raw, value)
    return float("nan") if sigma is None else sigma


How = Literal["method", "property", "argument", "nothing", "call", "forward", "base"]


class Override(NamedTuple):
    """One attribute of the class of a frozen instance.

    Attributes:
        name: the attribute.
        how: what it does there. ``"method"`` and ``"property"`` return the tensor ``target``;
            ``"argument"`` returns its argument if that is the tensor ``target``; ``"nothing"``
            returns None; ``"call"`` and ``"forward"`` call the child ``target``, with its hooks
            or without; ``"base"`` is that attribute of the nearest class of torch.
        target: name of the tensor or child.
    """

    name: str
    how: How
    target: str = ""


class Frozen:
    """Marks the instances whose own spectral norm is frozen."""

    _sn_export_overrides: tuple[type, tuple[Override, ...]]

    def __init_subclass__(cls) -> None:
        """Do not call the user's ``__init_subclass__``, which may keep a registry of classes."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copy and pickle by the user's class, since this one has no importable name."""
        reduced = super().__reduce_ex__(protocol)
        if not isinstance(reduced, tuple) or reduced[0] is not copyreg.__newobj__:  # type: ignore[attr-defined]
            return reduced
        cls, overrides = type(self)._sn_export_overrides
        return (_new, (cls, overrides, *reduced[1][1:]), *reduced[2:])


def make_frozen_class(cls: type, overrides: Iterable[Override]) -> type:
    """Return a subclass of ``cls`` with its name, in which ``overrides`` are replaced."""
    overrides = tuple(overrides)
    if issubclass(cls, Frozen):  # for another tensor of the same instance
        cls, others = cls._sn_export_overrides
        overrides = (*others, *(o for o in overrides if o not in others))
    namespace: dict[str, Any] = {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "_sn_export_overrides": (cls, overrides),
    }
    for override in overrides:
        namespace[override.name] = _make_attribute(cls, override)
    # Not by calling the metaclass, which may keep a list of classes.
    new: type = type.__new__(type(cls), cls.__name__, (Frozen, cls), namespace)
    return new


def _new(cls: type, overrides: tuple[Override, ...], *args: Any) -> Any:
    new = make_frozen_class(cls, overrides)
    return new.__new__(new, *args)


def _make_attribute(cls: type, override: Override) -> Any:
    name, how, target = override
    if how == "property":
        if name == target:  # the class attribute hides the parameter of that name
            return property(lambda self: self._parameters[target])
        return property(lambda self: getattr(self, target))
    if how == "base":
        return getattr(find_torch_base(cls), name)
    original = getattr(cls, name)

    def replacement(self: Any, *args: Any, **kwargs: Any) -> Any:
        if how == "nothing":
            return None
        held = getattr(self, target)
        if how == "call":
            return held(*args, **kwargs)
        if how == "forward":
            return held.forward(*args, **kwargs)
        if how == "argument" and held is not next(iter((*args, *kwargs.values())), None):
            return original(self, *args, **kwargs)
        return held

    replacement.__name__ = name
    return replacement
