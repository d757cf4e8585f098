"""Nested inputs and outputs: their tensors in order, with the names that they have in a file.

Tuples, lists, dicts, named tuples and whatever is registered with torch's pytree are containers,
and so are dataclasses, registered or not.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

Path = tuple[str, ...]  # keys, indices and field names


def map_tensors(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Return ``value`` with every tensor replaced; dataclasses are copied, the originals stay."""

    def change_leaf(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return change(leaf)
        if not is_record(leaf):
            return leaf
        changed = copy.copy(leaf)
        for name, content in record_fields(leaf).items():
            object.__setattr__(changed, name, map_tensors(change, content))  # it may be frozen
        return changed

    return pytree.tree_map(change_leaf, value)


def tensor_leaves(value: Any) -> list[Tensor]:
    """Return the tensors in a nested value, in the order of pytree."""
    return [leaf for _, leaf in paths_of_tensors(value)]


def paths_of_tensors(value: Any) -> list[tuple[Path, Tensor]]:
    """Return the tensors with keys, indices and field names on the way to them."""
    found = []
    for path, leaf in pytree.tree_flatten_with_path(value)[0]:
        keys = tuple(map(_key, path))
        if isinstance(leaf, Tensor):
            found.append((keys, leaf))
        elif is_record(leaf):
            found += [(keys + inner, t) for inner, t in paths_of_tensors(record_fields(leaf))]
    return found


def is_plain(value: Any) -> bool:
    """Whether an exporter takes it as it is: tensors and None in containers that torch knows."""
    return all(leaf is None or isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value))


def output_names(paths: Iterable[Path]) -> list[str]:
    """Return names for the tensors of an output, each different.

    A lone tensor is ``output``, those of a tuple ``output_0`` and on; keys and fields give their
    names, nested ones joined: ``boxes_0``.
    """
    names = []
    for path in paths:
        by_number = not path or path[0].lstrip("-").isdigit()
        names.append("_".join(("output", *path) if by_number else path))
    return distinct(names)


def distinct(names: Iterable[str], taken: Iterable[str] = ()) -> list[str]:
    """Return the names with a number after those that are there already."""
    seen, found = set(taken), []
    for name in names:
        free, number = name, 0
        while free in seen:
            number += 1
            free = f"{name}_{number}"
        seen.add(free)
        found.append(free)
    return found


def is_record(value: Any) -> bool:
    """Whether it is an instance of a dataclass that torch's pytree does not know."""
    return (
        dataclasses.is_dataclass(value)
        and not isinstance(value, (type, Tensor, nn.Module))
        and pytree.tree_structure(value).is_leaf()
    )


def record_fields(record: Any) -> dict[str, Any]:
    """Return the fields of a dataclass by name."""
    return {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}


def _key(entry: Any) -> str:
    for attribute in ("key", "idx", "name"):
        if hasattr(entry, attribute):
            return str(getattr(entry, attribute))
    return str(entry)
