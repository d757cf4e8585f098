"""Respell a state dict: as hook, as parametrization or plain, without model code."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import CheckpointError
from ..text import qualify, quote_names
from .content import StateDict
from .kinds import find_kind
from .lazy_tensors import Entry, get_dense_spec, get_spec
from .reparametrizations import Reparametrization, Spelling, find_reparametrizations

_WITH_DIM = ("spectral_norm", "weight_norm")


@dataclass(frozen=True)
class Respelled:
    """A state dict in another spelling; values are read and computed one at a time.

    Attributes:
        entries: its values by key, in the order of a network with that spelling; where one module
            has several reparametrized tensors, theirs may stand in another order.
        versions: the versions of the modules of such a network, see `StateDict`.
        changed: the sites whose spelling was changed.
    """

    entries: Mapping[str, Entry]
    versions: Mapping[str, Any] | None
    changed: tuple[Reparametrization, ...]


def respell(
    state: StateDict,
    to: Spelling | Mapping[str, Spelling],
    dims: Mapping[str, int] | None = None,
    sites: Sequence[Reparametrization] | None = None,
) -> Respelled:
    """Return ``state`` with its reparametrizations spelled as ``to``, bit for bit the same network.

    ``{"weight_g": g, "weight_v": v}`` as a parametrization is
    ``{"parametrizations.weight.original0": g, "parametrizations.weight.original1": v}``. Only the
    reparametrized tensors change. A plain weight is the one that an eval-mode forward uses,
    computed by torch's own classes.

    Args:
        state: the state dict; its tensors may be lazy.
        to: the spelling, or one for each qualified name; a tensor that is not named stays.
        dims: dims by qualified name, which the file alone does not tell.
        sites: the sites of ``state`` that may change; None for all that are found.

    Raises:
        CheckpointError: if sites are incomplete or have no such spelling; it names each. Errors
            in values are raised when these are read.
    """
    tensors = state.tensors
    sites = find_reparametrizations(tensors, state.versions) if sites is None else sites
    wanted = {
        site.name: to if isinstance(to, str) else to.get(site.name, site.spelling) for site in sites
    }
    changed = [
        site
        for site in sites
        if wanted[site.name] != site.spelling or ("normalised" in site.keys and not site.blocked)
    ]
    _require_possible(changed, wanted, tensors)
    spelled: dict[str, dict[str, Entry]] = {}
    order = {key: number for number, key in enumerate(tensors)}
    for site in changed:
        first = min(site.keys.values(), key=order.__getitem__)
        spelled[first] = _make_entries(site, wanted[site.name], tensors, dims or {})
        for name in spelled[first]:
            if name in tensors and name not in site.keys.values():
                raise CheckpointError(f"cannot spell '{first}' as '{name}': it exists")
    entries = _order_entries(tensors, changed, wanted, spelled)
    versions = None
    if state.versions is not None:
        versions = _respell_versions(state.versions, changed, wanted)
    return Respelled(entries, versions, tuple(changed))


def require_fitting(
    dims: Mapping[str, int], sites: Sequence[Reparametrization], tensors: Mapping[str, Any]
) -> None:
    """Raise a CheckpointError for a ``--dim`` that does not fit, also where none is needed."""
    require_known(dims, sites)
    for site in sites:
        if site.name in dims:
            find_kind(site).decide_dim(site, tensors, dims)


def require_known(dims: Mapping[str, int], sites: Sequence[Reparametrization]) -> None:
    """Raise a CheckpointError for a ``--dim`` of a tensor that is absent, or has no dim."""
    names = [site.name for site in sites if site.group in _WITH_DIM and not site.blocked]
    for name in dims:
        if name not in names:
            raise CheckpointError(
                f"--dim {name}={dims[name]} names no tensor under spectral or weight norm; there "
                f"are {quote_names(names) or 'none'}"
            )


def _require_possible(
    changed: Sequence[Reparametrization],
    wanted: Mapping[str, Spelling],
    tensors: Mapping[str, Any],
) -> None:
    """Raise a CheckpointError that names every site which does not have the wanted spelling."""
    refused: dict[tuple[str, str], list[str]] = {}
    for site in changed:
        to = wanted[site.name]
        reason = site.blocked
        if not reason and to != "plain" and to != site.spelling:
            kind = find_kind(site)
            if not (kind.parametrization if to == "parametrization" else kind.hook):
                reason = f"torch has no {to} for {site.label}"
            reason = reason or kind.refuse(site, tensors)
        if reason:
            refused.setdefault((to, reason), []).append(site.name)
    if refused:
        raise CheckpointError(
            "; ".join(
                f"cannot spell {quote_names(names)} as {to}: {reason}"
                for (to, reason), names in refused.items()
            )
        )


def _make_entries(
    site: Reparametrization, to: Spelling, tensors: Mapping[str, Any], dims: Mapping[str, int]
) -> dict[str, Entry]:
    """Return the parts of one site in the new spelling, by key.

    Example: the spectral norm of ``conv.weight`` as a hook has the keys ``conv.weight_orig``,
    ``conv.weight_u`` and ``conv.weight_v``.
    """
    kind = find_kind(site)
    if to == "plain":
        raw = next(part for part in ("weight", "original", "v") if part in site.keys)
        spec = get_spec(tensors, site.keys[raw])
        return {site.name: Entry(spec, lambda: kind.plain_value(site, tensors, dims))}
    if to == "hook":
        names = [site.name + end for end in kind.hook]
    else:
        chain = qualify(site.module, f"parametrizations.{site.tensor}")
        names = [f"{chain}.{end}" for end in kind.parametrization]
    return dict(zip(names, kind.parts(site, tensors, dims), strict=True))


def _order_entries(
    tensors: Mapping[str, Any],
    changed: Sequence[Reparametrization],
    wanted: Mapping[str, Spelling],
    spelled: dict[str, dict[str, Entry]],
) -> dict[str, Entry]:
    """Return all entries in the order in which a network with the new spelling has them."""
    gone = {key for site in changed for key in site.keys.values()}
    firsts = dict(zip((site.name for site in changed), spelled, strict=True))
    early = {
        _find_successor(site): firsts[site.name] for site in changed if wanted[site.name] == "plain"
    }
    entries: dict[str, Entry] = {}
    for key in tensors:
        # A plain weight comes before its bias; nothing is left to add if its parts came earlier.
        entries.update(spelled.pop(early.get(key, ""), {}))
        entries.update(spelled.pop(key, {}))
        if key not in gone:
            entries[key] = _keep_entry(tensors, key)
    return entries


def _keep_entry(tensors: Mapping[str, Any], key: str) -> Entry:
    return Entry(get_dense_spec(tensors, key), lambda: tensors[key])


def _find_successor(site: Reparametrization) -> str:
    # In a plain network the weight comes before its bias, under spectral norm after it.
    name = site.tensor.replace("weight", "bias")
    return qualify(site.module, name) if name != site.tensor else ""


def _respell_versions(
    before: Mapping[str, Any],
    changed: Sequence[Reparametrization],
    wanted: Mapping[str, Spelling],
) -> dict[str, Any]:
    after = copy.deepcopy(before)
    assert isinstance(after, dict)
    for site in changed:
        for path in _find_gone_versions(after, site):
            del after[path]
        norms = after.get(site.module, {}).get("spectral_norm", {})
        norms.pop(f"{site.tensor}.version", None)
        if wanted[site.name] == "hook" and site.group == "spectral_norm":
            own = after.setdefault(site.module, {}).setdefault("spectral_norm", {})
            own[f"{site.tensor}.version"] = 1
        elif wanted[site.name] == "parametrization":
            chains = qualify(site.module, "parametrizations")
            paths = (chains, f"{chains}.{site.tensor}", f"{chains}.{site.tensor}.0")
            _insert_versions(after, site.module, [path for path in paths if path not in after])
        if not after.get(site.module, {}).get("spectral_norm", True):
            del after[site.module]["spectral_norm"]
    return after


def _insert_versions(versions: dict[str, Any], module: str, paths: list[str]) -> None:
    """Add ``paths`` behind every path in ``module``, as its last child."""
    known = list(versions)
    inside = [
        i for i, path in enumerate(known) if not module or f"{path}.".startswith(f"{module}.")
    ]
    behind = known[inside[-1] + 1 :] if inside else []
    later = {path: versions.pop(path) for path in behind}
    versions.update({path: {"version": 1} for path in paths})
    versions.update(later)


def _find_gone_versions(versions: Mapping[str, Any], site: Reparametrization) -> Iterator[str]:
    if site.spelling != "parametrization":
        return
    chains = qualify(site.module, "parametrizations")
    own = f"{chains}.{site.tensor}"
    gone = [path for path in versions if path == own or path.startswith(own + ".")]
    yield from gone
    left = [path for path in versions if path.startswith(chains + ".") and path not in gone]
    if not left and chains in versions:
        yield chains
