"""Where spectral norm is in a state dict, told by its keys alone."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import CheckpointError
from ..freezing import STATE_BESIDE, plain_name
from ..results import Spelling as Spelling
from ..text import qualified, quote_names
from .lazy_tensors import is_tensor, spec_of

_ORIGINAL = re.compile(r"(?:(?P<module>.*)\.)?parametrizations\.(?P<tensor>[^.]+)\.original")
_LINK = re.compile(r"(?P<chain>(?:.*\.)?parametrizations\.[^.]+)\.(?P<index>\d+)\..*")


@dataclass(frozen=True)
class StoredNorm:
    """One tensor under spectral norm, as a state dict spells it.

    Attributes:
        module: qualified name of the module, ``""`` for the root.
        tensor: name of the tensor in it.
        kind: the spelling: torch's hook or torch's parametrization.
        shape: shape of the tensor.
        weight: key of the raw weight.
        u: key of the left vector.
        v: key of the right vector; None where the checkpoint is from before torch kept it.
        normalised: key of the normalised weight in such a checkpoint, else None.
        blocked: why its value cannot be known without the model's code; empty if it can.
    """

    module: str
    tensor: str
    kind: Literal["hook", "parametrization"]
    shape: tuple[int, ...]
    weight: str
    u: str
    v: str | None
    normalised: str | None = None
    blocked: str = ""

    @property
    def name(self) -> str:
        """Qualified name of the tensor, its key in the plain network."""
        return qualified(self.module, self.tensor)

    @property
    def keys(self) -> tuple[str, ...]:
        """All keys of the state dict that belong to it."""
        return tuple(k for k in (self.weight, self.u, self.v, self.normalised) if k is not None)


def find_sites(tensors: Mapping[str, Any]) -> list[StoredNorm]:
    """Return every tensor under spectral norm, in the order of the keys.

    Raises:
        CheckpointError: if a part of one is missing.
    """
    links = _links(tensors)
    sites = []
    for key in tensors:
        if key.endswith("_orig"):
            site = _hook(tensors, key)
        elif match := _ORIGINAL.fullmatch(key):
            site = _parametrization(tensors, key, match, links)
        else:
            continue
        if site is not None:
            sites.append(site)
    return sites


def _hook(tensors: Mapping[str, Any], key: str) -> StoredNorm | None:
    name = key.removesuffix("_orig")
    u, v = name + "_u", name + "_v"
    if u not in tensors and v not in tensors:
        return None  # pruning also says '_orig'
    if u not in tensors or not (v in tensors or name in tensors):
        raise CheckpointError(
            f"the spectral norm of '{name}' is incomplete: there is '{key}' without "
            f"'{v if u in tensors else u}'"
        )
    module, _, tensor = name.rpartition(".")
    blocked = ""
    if name + "_sigma" in tensors:
        blocked = f"'{name}_sigma' beside it belongs to a class of its own, not to torch's hook"
    elif name + "_mask" in tensors:
        blocked = f"'{name}_mask' beside it says that it is also pruned"
    return StoredNorm(
        module,
        tensor,
        "hook",
        spec_of(tensors, key).shape,
        key,
        u,
        v if v in tensors else None,
        name if name in tensors else None,
        blocked,
    )


def _parametrization(
    tensors: Mapping[str, Any], key: str, match: re.Match[str], links: Mapping[str, set[int]]
) -> StoredNorm | None:
    chain = key.removesuffix(".original")
    norms = [i for i in sorted(links.get(chain, ())) if f"{chain}.{i}._u" in tensors]
    if not norms:
        return None
    index, others = norms[0], sorted(links[chain] - {norms[0]})
    u, v = f"{chain}.{index}._u", f"{chain}.{index}._v"
    if v not in tensors:
        raise CheckpointError(
            f"the spectral norm of '{qualified(match['module'] or '', match['tensor'])}' is "
            f"incomplete: there is '{u}' without '{v}'"
        )
    blocked = ""
    if others or index:
        blocked = "it is one of several parametrizations in a chain"
    return StoredNorm(
        match["module"] or "",
        match["tensor"],
        "parametrization",
        spec_of(tensors, key).shape,
        key,
        u,
        v,
        None,
        blocked,
    )


def _links(keys: Iterable[str]) -> dict[str, set[int]]:
    links: dict[str, set[int]] = {}
    for key in keys:
        if match := _LINK.fullmatch(key):
            links.setdefault(match["chain"], set()).add(int(match["index"]))
    return links


def handwritten_norms(tensors: Mapping[str, Any]) -> list[str]:
    """Return the keys of the weights that look to be under a handwritten spectral norm.

    Known are ``weight_bar`` with ``weight_u``; ``weight`` with ``weight_u`` but without the
    ``weight_orig`` of torch's hook; and ``weight`` with ``u0`` and ``sv0``, with ``sn_u`` and
    ``sn_sigma``, or with a ``u`` of as many elements as it has rows.
    """
    return [key for key in tensors if _is_handwritten(tensors, key)]


def handwritten_notes(tensors: Mapping[str, Any]) -> tuple[str, ...]:
    """Return a sentence about `handwritten_norms`, or nothing where there are none."""
    found = handwritten_norms(tensors)
    if not found:
        return ()
    verb = "looks" if len(found) == 1 else "look"
    return (
        f"{quote_names(found)} {verb} like handwritten spectral norm, which is left as it is: "
        "only the model's code can tell the weight in use, and 'sn-export onnx' runs that",
    )


def _is_handwritten(tensors: Mapping[str, Any], key: str) -> bool:
    start, dot, name = key.rpartition(".")
    plain = plain_name(name)
    if plain != name and not name.endswith("_orig"):  # which is torch's hook
        return f"{start}{dot}{plain}_u" in tensors
    if name != "weight":
        return False
    if f"{key}_u" in tensors:
        return f"{key}_orig" not in tensors
    if any(all(start + dot + part in tensors for part in parts) for parts in STATE_BESIDE):
        return True
    u = start + dot + "u"
    if u not in tensors or not (is_tensor(tensors, key) and is_tensor(tensors, u)):
        return False
    shape, vector = spec_of(tensors, key).shape, spec_of(tensors, u).shape
    return len(shape) > 1 and max(vector, default=0) == math.prod(vector) == shape[0]
