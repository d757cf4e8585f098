"""Nested inputs and outputs: their tensors in order, with the names that they have in a file.

Tuples, lists, dicts, named tuples and whatever is registered with torch's pytree are containers,
and so are dataclasses and subclasses of dict, registered or not.
"""

from __future__ import annotations

import copy
import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from typing import Any

import numpy as np
from torch import Tensor, nn

from .torch_private import pytree

Path = tuple[str, ...]  # keys, indices and field names


def map_tensors(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Return ``value`` with every tensor replaced; containers are copied, the originals stay."""

    def change_leaf(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return change(leaf)
        return _rebuild(change, leaf) if _is_unregistered(leaf) else leaf

    return pytree.tree_map(change_leaf, value)


def list_tensors(value: Any) -> list[Tensor]:
    """Return the tensors in a nested value, in the order of `find_tensors`."""
    return [leaf for _, leaf in find_tensors(value)]


def find_tensors(value: Any) -> list[tuple[Path, Tensor]]:
    """Return the tensors with keys, indices and field names on the way to them.

    ::

        find_tensors({"boxes": [a, b], "score": c, "size": 3})
        # [(("boxes", "0"), a), (("boxes", "1"), b), (("score",), c)]
    """
    return [(path, leaf) for path, leaf in _iter_leaves(value) if isinstance(leaf, Tensor)]


def find_unseen_tensors(value: Any) -> list[tuple[Path, str]]:
    """Return where ``value`` holds tensors that are none of `find_tensors`.

    Returns:
        The way to each object, and what it is: a numpy array, an object with tensors in its
        attributes, a dataclass with tensors in attributes that are no fields. Modules are not
        among them: their tensors are weights.
    """
    found = [
        (path, type(leaf).__name__) for path, leaf in _iter_leaves(value) if _holds_tensors(leaf)
    ]
    return found + [
        (path, type(record).__name__)
        for path, record in _iter_records(value)
        if _has_tensor(_collect_further_attributes(record))
    ]


def list_entries(value: Any) -> list[tuple[str, Any]] | None:
    """Return what a container holds, by key, index or field; None if it is no container."""
    if _is_unregistered(value):
        return [*_collect_own_entries(value).items()]

    def is_within(node: Any) -> bool:
        return node is not value

    content, spec = pytree.tree_flatten(value, is_leaf=is_within)
    if spec.is_leaf():
        return None
    try:
        paths, _ = pytree.tree_flatten_with_path(value, is_leaf=is_within)
        return [(_get_key(path[0]), entry) for path, entry in paths]
    except ValueError:  # registered without names, as transformers does
        names = [*value] if isinstance(value, Mapping) else []
        keys = names if len(names) == len(content) else range(len(content))
        return [(str(key), entry) for key, entry in zip(keys, content, strict=True)]


def is_plain(value: Any) -> bool:
    """Whether both exporters take a value as it is: tensors and None in Python's containers."""
    if value is None or isinstance(value, Tensor):
        return True
    if type(value) in (dict, OrderedDict):
        return all(isinstance(key, str) and is_plain(item) for key, item in value.items())
    if type(value) in (tuple, list) or (isinstance(value, tuple) and hasattr(value, "_fields")):
        return all(map(is_plain, value))
    return False


def make_output_names(paths: Iterable[Path]) -> list[str]:
    """Return names for the tensors of an output, each different.

    A lone tensor is ``output``, those of a tuple ``output_0`` and on; keys and fields give their
    names, nested ones joined::

        make_output_names([()])  # ["output"]
        make_output_names([("0",), ("1", "mask")])  # ["output_0", "output_1_mask"]
        make_output_names([("boxes", "0"), ("score",)])  # ["boxes_0", "score"]
    """
    names = []
    for path in paths:
        keys = [key for key in path if key]
        by_number = not keys or keys[0].lstrip("-").isdigit()
        names.append("_".join(("output", *keys) if by_number else keys))
    return make_distinct(names)


def make_distinct(names: Iterable[str], taken: Iterable[str] = ()) -> list[str]:
    """Return the names; a name that is taken already gets a number.

    ::

        make_distinct(["x", "y", "x"], taken=["y"])  # ["x", "y_1", "x_1"]
    """
    seen, found = set(taken), []
    for name in names:
        free, number = name, 0
        while free in seen:
            number += 1
            free = f"{name}_{number}"
        seen.add(free)
        found.append(free)
    return found


def _iter_leaves(value: Any, path: Path = ()) -> Iterable[tuple[Path, Any]]:
    entries = None if value is None or isinstance(value, Tensor) else list_entries(value)
    if entries is None:
        yield path, value
    else:
        for key, entry in entries:
            yield from _iter_leaves(entry, (*path, key))


def _iter_records(value: Any, path: Path = ()) -> Iterable[tuple[Path, Any]]:
    if _is_unregistered(value):
        yield path, value
    for key, entry in (None if isinstance(value, Tensor) else list_entries(value)) or ():
        yield from _iter_records(entry, (*path, key))


def _is_unregistered(value: Any) -> bool:
    """Whether it is a dataclass or a dict that torch's pytree does not know."""
    return (
        (dataclasses.is_dataclass(value) or isinstance(value, dict))
        and not isinstance(value, (type, Tensor, nn.Module))
        and pytree.tree_structure(value).is_leaf()
    )


def _collect_own_entries(value: Any) -> dict[str, Any]:
    # Some classes are both, and keep their fields among their items.
    entries = _collect_fields(value)
    if isinstance(value, dict):
        held = set(map(id, entries.values()))
        entries |= {str(key): item for key, item in value.items() if id(item) not in held}
    return entries


def _collect_fields(value: Any) -> dict[str, Any]:
    if not dataclasses.is_dataclass(value):
        return {}
    names = [field.name for field in dataclasses.fields(value)]
    return {name: getattr(value, name) for name in names if hasattr(value, name)}


def _collect_further_attributes(value: Any) -> dict[str, Any]:
    """Return the attributes of an unregistered container that are neither entries nor cached."""
    return {
        name: item
        for name, item in getattr(value, "__dict__", {}).items()
        if name not in _collect_fields(value) and not _is_cached(value, name)
    }


def _is_cached(value: Any, name: str) -> bool:
    return isinstance(getattr(type(value), name, None), cached_property)


def _rebuild(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Return a copy of an unregistered container with every tensor replaced.

    It is made past ``__init__``, ``__post_init__`` and ``__setattr__``: the object may be frozen,
    or compute from its fields what it holds already.
    """
    changed: Any
    if isinstance(value, dict):
        changed = type(value).__new__(type(value))
        getattr(changed, "__dict__", {}).update(getattr(value, "__dict__", {}))
    else:
        changed = copy.copy(value)
    for name in [name for name in getattr(changed, "__dict__", {}) if _is_cached(changed, name)]:
        del changed.__dict__[name]
    done = {}
    for name, item in _collect_fields(value).items():
        done[id(item)] = map_tensors(change, item)
        object.__setattr__(changed, name, done[id(item)])
    if isinstance(value, dict):
        kind = OrderedDict if isinstance(value, OrderedDict) else dict
        for key, item in value.items():
            new = done[id(item)] if id(item) in done else map_tensors(change, item)
            kind.__setitem__(changed, key, new)
    return changed


def _holds_tensors(leaf: Any) -> bool:
    if isinstance(leaf, np.ndarray):
        return leaf.ndim > 0
    if isinstance(leaf, (Tensor, nn.Module, type)):
        return False
    if isinstance(leaf, (tuple, list, set, frozenset)) and _has_tensor(list(leaf)):
        return True
    return _has_tensor(getattr(leaf, "__dict__", {}))


def _has_tensor(content: Any) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(content))


def _get_key(entry: Any) -> str:
    """Return the key, index or field that an entry of one of pytree's paths stands for."""
    for attribute in ("key", "idx", "name"):
        if hasattr(entry, attribute):
            return str(getattr(entry, attribute))
    return str(entry)
