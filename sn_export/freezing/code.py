"""What the code of a class says: the methods it defines, and the names that each one uses.

Handwritten spectral norms are told by what they hold and do. What a class holds is seen on the
module; which of its methods reads what is seen in their compiled code, without running it.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cached_property
from types import CodeType, FunctionType
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

_LIBRARIES = {"torch", "numpy", "builtins", "abc", "typing", "functools"}


@dataclass(frozen=True)
class Member:
    """A method or property that a class defines itself, below torch's own classes.

    Attributes:
        name: its name.
        is_property: whether it is read rather than called.
        required: number of arguments after ``self`` that must be given.
        has_options: whether it takes more, so that a call without them may mean something else.
        names: attributes, globals and string constants of its code, and of the helper functions
            that it calls by name.
        own: the same without the helpers.
    """

    name: str
    is_property: bool
    required: int
    has_options: bool
    names: frozenset[str]
    own: frozenset[str]


class Code:
    """What the classes behind one module class define. Holds names only, so no class leaks."""

    def __init__(self, cls: type) -> None:
        self.is_torch = all(_is_library(c) for c in cls.__mro__)
        self.members: dict[str, Member] = {}
        if self.is_torch:
            return
        for base in reversed(cls.__mro__):
            if not _is_library(base):
                for name, entry in vars(base).items():
                    member = _member(name, entry)
                    if member is not None:
                        self.members[name] = member
        forward = self.members.get("forward")
        if forward is None:
            forward = _member("forward", getattr(cls, "forward", None))
        self.forward = forward or Member("forward", False, 0, False, frozenset(), frozenset())

    @cached_property
    def names(self) -> frozenset[str]:
        """Every name in any member."""
        return frozenset().union(*(member.names for member in self.members.values()))

    def reached(self, start: Member, cut: Collection[str] = ()) -> Iterator[Member]:
        """Yield the members that ``start`` uses, nearest first, not looking into ``cut``."""
        queue, seen = [start], {start.name, *cut}
        for member in queue:
            for name in self.members:  # in the order of definition, so that runs agree
                if name in member.names and name not in seen:
                    seen.add(name)
                    queue.append(self.members[name])
                    yield self.members[name]

    def mentions(self, start: Member, cut: Collection[str] = ()) -> frozenset[str]:
        """Return all names in ``start`` and the members it reaches, except inside ``cut``."""
        return start.names.union(*(member.names for member in self.reached(start, cut)))


_LAYERS = frozenset(
    entry for entry in vars(nn.modules).values() if isinstance(entry, type)
)  # asked for every module, so not found out anew


def is_torch_layer(cls: type) -> bool:
    """Whether ``cls`` is a layer of torch, perhaps parametrized."""
    if cls in _LAYERS:
        return True
    return cls.__module__ == "torch.nn.utils.parametrize" and cls.__bases__[0] in _LAYERS


_codes: WeakKeyDictionary[type, Code] = WeakKeyDictionary()


def code_of(cls: type) -> Code:
    """Return what the code of ``cls`` says; read once for each class."""
    code = _codes.get(cls)
    if code is None:
        code = _codes[cls] = Code(cls)
    return code


def mentioned(name: str, names: Collection[str]) -> bool:
    """Whether code that uses ``names`` reads the attribute ``name``, perhaps by a pattern.

    ``u0`` may be read as ``getattr(self, "u%d" % i)`` or ``getattr(self, f"u{i}")``, and
    ``weight_u`` as ``getattr(self, name + "_u")`` or ``getattr(self, "%s_u" % name)``.
    """
    stem = name.rstrip("0123456789")
    if name in names or (stem != name and bool(stem) and _has_pattern(stem, names)):
        return True
    head, _, tail = name.rpartition("_")
    return bool(head) and any(
        n.endswith((f"}}_{tail}", f"s_{tail}")) or n == f"_{tail}" for n in names
    )


def names_in(function: Any) -> frozenset[str]:
    """Return the names in the code of a function, a method or the class of a callable object."""
    function = getattr(function, "__func__", function)
    if isinstance(function, FunctionType):
        member = _member("", function)
        return member.names if member else frozenset()
    return code_of(type(function)).names


def times_read(function: Any, name: str) -> int:
    """Return how often the code of ``function`` reads the attribute ``name``."""
    import dis  # takes a while to load, and few modules need it

    return sum(
        instruction.argval == name and instruction.opname in ("LOAD_ATTR", "LOAD_METHOD")
        for instruction in dis.get_instructions(inspect.unwrap(function))
    )


def _has_pattern(stem: str, names: Collection[str]) -> bool:
    return any(n == stem or n.startswith((stem + "%", stem + "{")) for n in names)


def _is_library(cls: type) -> bool:
    return cls.__module__.partition(".")[0] in _LIBRARIES


def _member(name: str, entry: Any) -> Member | None:
    is_property = isinstance(entry, (property, cached_property))
    if isinstance(entry, property):
        entry = entry.fget
    elif isinstance(entry, cached_property):
        entry = entry.func
    function = inspect.unwrap(entry) if isinstance(entry, FunctionType) else None
    if not isinstance(function, FunctionType):
        return None
    code = function.__code__
    required = max(0, code.co_argcount - 1 - len(function.__defaults__ or ()))
    own = frozenset(_names(code))
    has_options = bool(function.__defaults__ or function.__kwdefaults__)
    names = own | _helper_names(function)
    return Member(name, is_property, required, has_options, names, own)


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, str):
            yield constant
        elif isinstance(constant, tuple):
            yield from (c for c in constant if isinstance(c, str))
        elif isinstance(constant, CodeType):
            yield from _names(constant)


def _helper_names(function: FunctionType) -> set[str]:
    """The names in functions of the user's that ``function`` calls by a global name."""
    queue, names = [function], set[str]()
    for caller in queue:
        for name in caller.__code__.co_names:
            helper = caller.__globals__.get(name)
            if (
                isinstance(helper, FunctionType)
                and helper not in queue
                and helper.__module__ is not None
                and helper.__module__.partition(".")[0] not in _LIBRARIES
            ):
                queue.append(helper)
                names.update(_names(helper.__code__))
    return names
