"""Hook, parametrization and plain: one spectral norm spelled three ways, without model code."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import CheckpointError
from ..text import qualified
from .content import StateDict
from .dims import decide_dim, fitting_dims
from .lazy_tensors import Spec, is_tensor, spec_of
from .stored_norms import Spelling, StoredNorm, find_sites
from .torch_norm import TorchNorm


@dataclass(frozen=True)
class Entry:
    """One value of a state dict to be: what it will be, and how to get it when it is needed.

    Attributes:
        spec: dtype and shape; None for an extra state, which may be anything.
        read: returns the value.
    """

    spec: Spec | None
    read: Callable[[], Any]


@dataclass(frozen=True)
class Respelled:
    """A state dict in another spelling; values are read and computed one at a time.

    Attributes:
        entries: what it holds, by key, in the order of a network that is spelled so.
        versions: the versions that `torch.nn.Module.state_dict` would note.
        changed: the sites that were spelled differently before.
    """

    entries: Mapping[str, Entry]
    versions: Mapping[str, Any] | None
    changed: tuple[StoredNorm, ...]


def respell(
    state: StateDict,
    to: Spelling | Mapping[str, Spelling],
    dims: Mapping[str, int] | None = None,
) -> Respelled:
    """Return ``state`` with its spectral norms spelled as ``to``, bit for bit the same network.

    Nothing but the tensors under spectral norm changes. A plain weight is the one that an
    eval-mode forward uses, computed by torch's own classes.

    Args:
        state: the state dict; its tensors may be read lazily.
        to: the spelling, or one for each qualified name; a tensor that is not named stays.
        dims: dims of square weights, by qualified name, where vectors cannot tell.

    Raises:
        CheckpointError: if a site is incomplete or cannot be spelled so. Errors in values
            are raised when these are read.
    """
    tensors = state.tensors
    sites = find_sites(tensors)
    wanted = {
        site.name: to if isinstance(to, str) else to.get(site.name, site.kind) for site in sites
    }
    changed = [site for site in sites if wanted[site.name] != site.kind or site.normalised]
    spelled: dict[str, dict[str, Entry]] = {}
    for site in changed:
        _require_possible(site, wanted[site.name], tensors)
        spelled[site.weight] = _entries(site, wanted[site.name], tensors, dims or {})
        for name in spelled[site.weight]:
            if name in tensors and name not in site.keys:
                raise CheckpointError(f"cannot spell '{site.weight}' as '{name}': it exists")
    entries: dict[str, Entry] = {}
    gone = {key for site in changed for key in site.keys}
    early = {
        _successor(site): site.weight
        for site in changed
        if wanted[site.name] == "plain" and _successor(site) in tensors
    }
    for key in tensors:
        if key in early:
            # Already there where the raw weight stands before the bias, as in a sorted file.
            entries.update(spelled.pop(early[key], {}))
        if key in spelled:
            entries.update(spelled.pop(key))
        elif key not in gone:
            entries[key] = _kept(tensors, key)
    versions = None
    if state.versions is not None:
        versions = _versions(state.versions, changed, wanted)
    return Respelled(entries, versions, tuple(changed))


def plain_value(
    site: StoredNorm, tensors: Mapping[str, Any], dims: Mapping[str, int]
) -> torch.Tensor:
    """Return the weight that an eval-mode forward uses, as torch computes it.

    Raises:
        CheckpointError: if the dim cannot be told, or the weight would not be finite.
    """
    norm = TorchNorm(site, tensors)
    _require_finite(norm)
    candidates = fitting_dims(norm)
    if len(candidates) > 1 or site.name in dims:
        candidates = [decide_dim(norm, dims)]
    value = norm.value(candidates[0])
    if not bool(torch.isfinite(value).all()):
        raise zero_sigma(site)
    return value


def zero_sigma(site: StoredNorm) -> CheckpointError:
    """Return the error about a weight that cannot be divided by its sigma."""
    return CheckpointError(
        f"sigma of '{site.name}' is 0 or too small to divide by, so its normalised weight would "
        "not be finite"
    )


def _entries(
    site: StoredNorm, to: Spelling, tensors: Mapping[str, Any], dims: Mapping[str, int]
) -> dict[str, Entry]:
    weight = spec_of(tensors, site.weight)
    if to == "plain":
        return {site.name: Entry(weight, lambda: plain_value(site, tensors, dims))}
    u = spec_of(tensors, site.u)
    columns = math.prod(weight.shape) // max(math.prod(u.shape), 1)
    v = spec_of(tensors, site.v) if site.v is not None else Spec(u.dtype, (columns,))
    if to == "hook":
        names = [f"{site.name}_{part}" for part in ("orig", "u", "v")]
    else:
        chain = qualified(site.module, f"parametrizations.{site.tensor}")
        names = [f"{chain}.original", f"{chain}.0._u", f"{chain}.0._v"]
    reads = (
        lambda: _finite(site, tensors, site.weight),
        lambda: _finite(site, tensors, site.u),
        lambda: _right_vector(site, tensors, dims),
    )
    return {
        name: Entry(spec, read)
        for name, spec, read in zip(names, (weight, u, v), reads, strict=True)
    }


def _kept(tensors: Mapping[str, Any], key: str) -> Entry:
    if not is_tensor(tensors, key):
        return Entry(None, lambda: tensors[key])
    return Entry(spec_of(tensors, key), lambda: tensors[key])


def _right_vector(site: StoredNorm, tensors: Mapping[str, Any], dims: Mapping[str, int]) -> Any:
    if site.v is not None and site.normalised is None:
        return _finite(site, tensors, site.v)
    norm = TorchNorm(site, tensors)
    return norm.right_vector(decide_dim(norm, dims))


def _require_possible(site: StoredNorm, to: Spelling, tensors: Mapping[str, Any]) -> None:
    reason = site.blocked
    dtype = spec_of(tensors, site.weight).dtype
    if not reason and to != site.kind and to != "plain":
        if len(site.shape) == 1:
            reason = "torch's parametrization treats a vector in another way than its hook does"
        elif dtype.is_complex:
            reason = "torch's parametrization conjugates u and its hook does not"
    if reason:
        raise CheckpointError(f"cannot spell '{site.name}' as {to}: {reason}")


def _require_finite(norm: TorchNorm) -> None:
    site = norm.site
    for key, tensor in ((site.weight, norm.weight), (site.u, norm.u), (site.v, norm.v)):
        if key is not None and tensor is not None:
            require_finite(key, tensor)


def require_finite(key: str, tensor: torch.Tensor) -> None:
    """Raise a CheckpointError that names ``key`` if a floating value is NaN or infinite."""
    if not tensor.dtype.is_floating_point and not tensor.dtype.is_complex:
        return
    if tensor.dtype.itemsize == 1:  # float8 knows no isfinite
        tensor = tensor.float()
    finite = torch.isfinite(tensor)
    if not bool(finite.all()):
        raise CheckpointError(
            f"'{key}' holds {int((~finite).sum())} of {tensor.numel()} values that are NaN or "
            "infinite"
        )


def _finite(site: StoredNorm, tensors: Mapping[str, Any], key: str) -> Any:
    tensor = tensors[key]
    require_finite(key, tensor)
    return tensor


def _successor(site: StoredNorm) -> str:
    # A plain network's weight stands before its bias; a normalised one's was added last.
    name = site.tensor.replace("weight", "bias")
    return qualified(site.module, name) if name != site.tensor else ""


def _versions(
    before: Mapping[str, Any], changed: list[StoredNorm], wanted: Mapping[str, Spelling]
) -> dict[str, Any]:
    after = copy.deepcopy(before)
    assert isinstance(after, dict)
    for site in changed:
        for path in _forgotten(after, site):
            del after[path]
        norms = after.get(site.module, {}).get("spectral_norm", {})
        norms.pop(f"{site.tensor}.version", None)
        if wanted[site.name] == "hook":
            own = after.setdefault(site.module, {}).setdefault("spectral_norm", {})
            own[f"{site.tensor}.version"] = 1
        elif wanted[site.name] == "parametrization":
            chains = qualified(site.module, "parametrizations")
            paths = (chains, f"{chains}.{site.tensor}", f"{chains}.{site.tensor}.0")
            _insert(after, site.module, [path for path in paths if path not in after])
        if not after.get(site.module, {}).get("spectral_norm", True):
            del after[site.module]["spectral_norm"]
    return after


def _insert(versions: dict[str, Any], module: str, paths: list[str]) -> None:
    """Add ``paths`` behind everything in ``module``, where its last child would stand."""
    known = list(versions)
    inside = [
        i for i, path in enumerate(known) if not module or f"{path}.".startswith(f"{module}.")
    ]
    behind = known[inside[-1] + 1 :] if inside else []
    later = {path: versions.pop(path) for path in behind}
    versions.update({path: {"version": 1} for path in paths})
    versions.update(later)


def _forgotten(versions: Mapping[str, Any], site: StoredNorm) -> Iterator[str]:
    if site.kind != "parametrization":
        return
    chains = qualified(site.module, "parametrizations")
    own = f"{chains}.{site.tensor}"
    gone = [path for path in versions if path == own or path.startswith(own + ".")]
    yield from gone
    left = [path for path in versions if path.startswith(chains + ".") and path not in gone]
    if not left and chains in versions:
        yield chains
