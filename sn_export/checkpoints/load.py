"""Load a checkpoint into a model whose names or reparametrizations may be spelled differently."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..errors import CheckpointError
from ..freezing import describe_sites
from ..running import Preserved, have_same_bits, restore_container
from ..text import format_count, quote_names
from .content import Checkpoint, StateDict, describe_candidates
from .fit_names import Refusal, describe_refusal, fit_names, group_by_plain_name, measure_overlap
from .kinds import describe_assumed_dims
from .lazy_tensors import require_finite
from .reparametrizations import Reparametrization, Spelling, find_reparametrizations
from .spectral_norm import describe_lengths, report_zero_sigma
from .spelling import require_fitting, respell


@dataclass(frozen=True)
class Loaded:
    """How a checkpoint went into a model.

    Attributes:
        key: where in the checkpoint the state dict is.
        notes: sentences about what was changed; empty if it fitted as it was.
        warnings: sentences about wrong values, such as singular vectors that were averaged.
        missing: keys of the model that the checkpoint lacks, if that was allowed; they keep the
            values that the model was built with.
        unexpected: keys of the checkpoint that the model does not know, if that was allowed.
    """

    key: str
    notes: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    warnings: tuple[str, ...]

    def metadata(self) -> dict[str, str]:
        """Return metadata for an exported file: missing and unexpected keys as JSON, if any."""
        lists = {"missing_keys": self.missing, "unexpected_keys": self.unexpected}
        return {f"checkpoint.{name}": json.dumps(keys) for name, keys in lists.items() if keys}


@dataclass(frozen=True)
class _Reading:
    """A state dict as it is, or under other names, or in another spelling."""

    state: StateDict
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def find_sites(self) -> list[Reparametrization]:
        return find_reparametrizations(self.state.tensors, self.state.versions)


def load_checkpoint(
    model: nn.Module,
    checkpoint: Checkpoint,
    *,
    key: str | None = None,
    prefix: str | None = None,
    dims: Mapping[str, int] | None = None,
    strict: bool = True,
) -> Loaded:
    """Load a checkpoint into ``model``, whose own ``load_state_dict`` decides what fits.

    It is called strictly, first with the state dict as it is, then under the names of the model,
    then in its spelling too. So hooks and overrides of the model that update old keys act first.

    Args:
        model: the model. It is changed only if everything fits.
        checkpoint: as `read_checkpoint` returned it.
        key: where in the checkpoint the state dict is; None to take the only one that fits.
        prefix: start of the names to load; None to take the only one that fits.
        dims: dims by name of the tensor, which neither file nor model tells.
        strict: False to load what fits although keys are missing or unknown.

    Raises:
        CheckpointError: if keys are missing or unknown (unless ``strict`` is False), a tensor has
            another shape, a value is NaN or infinite, or a dim in ``dims`` does not fit.
    """
    what = type(model).__name__
    wanted: dict[str, Any] = model.state_dict()
    found, count = checkpoint.state_dicts(), len(group_by_plain_name(wanted))
    scores = {one.path: measure_overlap(one, wanted) for one in found}
    best = max(scores.values(), default=(0, 0))

    def describe(one: StateDict) -> str:
        return f"has {scores[one.path][0]} of the {count} of {what}"

    state = checkpoint.choose(
        key, lambda one: (0, 0) < best == scores[one.path], f"fits {what}", describe
    )
    undo = _remember(model)
    try:
        refused: list[tuple[_Reading, Refusal]] = []
        readings = _make_readings(model, wanted, state, prefix, dims or {}, refused)
        for reading in readings:
            left_out = _ask(model, reading.state, wanted)
            if not left_out.problems:
                break
            undo()
            refused.append((reading, left_out))
        else:
            others = [one for one in found if one.path != state.path and key is None]
            advice = f"; --key takes {describe_candidates(others, describe)}" if others else ""
            advice = advice and f". That is the state dict under '{state.key}'{advice}"
            reading, left_out = _load_nearest(model, refused, strict, str(checkpoint.path), advice)
        _require_usable(model, reading, left_out, dims or {})
    except BaseException:
        undo()
        raise
    notes: tuple[str, ...] = (f"took the state dict under '{state.key}'",) if state.key else ()
    notes += checkpoint.notes + reading.notes + left_out.list_notes() + _describe_missing_v(reading)
    warnings = reading.warnings + describe_lengths(reading.find_sites(), reading.state.tensors)
    return Loaded(state.key, notes, left_out.missing, left_out.unexpected, warnings)


def _load_nearest(
    model: nn.Module,
    refused: Sequence[tuple[_Reading, Refusal]],
    strict: bool,
    path: str,
    advice: str,
) -> tuple[_Reading, Refusal]:
    """Load what fits of the reading with the fewest problems.

    Args:
        model: the model.
        refused: the readings, each with the model's refusal.
        strict: False to load what fits although keys are missing or unknown.
        path: path of the checkpoint, for the message.
        advice: a sentence on other state dicts in it, for the message.

    Returns:
        The reading, and its refusal.

    Raises:
        CheckpointError: if keys may not be missing or unknown, nothing fits, or a shape differs.
    """
    # A model with a load_state_dict of its own may load a part, and raise nothing.
    passed = [one for one in refused if one[1].is_passed]
    reading, refusal = min(passed or refused, key=lambda one: one[1].problems)
    if refusal.is_unused or not (passed or not strict):
        raise CheckpointError(describe_refusal(refusal, path, type(model).__name__) + advice)
    again = _ask(model, reading.state, refusal.want, strict=bool(passed))
    if not again.is_passed:
        raise CheckpointError(describe_refusal(again, path, type(model).__name__) + advice)
    return reading, refusal


def _ask(
    model: nn.Module, state: StateDict, wanted: Mapping[str, Any], strict: bool = True
) -> Refusal:
    """Let the model load ``state``, and return what it reports."""
    tensors: OrderedDict[str, Any] = OrderedDict(state.tensors)
    if state.versions is not None:
        tensors._metadata = state.versions  # type: ignore[attr-defined]
    said = _Said()
    error = ""
    with _listen(model, said):
        try:
            model.load_state_dict(OrderedDict(tensors), **({} if strict else {"strict": False}))
        except Exception as raised:  # the network's own code can raise anything
            error = " ".join(f"{raised}".split()) or type(raised).__name__
    missing, unexpected = said.missing, said.unexpected
    if missing is None or unexpected is None:  # an override called load_state_dict of children
        missing = [key for key in wanted if key not in tensors] if error else []
        unexpected = [key for key in tensors if key not in wanted] if error else []
    # Torch's hook of spectral norm also reports keys of old checkpoints, and some twice.
    missing = [key for key in dict.fromkeys(missing) if key in wanted]
    return Refusal(tuple(missing), tuple(unexpected), error, tensors, wanted, said.renamed)


@dataclass
class _Said:
    """What a model reports while it loads; None for what it does not report."""

    missing: list[str] | None = None
    unexpected: list[str] | None = None
    renamed: dict[str, Any] | None = None


@contextmanager
def _listen(model: nn.Module, said: _Said) -> Iterator[None]:
    """Fill ``said`` when ``model`` loads; the last pre-hook sees the keys that others renamed."""
    if isinstance(model, torch.jit.ScriptModule):  # takes no such hooks
        yield
        return

    def see_state(_: nn.Module, state: dict[str, Any], prefix: str, *others: Any) -> None:
        if not prefix:
            said.renamed = dict(state)

    def see_keys(_: nn.Module, keys: Any) -> None:
        said.missing, said.unexpected = list(keys.missing_keys), list(keys.unexpected_keys)

    handles = [
        model.register_load_state_dict_pre_hook(see_state),  # type: ignore[no-untyped-call]
        model.register_load_state_dict_post_hook(see_keys),  # type: ignore[no-untyped-call]
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _make_readings(
    model: nn.Module,
    wanted: Mapping[str, Any],
    state: StateDict,
    prefix: str | None,
    dims: Mapping[str, int],
    refused: list[tuple[_Reading, Refusal]],
) -> Iterator[_Reading]:
    """Yield the readings of ``state``, those nearest to the file first.

    Each is made only when the model has refused the one before. The last refusal in ``refused``
    holds the keys as the model's own pre-hooks renamed them.
    """
    if prefix is None:
        yield _Reading(state)
    named = _Reading(*fit_names(state, wanted, type(model).__name__, prefix))
    require_fitting(dims, named.find_sites(), named.state.tensors)
    if named.state is not state or prefix is not None:
        yield named
    renamed = refused[-1][1].renamed
    if renamed is not None and renamed.keys() != set(named.state.tensors):
        named = _Reading(StateDict(state.path, renamed, named.state.versions), named.notes)
    spelled = _respell_for(model, wanted, named, dims)
    if spelled is not None:
        yield spelled


def _respell_for(
    model: nn.Module, wanted: Mapping[str, Any], reading: _Reading, dims: Mapping[str, int]
) -> _Reading | None:
    """Return ``reading`` in the model's spelling; None if it has that spelling already."""
    tensors, sites = reading.state.tensors, reading.find_sites()
    own = {site.name: site for site in find_reparametrizations(wanted)}
    to: dict[str, Spelling] = {}
    changed: dict[tuple[str, str, str], list[str]] = {}
    for site in sites:
        same = site.name in own and own[site.name].group == site.group
        spelling: Spelling = own[site.name].spelling if same else "plain"
        if spelling != site.spelling and (same or site.name in wanted):
            to[site.name] = spelling
            changed.setdefault((site.label, site.spelling, spelling), []).append(site.name)
    if not to:
        return None
    known = {info.name: info.dim for info in describe_sites(model)}
    result = respell(reading.state, to, {**known, **dims})
    plain = [site for site in sites if to.get(site.name) == "plain"]
    notes = tuple(
        f"respelled {format_count(len(names), label)} from {before} to {after}: "
        f"{quote_names(names)}"
        for (label, before, after), names in changed.items()
    )
    return _Reading(
        StateDict(
            reading.state.path,
            {name: entry.read() for name, entry in result.entries.items()},
            result.versions,
        ),
        reading.notes + notes + describe_assumed_dims(plain, tensors, dims),
        describe_lengths(plain, tensors),
    )


def _require_usable(
    model: nn.Module, reading: _Reading, left_out: Refusal, dims: Mapping[str, int]
) -> None:
    """Raise a CheckpointError for values that no network can use, and for dims that do not fit."""
    if not reading.notes:
        require_fitting(dims, reading.find_sites(), reading.state.tensors)
    for name, value in reading.state.tensors.items():
        if isinstance(value, Tensor) and name not in left_out.unexpected:
            require_finite(name, value)
            own = left_out.want.get(name)
            if value.is_complex() and isinstance(own, Tensor) and not own.is_complex():
                raise CheckpointError(f"'{name}' is complex, and real in the model")
    for info in describe_sites(model):
        if info.kind in ("hook", "parametrization") and info.sigma == 0:
            raise report_zero_sigma(info.name)


def _describe_missing_v(reading: _Reading) -> tuple[str, ...]:
    """Return a sentence for each spectral norm that was loaded without v."""
    return tuple(
        f"'{site.name}' is from before torch kept v, which torch solves for"
        for site in reading.find_sites()
        if "normalised" in site.keys
    )


def _remember(model: nn.Module) -> Callable[[], None]:
    """Return a function that gives the model every object and value back that it has now."""
    containers = Preserved(model.modules(), with_objects=True).containers
    values: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
    for _, content in containers:
        for value in content.values() if isinstance(content, dict) else content:
            if isinstance(value, Tensor) and not is_lazy(value):
                values[id(value)] = (value, value.data, value.detach().clone())

    def undo() -> None:
        for container, content in containers:
            restore_container(container, content)
        with torch.no_grad():
            for tensor, data, copy in values.values():
                tensor.data = data
                if not have_same_bits(data, copy):
                    data.copy_(copy)

    return undo
