"""What a call of a method runs: an override, and what it calls of the classes behind it."""

from __future__ import annotations

import dis
import inspect
from collections.abc import Iterator, Sequence
from functools import cached_property
from types import FunctionType
from typing import Any

_LIBRARIES = {"torch", "numpy", "builtins", "abc", "typing", "functools"}

Classes = Sequence[type]


def is_library(thing: type | FunctionType) -> bool:
    """Whether a class or function is not the user's."""
    module: str | None = thing.__module__
    return module is None or module.partition(".")[0] in _LIBRARIES


def function_of(entry: Any) -> FunctionType | None:
    """Return the function of a method or property, as its class holds it."""
    if isinstance(entry, property):
        entry = entry.fget
    elif isinstance(entry, cached_property):
        entry = entry.func
    function = inspect.unwrap(entry) if isinstance(entry, FunctionType) else None
    return function if isinstance(function, FunctionType) else None


def functions(classes: Classes, name: str) -> list[FunctionType]:
    """Return what ``name`` runs when it is looked up in ``classes``, the override first.

    An override goes on with ``super().name`` or ``Base.name``, if at all. Of torch's own code
    only forward counts, since that reads a weight.

    Args:
        classes: the order of resolution, or the rest of it.
        name: of a method or property.
    """
    found: list[FunctionType] = []
    queue = [classes]
    for order in queue:
        for position, base in enumerate(order):
            is_foreign = is_library(base)
            if name not in vars(base) or (is_foreign and name != "forward"):
                continue
            function = function_of(vars(base)[name])
            if function is not None and function not in found:
                found.append(function)
                if not is_foreign:
                    queue += _behind(function, name, order[position:])
            break
    return found


def _behind(function: FunctionType, name: str, order: Classes) -> Iterator[Classes]:
    """Yield the classes where ``function``, of the first of them, looks up ``name`` again."""
    places = {base.__name__: order[i:] for i, base in enumerate(order) if i}
    places["super"] = order[1:]
    code = function.__code__
    if name == "__init__" or places.keys().isdisjoint((*code.co_names, *code.co_freevars)):
        return  # most of them
    place: Classes = ()
    for instruction in dis.get_instructions(function):
        if instruction.argval in places:
            place = places[instruction.argval]
        elif instruction.opname in ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR"):
            if instruction.argval == name and place:
                yield place
            place = ()
