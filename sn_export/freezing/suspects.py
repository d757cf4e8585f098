"""Modules that look like a spectral norm that no kind and no adapter knows."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from .code import code_of, is_torch_layer, mentioned
from .frozen_class import Frozen
from .plan import Found
from .vectors import fits, is_named_as_vector, matrices, small_state

_NAMED = re.compile(r"spectral_?norm|spectrally|(^|_)SN(?=[A-Z_0-9]|$)|^sn_|[a-z]SN$", re.ASCII)
_ARITHMETIC = {"svd", "svdvals", "svd_lowrank", "matrix_norm", "power_iteration", "lobpcg"}
_SIGMA = {"sigma", "l2normalize", "_l2normalize", "max_singular_value", "spectral_norm"}


@dataclass(frozen=True)
class SpectralNormSuspect:
    """A module that looks like spectral norm and that the block leaves as it is.

    Attributes:
        module: qualified name of the module, ``""`` for the root.
        class_name: name of its class.
        reason: what makes it look so.
    """

    module: str
    class_name: str
    reason: str

    def __str__(self) -> str:
        return f"'{self.module}' ({self.class_name}: {self.reason})"


def suspects_in(model: nn.Module, found: Iterable[Found]) -> list[SpectralNormSuspect]:
    """Return the modules of a walk that look like spectral norm and have no site."""
    found = list(found)
    if all(is_torch_layer(type(module)) for module, _ in found):
        return []
    claimed = {id(module) for module, sites in found if sites}
    claimed |= {id(site.module) for _, sites in found for site in sites}
    reasons = {
        id(module): reason
        for module, sites in found
        if not sites and (reason := _reason(module, claimed))
    }
    if not reasons:
        return []
    return [
        SpectralNormSuspect(path, type(module).__name__, reasons[id(module)])
        for path, module in model.named_modules()
        if id(module) in reasons
    ]


def describe_suspects(suspects: Iterable[SpectralNormSuspect]) -> str:
    """Return the text of the warning about ``suspects``."""
    suspects = list(suspects)
    shown = ", ".join(map(str, suspects[:5]))
    more = f" and {len(suspects) - 5} more" if len(suspects) > 5 else ""
    verb = "looks" if len(suspects) == 1 else "look"
    return (
        f"{shown}{more} {verb} like a spectral norm that is not known, and is left as it is. "
        "Describe it by an adapter, see sn_export.register_spectral_norm"
    )


def _reason(module: nn.Module, claimed: set[int]) -> str | None:
    if is_torch_layer(type(module)):
        return None
    code = code_of(type(module))
    if code.is_torch or id(module) in claimed or isinstance(module, Frozen):
        return None
    named = bool(_NAMED.search(type(module).__name__))
    own = matrices(module)
    for weight_name, weight in _weights(module, own, claimed):
        for name, tensor in _state(module, weight_name):
            reads = mentioned(name, code.names)
            if fits(name, tensor, weight) and reads and (named or is_named_as_vector(name)):
                return f"'{name}' fits the singular vectors of '{weight_name}'"
    if named and own and not (_ARITHMETIC | _SIGMA).isdisjoint(code.mentions(code.forward)):
        return f"its name, and it computes with '{next(iter(own))}'"
    return None


def _weights(
    module: nn.Module, own: dict[str, Tensor], claimed: set[int]
) -> Iterator[tuple[str, Tensor]]:
    yield from own.items()
    for child, layer in module._modules.items():
        if layer is None or id(layer) in claimed or not code_of(type(layer)).is_torch:
            continue
        if not layer._modules:
            yield from ((f"{child}.{name}", weight) for name, weight in matrices(layer).items())


def _state(module: nn.Module, weight: str) -> Iterator[tuple[str, Tensor]]:
    yield from small_state(module)
    child, _, _ = weight.rpartition(".")
    if child:
        layer = module._modules[child]
        assert layer is not None
        yield from ((n, t) for n, t in small_state(layer) if is_named_as_vector(n))
