"""Make the names of a checkpoint fit a model: prefixes of wrappers, spellings, suggestions."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import CheckpointError
from ..text import quote_names
from .content import StateDict
from .stored_norms import find_sites

# What DistributedDataParallel, torch.compile and FSDP put into names, anywhere in them.
_WRAPPER = re.compile(
    r"(?:(?<=\.)|^)(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
_TRIED = 20
_NEAR = 0.75


@dataclass(frozen=True)
class Fitted:
    """A state dict under the names of a model.

    Attributes:
        state: it.
        notes: what was done for that, in words.
    """

    state: StateDict
    notes: tuple[str, ...] = ()


def plain_names(tensors: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return the keys of each tensor of the plain network: several for one under SN."""
    sites = {key: site.name for site in find_sites(tensors) for key in site.keys}
    names: dict[str, list[str]] = {}
    for key in tensors:
        names.setdefault(sites.get(key, key), []).append(key)
    return names


def overlap(state: StateDict, wanted: Mapping[str, Any]) -> int:
    """Return how many tensors of a model a state dict has, under some prefix."""
    have, want = plain_names(state.tensors), set(plain_names(wanted))
    if want <= set(have):
        return len(want)
    return max(_best_prefix(names.values(), want)[1] for names in _readings(have))


def fit_names(
    state: StateDict, wanted: Mapping[str, Any], model: str, prefix: str | None
) -> Fitted:
    """Return ``state`` without the prefixes that keep its names from fitting a model.

    Names that fit are not touched. Otherwise what wrappers put into names goes
    (``module.``, ``_orig_mod.``), then one common prefix, such as the attribute that a
    Lightning module keeps the network in; what has another prefix is left out.

    Args:
        state: the state dict.
        wanted: the model's own state dict.
        model: what to call it in messages.
        prefix: the common prefix, where several fit.

    Raises:
        CheckpointError: if several prefixes fit, or ``prefix`` is none.
    """
    have, want = plain_names(state.tensors), set(plain_names(wanted))
    if prefix is None and want <= set(have):
        return Fitted(state)
    readings = _readings(have)
    if prefix is None:
        scores = [_best_prefix(names.values(), want, model) for names in readings]
        best = max(range(len(scores)), key=lambda i: scores[i][1])
        names, (prefix, covered) = readings[best], scores[best]
        if len(want & set(have)) >= covered:
            return Fitted(state)
    else:
        names = readings[0]
        if not any(name.startswith(prefix) for name in names.values()):
            raise CheckpointError(
                f"no name in the checkpoint starts with '{prefix}'; it has "
                f"{quote_names(dict.fromkeys(n.split('.')[0] + '.' for n in names.values()))}"
            )
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
            f"took the {len(renamed)} entries under '{prefix}'"
            + (f", and left {left} others out" if left else "")
        )
    tensors = {new: state.tensors[old] for old, new in renamed.items()}
    return Fitted(StateDict(state.path, tensors, _versions(state, prefix)), tuple(notes))


def require_equal(
    have: Mapping[str, Any], want: Mapping[str, Any], checkpoint: str, model: str
) -> None:
    """Raise a CheckpointError that names missing, unexpected and wrongly shaped keys.

    Raises:
        CheckpointError: if there are such.
    """
    missing = [key for key in want if key not in have]
    unexpected = [key for key in have if key not in want]
    shapes = [
        f"'{key}' is {list(have[key].shape)} and should be {list(want[key].shape)}"
        for key in want
        if key in have and getattr(have[key], "shape", None) != getattr(want[key], "shape", None)
    ]
    problems = []
    if missing:
        problems.append(f"it lacks {quote_names(missing)}")
    if unexpected:
        problems.append(f"it has the unknown {quote_names(unexpected)}")
    problems += shapes[:5]
    if problems:
        raise CheckpointError(
            f"'{checkpoint}' does not fit {model}: {'; '.join(problems)}"
            + _suggestion(missing, unexpected, have, want)
        )


def _suggestion(
    missing: list[str], unexpected: list[str], have: Mapping[str, Any], want: Mapping[str, Any]
) -> str:
    plain_have, plain_want = plain_names(have), plain_names(want)
    bare = [n for n in plain_want if len(plain_want[n]) > 1 and len(plain_have.get(n, ())) == 1]
    if bare:
        return (
            f". The model has spectral norm on {quote_names(bare)} and the checkpoint has plain "
            "weights there: build the model without spectral norm"
        )
    if renamed := _renamed_start(plain_have, plain_want, have, want):
        return renamed
    for name in unexpected:
        likely = [key for key in missing if _is_misspelled(name, key)]
        if likely:
            return f". Should '{name}' be '{likely[0]}'?"
    for name in missing:
        tails = [key for key in unexpected if name.endswith("." + key)]
        if tails:
            prefix = name.removesuffix(tails[0])
            return f". The model's names start with '{prefix}', the checkpoint's do not"
    return ""


def _renamed_start(
    plain_have: Mapping[str, list[str]],
    plain_want: Mapping[str, list[str]],
    have: Mapping[str, Any],
    want: Mapping[str, Any],
) -> str:
    """Return a suggestion where most unknown names fit once their first parts are others."""
    unknown = {name: have[plain_have[name][0]] for name in plain_have if name not in plain_want}
    wanted = {name: want[keys[0]] for name, keys in plain_want.items()}
    lacking = [name for name in wanted if name not in plain_have]
    pairs = {_starts(a, b) for a in list(unknown)[:_TRIED] for b in lacking}
    fitting = {
        (old, new): sum(
            (renamed := new + name.removeprefix(old)) in wanted
            and _shape(wanted[renamed]) == _shape(tensor)
            for name, tensor in unknown.items()
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


def _starts(name: str, wanted: str) -> tuple[str, str]:
    """Return the leading parts in which two names differ, up to the parts at their ends."""
    parts, others = name.split("."), wanted.split(".")
    while parts and others and parts[-1] == others[-1]:
        parts, others = parts[:-1], others[:-1]
    return "".join(f"{p}." for p in parts), "".join(f"{p}." for p in others)


def _shape(tensor: Any) -> Any:
    return getattr(tensor, "shape", None)


def _is_misspelled(name: str, wanted: str) -> bool:
    """Whether two keys are nearly the same in the one place where they differ."""
    parts, others = name.split("."), wanted.split(".")
    pairs = [(p, o) for p, o in zip(parts, others, strict=False) if p != o]
    return (
        len(parts) == len(others)
        and len(pairs) == 1
        and difflib.SequenceMatcher(None, *pairs[0]).ratio() >= _NEAR
    )


def _readings(names: Iterable[str]) -> list[dict[str, str]]:
    """Return the names without what wrappers add, and as they are: a network may say 'module'."""
    return [{name: _WRAPPER.sub("", name) for name in names}, {name: name for name in names}]


def _best_prefix(names: Iterable[str], want: set[str], model: str = "") -> tuple[str, int]:
    have = set(names)
    candidates = {""}
    # A prefix that fits all names fits the first few; one of those may be misspelled.
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
    return fitting[0], best


def _versions(state: StateDict, prefix: str) -> Mapping[str, Any] | None:
    if state.versions is None:
        return None
    found = {}
    for path, entry in state.versions.items():
        short = _WRAPPER.sub("", path + ".")
        if short.startswith(prefix) or short == prefix:
            found[short.removeprefix(prefix).removesuffix(".")] = entry
    return found
