"""Find the reparametrized tensors of a state dict by its keys and shapes."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from torch import Tensor

from ..freezing import Group
from ..results import OrthogonalMap, Spelling as Spelling
from ..text import qualify, quote_name, quote_names, quote_subject
from .lazy_tensors import get_dense_spec, get_float_spec, require_finite

Keys = Mapping[str, str]

_LABELS = {"orthogonal": "orthogonality", "parametrization": "another parametrization"}
_CHAIN = re.compile(
    r"(?:(?P<module>.*?)\.)?parametrizations\.(?P<tensor>[^.]+)\.(?P<part>.+)", re.DOTALL
)
UNKNOWN_MAP = (
    "the file does not say by which map (matrix_exp, cayley or householder) its weight is made "
    "orthogonal; tell 'sn-export convert' with --orthogonal-map"
)
_PARTS = {"original", "0._u", "0._v"}  # of spectral norm alone
_HOOK = re.compile(r"(?P<name>.*[^.])(?P<part>_orig|_[gv])", re.DOTALL)
# Names beside a raw weight under handwritten spectral norm: BigGAN's mixin, and similar code.
_BESIDE = (("u0", "sv0"), ("sn_u", "sn_sigma"))


@dataclass(frozen=True)
class Reparametrization:
    """A tensor that a state dict stores as the parts from which torch computes it.

    Attributes:
        module: qualified name of the module, ``""`` for the root.
        tensor: name of the tensor in it.
        group: the kind of reparametrization; ``"parametrization"`` if the keys do not tell it.
        spelling: torch's old hooks (``weight_orig``, ``weight_g``), or its parametrizations.
        shape: shape of the tensor.
        keys: key of each part. Spectral norm has ``weight``, ``u`` and ``v``; old versions of torch
            saved ``normalised`` too, the weight in use, and the oldest ones no ``v``. Weight norm
            has ``g`` and ``v``, pruning ``weight`` and ``mask``. Other kinds, and incomplete ones,
            have the ends of their keys, such as ``original`` and ``0.base``.
        blocked: why its value cannot be known without the model's code; empty if it can.
        orthogonal_map: torch's map that keeps it orthogonal, if it is known.
        links: for a chain of several parametrizations, each of them on its own; the ``weight`` of
            all but the first is the value of those before, under ``name``. Empty otherwise.
    """

    module: str
    tensor: str
    group: Group
    spelling: Literal["hook", "parametrization"]
    shape: tuple[int, ...]
    keys: Keys
    blocked: str = ""
    orthogonal_map: OrthogonalMap | None = None
    links: tuple[Reparametrization, ...] = ()

    def read(self, part: str, tensors: Mapping[str, Any]) -> Tensor:
        """Return the value of one part; raise a CheckpointError if it is not finite."""
        return require_finite(self.keys[part], tensors[self.keys[part]])

    @property
    def name(self) -> str:
        """Qualified name of the tensor, its key in the plain network."""
        return qualify(self.module, self.tensor)

    @property
    def label(self) -> str:
        """The group in words: ``"weight norm"``; of a chain ``"weight norm + spectral norm"``."""
        if self.links:
            return " + ".join(link.label for link in self.links)
        return _LABELS.get(self.group, self.group.replace("_", " "))


def find_reparametrizations(
    tensors: Mapping[str, Any], versions: Mapping[str, Any] | None = None
) -> list[Reparametrization]:
    """Return every tensor that is reparametrized, in the order of the keys.

    ``{"conv.bias": ..., "conv.weight_g": ..., "conv.weight_v": ...}`` holds the weight norm of
    ``conv.weight``.

    Args:
        tensors: the state dict; lazy tensors are not read.
        versions: versions of the modules, see `StateDict`. They list links without tensors too.
    """
    found: dict[str, Reparametrization | None] = {}
    chains: dict[str, dict[str, str]] = {}
    for key in tensors:
        if match := _CHAIN.fullmatch(key):
            name = qualify(match["module"] or "", match["tensor"])
            chains.setdefault(name, {})[match["part"]] = key
            found.setdefault(name)  # reserves the place: what it is takes all of its keys to tell
        elif match := _HOOK.fullmatch(key):
            recognise = _find_orig_hook if match["part"] == "_orig" else _find_weight_norm_hook
            if (
                match["name"] not in found
                and (one := recognise(tensors, match["name"])) is not None
            ):
                found[one.name] = one
    for name, parts in chains.items():
        found[name] = _find_chain(tensors, name, parts, versions or {})
    return [one for one in found.values() if one is not None]


def find_weight_norm_dims(g: tuple[int, ...], v: tuple[int, ...]) -> list[int | None]:
    """Return every dim that a weight norm can have whose parts have these shapes.

    ``(8, 1, 1)`` and ``(8, 4, 3)`` have dim 0; ``()`` and ``(8, 4, 3)`` have ``dim=None``, one norm
    for the whole tensor. Several dims fit if v has several dimensions of size 1, and none if these
    are not the shapes of a weight norm.
    """
    if 0 in v:  # torch's kernel would divide by 0, which ends the process
        return []
    if math.prod(g) == 1 and len(g) != len(v):  # torch 0.3 kept a number as [1]
        return [None] if len(g) < 2 and v else []
    return [
        dim
        for dim in range(len(v))
        if len(g) == len(v) and g == tuple(n if d == dim else 1 for d, n in enumerate(v))
    ]


def _find_orig_hook(tensors: Mapping[str, Any], name: str) -> Reparametrization | None:
    """Return the spectral norm or the pruning mask whose raw weight is ``<name>_orig``."""
    module, _, tensor = name.rpartition(".")
    u, v, mask = (f"{name}{end}" for end in ("_u", "_v", "_mask"))
    spec = get_float_spec(tensors, f"{name}_orig")
    if u not in tensors and v not in tensors:
        if spec is None or get_dense_spec(tensors, mask) is None:
            return None
        other = {"g": "v", "v": "g"}.get(name[-1])
        is_part = name[-2:-1] == "_" and any(
            f"{name[:-1]}{other}{end}" in tensors for end in ("", "_orig") if other
        )
        blocked = f"it is itself the {name[-1]} of a weight norm" if is_part else ""
        keys = {"weight": f"{name}_orig", "mask": mask}
        return Reparametrization(module, tensor, "pruning", "hook", spec.shape, keys, blocked)
    keys = {"weight": f"{name}_orig", "u": u, "v": v, "normalised": name}
    keys = {part: key for part, key in keys.items() if key in tensors}
    unread = _describe_unreadable(tensors, keys)
    if u not in tensors or not (v in tensors or name in tensors):
        lost = v if u in tensors else u
        unread = f"its spectral norm is incomplete: there is '{name}_orig' without '{lost}'"
    blocked = unread
    if not unread and f"{name}_sigma" in tensors:
        blocked = f"'{name}_sigma' beside it belongs to a class of its own, not to torch's hook"
    elif not unread and mask in tensors:
        blocked = f"'{mask}' beside it says that it is also pruned"
    if unread:
        keys = {"orig" if part == "weight" else part: key for part, key in keys.items()}
    shape = spec.shape if spec is not None else ()
    return Reparametrization(module, tensor, "spectral_norm", "hook", shape, keys, blocked)


def _find_weight_norm_hook(tensors: Mapping[str, Any], name: str) -> Reparametrization | None:
    """Return the weight norm with ``<name>_g`` or ``<name>_v``; None if they are something else."""
    module, _, tensor = name.rpartition(".")
    keys = {part: f"{name}_{part}" for part in ("g", "v") if f"{name}_{part}" in tensors}
    if any(f"{name}{end}" in tensors for end in ("", "_orig", "_bar", "_g_orig", "_v_orig")):
        return None  # a weight beside them, or parts of something else
    specs = [get_float_spec(tensors, key) for key in keys.values()]
    if len(specs) == 2 and (tensor == "weight" or (specs[1] and len(specs[1].shape) > 1)):
        norm = _make_weight_norm(tensors, module, tensor, "hook", keys["g"], keys["v"])
        if norm is not None:
            return norm
    if tensor != "weight":
        return None
    lost = next((f"{name}_{part}" for part in ("g", "v") if part not in keys), "")
    blocked = f"its weight norm is incomplete: there is no {quote_name(lost)}"
    if not lost:
        blocked = f"the shape of {quote_name(keys['g'])} is not that of norms of its v"
    shape = specs[-1].shape if "v" in keys and specs[-1] is not None else ()
    return Reparametrization(module, tensor, "weight_norm", "hook", shape, keys, blocked)


def _make_weight_norm(
    tensors: Mapping[str, Any],
    module: str,
    tensor: str,
    spelling: Literal["hook", "parametrization"],
    g: str,
    v: str,
) -> Reparametrization | None:
    size, direction = get_float_spec(tensors, g), get_float_spec(tensors, v)
    if size is None or direction is None or not find_weight_norm_dims(size.shape, direction.shape):
        return None
    keys = {"g": g, "v": v}
    return Reparametrization(module, tensor, "weight_norm", spelling, direction.shape, keys)


def _find_chain(
    tensors: Mapping[str, Any], name: str, parts: Keys, versions: Mapping[str, Any]
) -> Reparametrization:
    """Return the reparametrization that a list of torch's parametrizations makes of one tensor.

    Args:
        tensors: the state dict.
        name: qualified name of the tensor.
        parts: key of each part by its end, such as ``0._u``.
        versions: versions of the modules.
    """
    module, _, tensor = name.rpartition(".")
    path = qualify(module, f"parametrizations.{tensor}")
    links = _find_links(tensors, module, tensor, parts)
    # A link without tensors appears in the versions only.
    if len(links) == 1 and f"{path}.1" not in versions:
        return links[0]
    spec = get_float_spec(tensors, parts.get("original", ""))
    shape = spec.shape if spec is not None else ()
    norms = sorted(end for end in parts if re.fullmatch(r"\d+\._[uv]", end))
    group: Group = "spectral_norm" if norms else "parametrization"
    if links and f"{path}.{len(links)}" not in versions:
        reasons = [link.blocked for link in links if link.blocked]
        # An unknown map is named last, since the user can tell it.
        blocked = min(reasons, key=UNKNOWN_MAP.__eq__, default="")
        keys = {**links[0].keys, **{end: parts[end] for end in norms if end[0] != "0"}}
        shape = links[0].shape
        return Reparametrization(
            module, tensor, group, "parametrization", shape, keys, blocked, links=tuple(links)
        )
    blocked = f"only the model's code says what makes it of {quote_names(sorted(parts))}"
    if norms and (lost := _PARTS - parts.keys()) and parts.keys() <= _PARTS:
        blocked = (
            f"its spectral norm is incomplete: there is '{parts[norms[0]]}' without "
            f"'{path}.{min(lost)}'"
        )
    return Reparametrization(module, tensor, group, "parametrization", shape, dict(parts), blocked)


def _find_links(
    tensors: Mapping[str, Any], module: str, tensor: str, parts: Keys
) -> list[Reparametrization]:
    """Return the links of a chain if torch's own classes explain all of its keys; otherwise none.

    Torch's weight norm and orthogonality can be the first link only, its spectral norm any link::

        original0, original1, 1._u, 1._v  # spectral norm of what weight norm makes
    """
    name, left, links = qualify(module, tensor), dict(parts), list[Reparametrization]()
    spec = get_float_spec(tensors, parts.get("original", ""))
    shape = spec.shape if spec is not None else ()
    make = partial(Reparametrization, module, tensor, spelling="parametrization")
    if left.keys() >= {"original0", "original1"}:
        g, v = left.pop("original0"), left.pop("original1")
        norm = _make_weight_norm(tensors, module, tensor, "parametrization", g, v)
        if norm is None:
            return []
        links, shape = [norm], norm.shape
    elif "original" not in left:
        return []
    elif "0.base" in left:
        pair = {end: left.pop(end) for end in ("original", "0.base")}
        blocked = _describe_misfit(tensors, pair) or UNKNOWN_MAP
        links.append(make(group="orthogonal", shape=shape, keys=pair, blocked=blocked))
    raw = name if links else left.pop("original")
    while {f"{len(links)}._u", f"{len(links)}._v"} <= left.keys():
        vectors = {part: left.pop(f"{len(links)}._{part}") for part in ("u", "v")}
        keys = {"weight": raw, **vectors}
        blocked = _describe_unreadable(tensors, vectors if links else keys)
        keys = dict(parts) if blocked and not links else keys
        links.append(make(group="spectral_norm", shape=shape, keys=keys, blocked=blocked))
        raw = name  # the weight of the next link is the value so far, which has no key of its own
    return [] if left else links


def _describe_misfit(tensors: Mapping[str, Any], parts: Keys) -> str:
    """Return why the parts of an orthogonal tensor do not fit each other, or nothing.

    The base is square: ``original`` [5, 3] has ``0.base`` [5, 5].
    """
    raw, base = (get_float_spec(tensors, parts[end]) for end in ("original", "0.base"))
    if raw is None or base is None or len(raw.shape) < 2:
        return f"{quote_names(parts.values())} are no matrices"
    wanted = (*raw.shape[:-2], *2 * (max(raw.shape[-2:]),))
    if base.shape != wanted:
        return f"{quote_name(parts['0.base'])} is {list(base.shape)} and should be {list(wanted)}"
    return ""


def _describe_unreadable(tensors: Mapping[str, Any], keys: Keys) -> str:
    """Return why the parts of a spectral norm cannot be read, or nothing."""
    specs = {key: get_float_spec(tensors, key) for key in keys.values()}
    odd = [key for key, spec in specs.items() if spec is None]
    if odd:
        plural = "s" if len(odd) > 1 else ""
        return f"{quote_subject(odd, 'is')} no dense floating tensor{plural}"
    shapes = {key: spec.shape for key, spec in specs.items() if spec is not None}
    empty = [key for key, shape in shapes.items() if 0 in shape]
    if empty:
        return f"{quote_subject(empty, 'has')} no elements"
    weight, normalised = keys.get("weight", ""), keys.get("normalised", "")
    if normalised and shapes[weight] != shapes[normalised]:
        return (
            f"{quote_name(normalised)} is {list(shapes[normalised])} and should be "
            f"{list(shapes[weight])}"
        )
    return ""


def find_handwritten_norms(tensors: Mapping[str, Any]) -> list[str]:
    """Return the keys of the weights that seem to be under a handwritten spectral norm.

    Known are ``weight_bar`` with ``weight_u``; ``weight`` with ``weight_u`` but without the
    ``weight_orig`` of torch's hook; and ``weight`` with ``u0`` and ``sv0``, with ``sn_u`` and
    ``sn_sigma``, or with a ``u`` of as many elements as it has rows.
    """
    return [key for key in tensors if _is_handwritten(tensors, key)]


def describe_handwritten_norms(tensors: Mapping[str, Any]) -> tuple[str, ...]:
    """Return a sentence about `find_handwritten_norms`, or nothing where there are none."""
    found = find_handwritten_norms(tensors)
    if not found:
        return ()
    return (
        f"{quote_subject(found, 'looks')} like handwritten spectral norm, which is left as it is: "
        "only the model's code can tell the weight in use, and 'sn-export onnx' runs that",
    )


def _is_handwritten(tensors: Mapping[str, Any], key: str) -> bool:
    if key.endswith("_bar"):
        return f"{key.removesuffix('_bar')}_u" in tensors
    start, dot, name = key.rpartition(".")
    if name != "weight":
        return False
    if f"{key}_u" in tensors:
        return f"{key}_orig" not in tensors
    if any(all(start + dot + part in tensors for part in parts) for parts in _BESIDE):
        return True
    weight, vector = get_float_spec(tensors, key), get_float_spec(tensors, start + dot + "u")
    if weight is None or vector is None or len(weight.shape) < 2:
        return False
    return max(vector.shape, default=0) == math.prod(vector.shape) == weight.shape[0]
