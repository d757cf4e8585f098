"""Modules that look like a spectral norm that no kind and no adapter knows."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn

from ..errors import SpectralNormNotRecognisedWarning
from ..running import SpectralNormLink
from ..text import quote_names, shorten_list
from .introspection.candidates import (
    find_matrices,
    find_missing_weights,
    fits_weight,
    is_named_as_bounded,
    is_named_as_norm,
    is_named_as_vector,
    iter_small_state,
    mentions_norm,
    mentions_sigma,
)
from .introspection.source_code import Code, is_mentioned, is_torch_layer, read_code
from .kinds.handwritten import Frozen
from .site import Found

_TORCH = frozenset({"_u", "_v", "normalize"})  # in the code of torch's own link


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
        module = f"'{self.module}'" if self.module else "the model itself"
        return f"{module} ({self.class_name}: {self.reason})"


def find_suspects_in(model: nn.Module, found: Iterable[Found]) -> list[SpectralNormSuspect]:
    """Return the modules of a walk that look like spectral norm and have no site."""
    found = list(found)
    others = [
        module
        for module, sites in found
        if not sites and (not is_torch_layer(type(module)) or module._forward_pre_hooks)
    ]
    if not others:
        return []
    claimed = {id(site.module) for _, sites in found for site in sites}
    reasons = {
        id(module): reason
        for module in others
        if id(module) not in claimed and (reason := _find_reason(module, claimed))
    }
    if not reasons:
        return []
    return [
        SpectralNormSuspect(path, type(module).__name__, reasons[id(module)])
        for path, module in model.named_modules()
        if id(module) in reasons
    ]


def warn_of_suspects(model: nn.Module, found: Iterable[Found], stacklevel: int) -> None:
    """Warn of what `find_suspects_in` returns, as from ``stacklevel`` above the caller."""
    suspects = find_suspects_in(model, found)
    if suspects:
        text = _describe(suspects)
        warnings.warn(text, SpectralNormNotRecognisedWarning, stacklevel=stacklevel + 1)


def _describe(suspects: Sequence[SpectralNormSuspect]) -> str:
    verdict, wanted = (
        ("looks like a spectral norm that is not known, and is left as it is", "it by an adapter")
        if len(suspects) == 1
        else (
            "look like spectral norms that are not known, and are left as they are",
            "each by an adapter",
        )
    )
    return (
        f"{shorten_list(map(str, suspects))} {verdict}. Describe {wanted}, see "
        "sn_export.register_spectral_norm"
    )


def _find_reason(module: nn.Module, claimed: set[int]) -> str | None:
    if isinstance(module, Frozen):
        return None
    if module._forward_pre_hooks:
        for missing in find_missing_weights(module, operators=True):
            if any(map(is_named_as_vector, missing.state)):
                return f"a pre-hook, and '{missing.raw}' with '{missing.state[0]}'"
    code = read_code(type(module))
    if code.is_torch:
        return None
    named = is_named_as_norm(type(module).__name__)
    for pair in _find_pairs(module, claimed, code):
        if not fits_weight(pair.vector, pair.state, pair.weight):
            continue
        signs = (named, is_named_as_vector(pair.vector), mentions_norm(pair.names))
        if sum(signs) >= 2 and is_mentioned(pair.vector, pair.names):
            return f"'{pair.vector}' fits the singular vectors of '{pair.matrix}'"
    own, names = find_matrices(module), code.mentions(code.forward)
    bounded = is_named_as_bounded(type(module).__name__)
    if own and (
        (bounded and not own.keys().isdisjoint(names)) or (named and mentions_sigma(names))
    ):
        return f"its name, and it computes with '{next(iter(own))}'"
    # The norm of a convolution as an operator has vectors of the size of its input and output.
    vectors = [name for name, _ in iter_small_state(module) if is_named_as_vector(name)]
    if own and len(vectors) > 1 and mentions_norm(names):
        return f"{quote_names(vectors)} are named like singular vectors of '{next(iter(own))}'"
    return None


class _Pair(NamedTuple):
    """A possible singular vector, its possible matrix, and the names in the code of both."""

    vector: str
    state: Tensor
    matrix: str
    weight: Tensor
    names: frozenset[str]


def _find_pairs(module: nn.Module, claimed: set[int], code: Code) -> Iterator[_Pair]:
    own, beside = find_matrices(module), list(iter_small_state(module))
    yield from _find_products(beside, own, code.names)
    for child, layer in module._modules.items():
        if layer is None or id(layer) in claimed or layer._modules:
            continue
        inside = [(name, t) for name, t in iter_small_state(layer) if is_named_as_vector(name)]
        if is_torch_layer(type(layer)):  # wrapped, perhaps
            weights = {f"{child}.{name}": weight for name, weight in find_matrices(layer).items()}
            yield from _find_products([*beside, *inside], weights, code.names)
        else:  # a helper that is given the weight, perhaps
            is_torch = isinstance(layer, SpectralNormLink)
            yield from _find_products(
                inside, own, _TORCH if is_torch else read_code(type(layer)).names
            )


def _find_products(
    state: Iterable[tuple[str, Tensor]], weights: dict[str, Tensor], names: frozenset[str]
) -> Iterator[_Pair]:
    for vector, tensor in state:
        for matrix, weight in weights.items():
            yield _Pair(vector, tensor, matrix, weight, names)
