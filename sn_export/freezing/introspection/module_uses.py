"""What code does with modules, and the sets of modules that stand for an expression."""

from __future__ import annotations

import dis
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from types import FunctionType, MethodType
from typing import Any, NamedTuple

from torch import nn

Modules = frozenset[nn.Module]
NONE: Modules = frozenset()
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
DEPTH = 8  # of calls within calls, and of lists within lists


class Uses:
    """What evaluated functions do with modules.

    Attributes:
        calls: the modules that are called.
        handed: the modules that code which cannot be read may call.
        reads: pairs of a module and the name of an attribute, each with the module whose code
            reads it.
    """

    def __init__(self) -> None:
        self.calls: set[nn.Module] = set()
        self.handed: set[nn.Module] = set()
        self.reads: dict[tuple[nn.Module, str], nn.Module] = {}

    def read(self, module: nn.Module, name: str, reader: nn.Module) -> None:
        """Note that the code of ``reader`` reads an attribute of ``module``."""
        if name in ("forward", "__call__"):
            self.calls.add(module)
        elif module is not reader:
            key = (module, name)
            if key not in self.reads or any(module is child for child in reader._modules.values()):
                self.reads[key] = reader  # the parent rather than a module above it

    def call(self, modules: Iterable[nn.Module], owner: nn.Module) -> None:
        """Note that the code of ``owner`` calls ``modules``."""
        self.calls.update(_iter_with_entries(modules, owner))

    def hand_over(self, modules: Iterable[nn.Module], owner: nn.Module) -> None:
        """Note that ``modules`` may be called by code that cannot be read."""
        self.handed.update(_iter_with_entries(modules, owner))

    def skim(self, function: FunctionType, owner: nn.Module) -> None:
        """Note what compiled code does with children: it reads ``self.child.name``, or may call."""
        instructions = list(dis.get_instructions(function))
        for this, following in pairwise(instructions):
            child = owner._modules.get(this.argval) if isinstance(this.argval, str) else None
            if child is None or not this.opname.startswith("LOAD_"):
                continue
            if this.opname == following.opname == "LOAD_ATTR":
                self.read(child, following.argval, owner)
            else:
                self.hand_over([child], owner)


class Given(NamedTuple):
    """The modules that the arguments of a call may be; those of ``**kwargs`` are under None."""

    positional: Sequence[Modules] = ()
    named: Mapping[str | None, Modules] = {}

    def bind(self, names: Sequence[str]) -> tuple[dict[str, Modules], Modules]:
        """Return the modules for each parameter, and those that fit none of them."""
        bound = dict(zip(names, self.positional, strict=False))
        bound |= {name: self.named[name] for name in names if name in self.named}
        more = (modules for key, modules in self.named.items() if key not in names)
        return bound, NONE.union(*self.positional[len(names) :], *more)


def _iter_with_entries(modules: Iterable[nn.Module], owner: nn.Module) -> Iterator[nn.Module]:
    """Yield ``modules``, the entries of containers among them, and the children of ``owner``."""
    for module in modules:
        yield module
        if module is owner or isinstance(module, _CONTAINERS):
            yield from list_children(module)


def list_children(module: nn.Module) -> list[nn.Module]:
    """Return the children of a module, without those that are None."""
    return [child for child in module._modules.values() if child is not None]


def list_entries(modules: Modules) -> Modules:
    """Return what iterating over ``modules`` gives: of a container its entries."""
    inside = (list_children(m) if isinstance(m, _CONTAINERS) else [m] for m in modules)
    return NONE.union(*inside)


def find_held(value: Any, depth: int = 0) -> Modules:
    """Return the modules in an attribute: itself, or the entries of a list, tuple or dict."""
    if isinstance(value, nn.Module):
        return frozenset({value})
    if isinstance(value, MethodType) and isinstance(value.__self__, nn.Module):
        return frozenset({value.__self__})
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)) and len(value) < 1000 and depth < DEPTH:
        return NONE.union(*(find_held(entry, depth + 1) for entry in value))
    return NONE
