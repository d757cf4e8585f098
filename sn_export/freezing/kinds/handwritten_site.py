"""What the handwritten families share: a site whose module has answered already."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn

from ..edits import Edits
from ..info import SpectralNormInfo
from ..introspection.singular_vectors import proportion
from ..names import ITERATIONS
from ..site import Site


@dataclass(frozen=True)
class Answer:
    """What a module said when it was asked.

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
        self.owner = owner  # of the code

    @property
    def sources(self) -> Iterable[Tensor]:
        """The raw weight, and what is kept of its singular vectors."""
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
        """So it is with what the module's own forward normalises."""
        return self.answer.raw == self.tensor

    def value(self) -> Tensor:
        """Return what the module answered when it was found."""
        return self.answer.value if self.is_applied else self.value_in_use()

    def take_away(self, edits: Edits) -> None:
        """Plan to remove what the weight is computed from, and the one that code has set."""
        module = self.module
        for container in (module._parameters, module._buffers):
            edits.remove(container, (self.answer.raw, *self.answer.state))
        for container in (module.__dict__, module._buffers):
            edits.remove(container, (self.tensor,))

    def describe(self) -> SpectralNormInfo:
        """Return what `find_spectral_norm` lists; sigma is what an eval forward divides by."""
        raw = next(iter(self.sources))
        value = self.answer.value
        return self.norm_info(
            value,
            dim=self._dim(raw),
            n_power_iterations=self._iterations(),
            sigma=_sigma(raw, value),
        )

    def _dim(self, raw: Tensor) -> int:
        lengths = {max(t.shape) for t in self.sources if t is not raw and t.ndim in (1, 2)}
        return 1 if raw.shape[1] in lengths and raw.shape[0] not in lengths else 0

    def _iterations(self) -> int | None:
        for name in ITERATIONS:
            count = getattr(self.owner, name, None)
            if isinstance(count, int):
                return count
        return None


def _sigma(raw: Tensor, value: Tensor) -> float:
    if raw.is_meta:
        return float("nan")
    sigma = proportion(raw, value)
    return float("nan") if sigma is None else sigma
