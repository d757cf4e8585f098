"""Make the names of a checkpoint fit a model: prefixes of wrappers, spellings, suggestions."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch.nn.parameter import is_lazy

from ..errors import CheckpointError
from ..text import format_count, quote_names
from .content import StateDict
from .lazy_tensors import LazyTensors, get_spec, is_tensor
from .reparametrizations import find_reparametrizations

# What DistributedDataParallel, torch.compile and FSDP put into names, in any place.
_WRAPPER = re.compile(
    r"(?:(?<=\.)|^)(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
_TRIED = 20  # names from which prefixes are guessed
_NEAR = 0.75  # similarity of two names from which one may be a misspelt other


def group_by_plain_name(tensors: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return the keys of each tensor of the plain network, several if it is reparametrized.

    Example: ``{"weight": ["weight_g", "weight_v"], "bias": ["bias"]}`` for weight norm.
    """
    sites = {
        key: site.name for site in find_reparametrizations(tensors) for key in site.keys.values()
    }
    names: dict[str, list[str]] = {}
    for key in tensors:
        names.setdefault(sites.get(key, key), []).append(key)
    return names


def measure_overlap(state: StateDict, wanted: Mapping[str, Any]) -> tuple[int, int]:
    """Count the tensors of a model that a state dict has, under the best prefix.

    Returns:
        The number of tensors with the same name, and of those with the same shape too.
    """
    have, want = group_by_plain_name(state.tensors), group_by_plain_name(wanted)
    found = []
    for names in _unwrap_names(have):
        prefix, count, _ = _find_prefix(names.values(), set(want))
        shared = {
            new.removeprefix(prefix): old for old, new in names.items() if new.startswith(prefix)
        }
        alike = [
            _find_largest_shape(state.tensors, have[shared[name]])
            == _find_largest_shape(wanted, want[name])
            for name in shared.keys() & want.keys()
        ]
        found.append((count, sum(alike)))
    return max(found)


def fit_names(
    state: StateDict, wanted: Mapping[str, Any], model: str, prefix: str | None
) -> tuple[StateDict, tuple[str, ...]]:
    """Return ``state`` without the prefixes that keep its names from fitting a model.

    Names that fit are not changed. Otherwise the parts that wrappers put into names are removed
    (``module.``, ``_orig_mod.``), then one common prefix, such as the attribute in which a
    Lightning module keeps the network. Tensors with another prefix are left out.

    Args:
        state: the state dict.
        wanted: the model's own state dict.
        model: name of the model in messages.
        prefix: the common prefix; None to find it.

    Returns:
        The state dict, which is ``state`` itself if its names fit, and sentences about what was
        changed.

    Raises:
        CheckpointError: if several prefixes fit, or no name starts with ``prefix``.
    """
    have, want = group_by_plain_name(state.tensors), set(group_by_plain_name(wanted))
    if prefix is None and want <= set(have):
        return state, ()
    readings = _unwrap_names(have)
    if prefix is None:
        scores = [_find_prefix(names.values(), want, model) for names in readings]
        # Of two that cover as many names, the one with fewer others under its prefix.
        best = max(range(len(scores)), key=lambda i: (scores[i][1], -scores[i][2]))
        names, (prefix, covered, _) = readings[best], scores[best]
        # If nothing fits, the wrappers' parts are removed still: the model may know its old names.
        if len(want & set(have)) >= covered and (covered or readings[0] == readings[1]):
            return state, ()
    else:
        names = _choose_reading(readings, prefix, want)
    notes = []
    wrappers = {m for old, new in names.items() if old != new for m in _WRAPPER.findall(old)}
    if wrappers:
        notes.append(f"took the wrappers' {quote_names(sorted(wrappers))} out of the names")
    renamed: dict[str, str] = {}
    for name, short in names.items():
        if short.startswith(prefix):
            for key in have[name]:
                bare = key if short == name else _WRAPPER.sub("", key)
                renamed[key] = bare.removeprefix(prefix)
    if prefix:
        left = len(state.tensors) - len(renamed)
        notes.append(
            f"took {format_count(len(renamed), 'entry')} under '{prefix}'"
            + (f", and left out {format_count(left, 'other')}" if left else "")
        )
    tensors = {new: state.tensors[old] for old, new in renamed.items()}
    return StateDict(state.path, tensors, _rename_versions(state, prefix)), tuple(notes)


def _choose_reading(readings: list[dict[str, str]], prefix: str, want: set[str]) -> dict[str, str]:
    """Return the reading that has most of the wanted names behind ``prefix``."""
    found = [names for names in readings if any(name.startswith(prefix) for name in names.values())]
    if not found:
        starts = dict.fromkeys(name.split(".")[0] + "." for name in readings[-1])
        raise CheckpointError(
            f"no name in the checkpoint starts with '{prefix}'; it has {quote_names(starts)}"
        )
    return max(
        found, key=lambda names: len(want & {n.removeprefix(prefix) for n in names.values()})
    )


@dataclass(frozen=True)
class Refusal:
    """What a model reported when it loaded, or refused, a state dict.

    Attributes:
        missing: keys of the model that the state dict lacks.
        unexpected: keys of the state dict that the model does not know.
        error: the error that it raised; empty if it loaded the rest.
        have: the state dict.
        want: the model's own state dict.
        renamed: the state dict after the model's own pre-hooks; None if that was not seen.
    """

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    error: str
    have: Mapping[str, Any]
    want: Mapping[str, Any]
    renamed: Mapping[str, Any] | None = None

    @property
    def shapes(self) -> list[str]:
        """A sentence for each tensor of another shape; torch takes [1] for a number."""
        return [
            f"'{key}' is {list(have)} and should be {list(want)}"
            for key in self.want
            if (want := _find_shape(self.want, key)) != (have := _find_shape(self.have, key))
            if want is not None and have is not None and not (len(want) == 0 and len(have) == 1)
        ]

    @property
    def problems(self) -> int:
        """How far the state dict is from fitting; 0 if it was loaded."""
        found = len(self.missing) + len(self.unexpected) + len(self.shapes) * bool(self.error)
        return found or int(bool(self.error))

    @property
    def is_passed(self) -> bool:
        """Whether the model took the rest without an error."""
        return not self.error

    @property
    def is_unused(self) -> bool:
        """Whether nothing of the state dict went into the model."""
        return len(self.unexpected) == len(self.have)

    def list_notes(self) -> tuple[str, ...]:
        """Return sentences about the keys that were left out."""
        notes = []
        if self.missing:
            notes.append(
                f"not in the checkpoint, and so as the model was built: {quote_names(self.missing)}"
            )
        if self.unexpected:
            notes.append(f"not in the model, and so left out: {quote_names(self.unexpected)}")
        return tuple(notes)


def describe_refusal(refusal: Refusal, checkpoint: str, model: str) -> str:
    """Return a message that names missing, unexpected and wrongly shaped keys, and what to do."""
    problems = []
    if refusal.missing:
        problems.append(f"it lacks {quote_names(refusal.missing)}")
    if refusal.unexpected:
        problems.append(f"it has the unknown {quote_names(refusal.unexpected)}")
    problems += refusal.shapes[:5]
    text = "; ".join(problems) or refusal.error
    return f"'{checkpoint}' does not fit {model}: {text}{_suggest_change(refusal)}"


def _suggest_change(refusal: Refusal) -> str:
    """Return a sentence on a change that would make the state dict fit; ``""`` if none is known."""
    have, want = refusal.have, refusal.want
    plain_have, plain_want = group_by_plain_name(have), group_by_plain_name(want)
    if plain_have.keys() == plain_want.keys():
        return _suggest_groups(have, want)
    if renamed := _suggest_start(plain_have, plain_want, have, want):
        return renamed
    unexpected, missing = set(refusal.unexpected), set(refusal.missing)
    unknown = [n for n in plain_have if n not in plain_want and unexpected & set(plain_have[n])]
    lacking = [n for n in plain_want if n not in plain_have and missing & set(plain_want[n])]
    for name in lacking:
        prefix = name.removesuffix(next((n for n in unknown if name.endswith("." + n)), name))
        if prefix and 2 * sum(prefix + n in lacking for n in unknown) > len(unknown):
            part = prefix.removesuffix(".")
            return (
                f". The model's names start with '{prefix}', the checkpoint's do not: "
                f"--network {part} loads it into '{part}'"
            )
    for name in unknown:
        shape = _find_largest_shape(have, plain_have[name])
        # A part of a reparametrization, such as 'weight_v', is no misspelt 'weight'.
        fitting = [
            n
            for n in lacking
            if _find_largest_shape(want, plain_want[n]) == shape and not name.startswith(f"{n}_")
        ]
        if likely := difflib.get_close_matches(name, fitting, 1, _NEAR):
            return f". Should '{plain_have[name][0]}' be '{plain_want[likely[0]][0]}'?"
    return ""


def _suggest_groups(have: Mapping[str, Any], want: Mapping[str, Any]) -> str:
    """Return a sentence on reparametrizations that one of two otherwise equal networks has."""
    ours = {site.name: site.label for site in find_reparametrizations(have)}
    theirs = {site.name: site.label for site in find_reparametrizations(want)}
    for label in dict.fromkeys(theirs.values()):
        names = [name for name in theirs if theirs[name] == label and name not in ours]
        if names:
            return (
                f". The model has {label} on {quote_names(names)} and the checkpoint has plain "
                f"weights there: build the model without {label}"
            )
    for name, label in theirs.items():
        if ours[name] != label:
            return f". '{name}' has {label} in the model and {ours[name]} in the checkpoint"
    return ""


def _suggest_start(
    plain_have: Mapping[str, list[str]],
    plain_want: Mapping[str, list[str]],
    have: Mapping[str, Any],
    want: Mapping[str, Any],
) -> str:
    """Return a suggestion if most unknown names fit once their first parts are replaced.

    Example: ``gen.0.weight`` and ``gen.1.weight`` fit with ``body.`` in the place of ``gen.``.
    """
    unknown = {
        name: _find_largest_shape(have, keys)
        for name, keys in plain_have.items()
        if name not in plain_want
    }
    wanted = {name: _find_largest_shape(want, keys) for name, keys in plain_want.items()}
    lacking = [name for name in wanted if name not in plain_have]
    pairs = {_find_starts(a, b) for a in list(unknown)[:_TRIED] for b in lacking}
    fitting = {
        (old, new): sum(
            (renamed := new + name.removeprefix(old)) in wanted and wanted[renamed] == shape
            for name, shape in unknown.items()
            if name.startswith(old)
        )
        for old, new in pairs
        if old and new
    }
    best = max(fitting, key=lambda pair: (fitting[pair], -len("".join(pair)), pair), default=None)
    if best is None or fitting[best] < 2 or 2 * fitting[best] <= len(unknown):
        return ""
    return (
        f". With '{best[1]}' in the place of '{best[0]}', {fitting[best]} of the {len(unknown)} "
        "unknown tensors fit: rename them in the checkpoint, or the attribute in the model"
    )


def _find_starts(name: str, wanted: str) -> tuple[str, str]:
    """Return the leading parts in which two names differ.

    Example: for ``gen.0.weight`` and ``body.main.0.weight`` they are ``gen.`` and ``body.main.``.
    """
    parts, others = name.split("."), wanted.split(".")
    while parts and others and parts[-1] == others[-1]:
        parts, others = parts[:-1], others[:-1]
    return "".join(f"{p}." for p in parts), "".join(f"{p}." for p in others)


def _find_largest_shape(tensors: Mapping[str, Any], keys: Iterable[str]) -> Any:
    """Return the shape of the largest part of a tensor, which is the shape of the tensor itself."""
    shapes = [shape for key in keys if (shape := _find_shape(tensors, key)) is not None]
    return max(shapes, key=math.prod, default=None)


def _find_shape(tensors: Mapping[str, Any], key: str) -> tuple[int, ...] | None:
    """Return the shape of a tensor without reading it; None for anything else."""
    if key not in tensors or not is_tensor(tensors, key):
        return None
    known = isinstance(tensors, LazyTensors) or not is_lazy(tensors[key])
    return get_spec(tensors, key).shape if known else None


def _unwrap_names(names: Iterable[str]) -> list[dict[str, str]]:
    """Return the names without the wrappers' parts, and as they are: 'module' may be a name."""
    return [{name: _WRAPPER.sub("", name) for name in names}, {name: name for name in names}]


def _find_prefix(names: Iterable[str], want: set[str], model: str = "") -> tuple[str, int, int]:
    """Return the prefix that most wanted names have, their number, and that of other names with it.

    Example: ``(["net.a", "net.b", "step"], {"a"})`` is ``("net.", 1, 1)``.
    """
    have = set(names)
    candidates = {""}
    # A prefix that fits all names fits the first few; several are tried, as one may be misspelt.
    for w in sorted(want)[:_TRIED]:
        candidates.update(name.removesuffix(w) for name in have if name.endswith("." + w))
    covered = {p: sum(p + w in have for w in want) for p in candidates}
    best = max(covered.values())
    fitting = sorted(p for p, count in covered.items() if count == best)
    if len(fitting) > 1 and "" not in fitting and best == len(want) and model:
        raise CheckpointError(
            f"the names fit {model} under several prefixes; choose with --prefix one of "
            f"{quote_names(fitting)}"
        )
    return fitting[0], best, sum(name.startswith(fitting[0]) for name in have) - best


def _rename_versions(state: StateDict, prefix: str) -> Mapping[str, Any] | None:
    if state.versions is None:
        return None
    found = {}
    for path, entry in state.versions.items():
        short = _WRAPPER.sub("", path + ".")
        if short.startswith(prefix) or short == prefix:
            found[short.removeprefix(prefix).removesuffix(".")] = entry
    return found
