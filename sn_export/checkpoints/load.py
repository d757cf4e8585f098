"""Load a checkpoint into a model that may spell spectral norm, or names, differently."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..errors import CheckpointError
from ..freezing import describe_sites, stored_sigma
from ..text import quote_names
from .content import Checkpoint, StateDict
from .dims import require_fitting
from .fit_names import fit_names, overlap, require_equal
from .spelling import require_finite, respell, zero_sigma
from .stored_norms import Spelling, find_sites
from .torch_norm import TorchNorm


@dataclass(frozen=True)
class Loaded:
    """How a checkpoint went into a model.

    Attributes:
        key: where in the checkpoint the state dict is.
        notes: what had to be done, in words; empty if it fitted as it was.
    """

    key: str
    notes: tuple[str, ...]


def load_checkpoint(
    model: nn.Module,
    checkpoint: Checkpoint,
    *,
    key: str | None = None,
    prefix: str | None = None,
    dims: Mapping[str, int] | None = None,
) -> Loaded:
    """Load a checkpoint strictly, after making names and spellings those of ``model``.

    Args:
        model: the model. It is changed only if everything fits.
        checkpoint: as `read_checkpoint` returned it.
        key: where in the checkpoint the state dict is; found where only one fits.
        prefix: start of the names that are meant; found where only one fits.
        dims: dims of square weights by name, where neither vectors nor model can tell.

    Raises:
        CheckpointError: if keys are missing, unknown or of another shape, values are NaN or
            infinite, or a dim in ``dims`` is not possible.
    """
    what = type(model).__name__
    wanted: dict[str, Any] = model.state_dict()
    scores = {one.path: overlap(one, wanted) for one in checkpoint.state_dicts()}
    best = max(scores.values(), default=0)
    state = checkpoint.choose(key, lambda one: 0 < best == scores[one.path], f"fits {what}")
    fitted = fit_names(state, wanted, what, prefix)
    notes = [*checkpoint.notes, *fitted.notes]
    if state.key:
        notes.insert(0, f"took the state dict under '{state.key}'")
    state, respelled = _in_spelling_of(model, wanted, fitted.state, dims or {})
    notes += respelled
    tensors: OrderedDict[str, Any] = OrderedDict(state.tensors)
    if state.versions is not None:
        tensors._metadata = state.versions  # type: ignore[attr-defined]
    require_equal(_as_torch_loads(tensors, wanted), wanted, str(checkpoint.path), what)
    for name, value in tensors.items():
        if isinstance(value, Tensor):
            require_finite(name, value)
    _require_sigmas(model, tensors)
    try:
        model.load_state_dict(tensors)
    except (RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"'{checkpoint.path}' does not fit {what}: {' '.join(str(error).split())}"
        ) from error
    return Loaded(state.key, tuple(notes))


def _require_sigmas(model: nn.Module, tensors: Mapping[str, Any]) -> None:
    known = {info.name: info.dim for info in describe_sites(model)}
    for site in find_sites(tensors):
        if site.name not in known or site.v is None:
            continue
        norm = TorchNorm(site, tensors)
        matrix = norm.matrix(known[site.name])
        if stored_sigma(matrix, norm.u, norm.right_vector(known[site.name])) == 0:
            raise zero_sigma(site)


def _in_spelling_of(
    model: nn.Module, wanted: Mapping[str, Any], state: StateDict, dims: Mapping[str, int]
) -> tuple[StateDict, list[str]]:
    spellings: dict[str, Spelling] = {site.name: site.kind for site in find_sites(wanted)}
    to: dict[str, Spelling] = {}
    notes = []
    sites = find_sites(state.tensors)
    require_fitting(dims, sites, state.tensors)
    for site in sites:
        spelling = spellings.get(site.name, "plain" if site.name in wanted else site.kind)
        # Into its own spelling torch itself loads a checkpoint from before v.
        to[site.name] = spelling
        if site.normalised and spelling == "hook":
            notes.append(f"'{site.name}' is from before torch kept v, which torch solves for")
    changed: dict[tuple[str, str], list[str]] = {}
    for site in sites:
        if to[site.name] != site.kind:
            changed.setdefault((site.kind, to[site.name]), []).append(site.name)
    if not changed:
        return state, notes
    known = {info.name: info.dim for info in describe_sites(model)}
    result = respell(state, to, {**known, **dims})
    notes += [
        f"respelled {len(names)} spectral {'norm' if len(names) == 1 else 'norms'} from {before} "
        f"to {after}: {quote_names(names)}"
        for (before, after), names in changed.items()
    ]
    tensors = {name: entry.read() for name, entry in result.entries.items()}
    return StateDict(state.path, tensors, result.versions), notes


def _as_torch_loads(tensors: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the keys will be once torch has brought old checkpoints up to date."""
    loads = dict(tensors)
    for site in find_sites(tensors):
        if site.normalised and site.v is None and f"{site.name}_v" in wanted:
            loads[f"{site.name}_v"] = wanted[f"{site.name}_v"]
            del loads[site.normalised]
    for name in wanted:
        # torch.nn.BatchNorm counts its batches since version 2, and adds what is missing.
        if name.endswith("num_batches_tracked"):
            loads.setdefault(name, wanted[name])
    return loads
