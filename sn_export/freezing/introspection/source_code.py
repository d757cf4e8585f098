"""What the code of a class says: the methods it defines, and the names that each one uses.

A handwritten spectral norm is recognised by what it holds and does. The module shows what it holds;
the compiled code of the methods shows, without running, which of them reads what. A call of a
method runs its override, and the methods of base classes that the override calls.
"""

from __future__ import annotations

import ast
import builtins
import dis
import inspect
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from types import CodeType, FunctionType, ModuleType
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

_LIBRARIES = {"torch", "numpy", "builtins", "abc", "typing", "functools"}

Classes = Sequence[type]

_NONE: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Member:
    """A method or property that a class defines itself, below torch's own classes.

    Attributes:
        name: its name.
        is_property: whether it is read rather than called.
        required: number of arguments after ``self`` that must be given.
        has_options: whether it takes more, so that a call without them may mean something else.
        names: attributes, globals and string constants of its code, of what it overrides and
            still calls, and of the helper functions that it calls by name.
        own: the same without the helpers.
    """

    name: str
    is_property: bool
    required: int
    has_options: bool
    names: frozenset[str]
    own: frozenset[str]


class Code:
    """What a module class and its bases define, as names alone, so that no class is kept alive."""

    def __init__(self, cls: type) -> None:
        self.is_torch = all(map(is_library, cls.__mro__))
        self.members: dict[str, Member] = {}
        if self.is_torch:
            return
        own = [base for base in reversed(cls.__mro__) if not is_library(base)]
        for name in dict.fromkeys(name for base in own for name in vars(base)):
            member = _find_member(cls, name)
            if member is not None:
                self.members[name] = member
        self.forward = _find_member(cls, "forward") or Member(
            "forward", False, 0, False, _NONE, _NONE
        )

    @cached_property
    def names(self) -> frozenset[str]:
        """Every name in any member."""
        return frozenset().union(*(member.names for member in self.members.values()))

    def iter_used(self, start: Member, cut: Collection[str] = ()) -> Iterator[Member]:
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
        return start.names.union(*(member.names for member in self.iter_used(start, cut)))

    def find_updates(self, names: Collection[str], cut: Collection[str] = ()) -> list[Member]:
        """Return the methods that forward calls without arguments, and that mention ``names``."""
        return [
            member
            for member in self.iter_used(self.forward, cut)
            if member.name in self.forward.names
            and not member.is_property
            and member.required == 0
            and any(is_mentioned(name, self.mentions(member)) for name in names)
        ]


# Collected once, since each module of a network is looked up here.
_LAYERS = frozenset(entry for entry in vars(nn.modules).values() if isinstance(entry, type))


def is_torch_layer(cls: type) -> bool:
    """Whether ``cls`` is a layer of torch, perhaps parametrized."""
    if cls in _LAYERS:
        return True
    return cls.__module__ == "torch.nn.utils.parametrize" and cls.__bases__[0] in _LAYERS


def find_torch_base(cls: type) -> type[nn.Module] | None:
    """Return the nearest class of torch behind ``cls``, unless that is `nn.Module` itself."""
    for base in cls.__mro__:
        if base.__module__.startswith("torch.nn.modules."):
            return base if base is not nn.Module else None
    return None


_codes: WeakKeyDictionary[type, Code] = WeakKeyDictionary()


def read_code(cls: type) -> Code:
    """Return what the code of ``cls`` says; read once for each class."""
    code = _codes.get(cls)
    if code is None:
        code = _codes[cls] = Code(cls)
    return code


def is_mentioned(name: str, names: Collection[str]) -> bool:
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


def collect_names(function: Any) -> frozenset[str]:
    """Return the names in the code of a function, a method or the class of a callable object."""
    while isinstance(function, partial):
        function = function.func
    function = getattr(function, "__func__", function)
    if isinstance(function, FunctionType):
        function = inspect.unwrap(function)
        return _collect_names([function]) | _find_helper_names([function])
    return read_code(type(function)).names


_names_of_methods: WeakKeyDictionary[type, frozenset[str]] = WeakKeyDictionary()


def collect_method_names(cls: type[nn.Module]) -> frozenset[str]:
    """Return the names in all methods of ``cls`` below `nn.Module`, torch's own included."""
    if cls not in _names_of_methods:
        bases = cls.__mro__[: cls.__mro__.index(nn.Module)]
        entries = (unwrap_function(entry) for base in bases for entry in vars(base).values())
        found = [function for function in entries if function is not None]
        _names_of_methods[cls] = _collect_names(found) | _find_helper_names(found)
    return _names_of_methods[cls]


def count_reads(cls: type, method: str, name: str) -> int:
    """Return how often the code that ``method`` of ``cls`` runs reads the attribute ``name``."""
    return sum(
        instruction.argval == name and instruction.opname in ("LOAD_ATTR", "LOAD_METHOD")
        for function in find_functions(cls.__mro__, method)
        for instruction in dis.get_instructions(function)
    )


def _has_pattern(stem: str, names: Collection[str]) -> bool:
    return any(n == stem or n.startswith((stem + "%", stem + "{")) for n in names)


def _find_member(cls: type, name: str) -> Member | None:
    found = find_functions(cls.__mro__, name)
    if not found:
        return None
    function, code = found[0], found[0].__code__
    return Member(
        name,
        is_property=isinstance(inspect.getattr_static(cls, name), (property, cached_property)),
        required=max(0, code.co_argcount - 1 - len(function.__defaults__ or ())),
        has_options=bool(function.__defaults__ or function.__kwdefaults__),
        names=_collect_names(found) | _find_helper_names(found),
        own=_collect_names(found),
    )


def _collect_names(found: Iterable[FunctionType]) -> frozenset[str]:
    return frozenset(name for function in found for name in _iter_names(function.__code__))


def _iter_names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, str):
            yield constant
        elif isinstance(constant, tuple):
            yield from (c for c in constant if isinstance(c, str))
        elif isinstance(constant, CodeType):
            yield from _iter_names(constant)


def _iter_around(function: FunctionType) -> Iterator[Any]:
    """Yield what the names in a function may mean, of its module and of functions around it."""
    yield from (function.__globals__.get(name) for name in function.__code__.co_names)
    for cell in function.__closure__ or ():
        with suppress(ValueError):  # an empty one
            yield cell.cell_contents


def _find_helper_names(found: Iterable[FunctionType]) -> set[str]:
    """Return the names in the user's functions that those in ``found`` call, directly or not."""
    queue, names = list(found), set[str]()
    for caller in queue:
        for helper in _iter_around(caller):
            if isinstance(helper, FunctionType) and helper not in queue and not is_library(helper):
                queue.append(helper)
                names.update(_iter_names(helper.__code__))
    return names


def is_library(thing: type | FunctionType) -> bool:
    """Whether a class or function is not the user's."""
    module: str | None = thing.__module__
    return module is None or module.partition(".")[0] in _LIBRARIES


def unwrap_function(entry: Any) -> FunctionType | None:
    """Return the function behind an entry of a class: a method, or the getter of a property."""
    if isinstance(entry, (staticmethod, classmethod)):
        entry = entry.__func__
    if isinstance(entry, property):
        entry = entry.fget
    elif isinstance(entry, cached_property):
        entry = entry.func
    function = inspect.unwrap(entry) if isinstance(entry, FunctionType) else None
    return function if isinstance(function, FunctionType) else None


def find_functions(classes: Classes, name: str) -> list[FunctionType]:
    """Return what ``name`` runs when it is looked up in ``classes``, the override first.

    An override may call ``super().name`` or ``Base.name``, which are returned too. Of torch's own
    code only forward counts, since that reads a weight.

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
            function = unwrap_function(vars(base)[name])
            if function is not None and function not in found:
                found.append(function)
                if not is_foreign:
                    queue += _iter_behind(function, name, order[position:])
            break
    return found


def _iter_behind(function: FunctionType, name: str, order: Classes) -> Iterator[Classes]:
    """Yield the rest of ``order`` where ``function``, of its first class, calls ``name`` again."""
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


def iter_methods(cls: type[nn.Module], from_forward: bool) -> Iterator[FunctionType]:
    """Yield what may run in a forward: all methods but those that build; forward alone of torch."""
    yield from find_functions(cls.__mro__, "forward")
    for base in () if from_forward else cls.__mro__[: cls.__mro__.index(nn.Module)]:
        for name, entry in vars(base).items():
            is_building = name.startswith("__") or "init" in name or "reset" in name
            is_known = name in ("forward", "extra_repr", "_load_from_state_dict")
            function = None if is_building or is_known else unwrap_function(entry)
            if function is not None and not is_library(base):
                yield function


def resolve_name(node: ast.AST, function: FunctionType) -> Any:
    """Return what a name from outside of ``function`` stands for, such as ``F.linear``."""
    if isinstance(node, ast.Attribute):
        holder = resolve_name(node.value, function)
        is_known = isinstance(holder, (ModuleType, type))  # others may run code of their own
        return getattr(holder, node.attr, None) if is_known else None
    if not isinstance(node, ast.Name):
        return None
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    for name, cell in cells:
        if name == node.id:
            try:
                return cell.cell_contents
            except ValueError:  # not set yet
                return None
    return function.__globals__.get(node.id, getattr(builtins, node.id, None))
