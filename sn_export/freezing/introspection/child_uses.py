"""Which modules a network's code calls, and which tensors of them it merely reads.

The weight of a layer under a pre-hook is set when the layer is called. A forward that reads it and
never calls the layer, such as ``F.linear(x, self.out.weight)``, uses what stands there. Whether
it does is asked of the source: each method is evaluated on the real modules, and an expression
stands for the modules that it may be::

    layer = self.blocks[i].out            # {blocks.0.out, blocks.1.out}
    y = F.linear(x, layer.weight)         # reads (blocks.0.out, weight), (blocks.1.out, weight)
    for block in self.blocks: y = block(y)  # calls blocks.0, blocks.1

Branches and the order of statements play no part. Where a module is handed to code that cannot be
read, it is not known whether that code calls it.
"""

from __future__ import annotations

import ast
import builtins
import dis
import inspect
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from types import FunctionType, MethodType, ModuleType
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from .source_code import function_of, functions, is_library

Modules = frozenset[nn.Module]
_Function = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda

_NONE: Modules = frozenset()
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
# Attributes of a tensor that say nothing of its values.
_METADATA = {"dtype", "device", "shape", "ndim", "size", "dim", "numel", "requires_grad"}
_HARMLESS = {"isinstance", "len", "hasattr", "type", "id", "print", "str", "bool", "super"}
_PASSING = {"enumerate", "zip", "list", "tuple", "dict", "reversed", "iter", "next", "sorted"}
_ENTRIES = {"values", "items", "get", "children", "named_children", "keys"}
_OF_ALL = {"modules", "named_modules", "get_submodule"}
_DEPTH = 8  # of calls within calls, and of lists within lists


class ChildUses:
    """What the code of some modules does with the modules below them.

    Attributes:
        calls: the modules that are called.
        handed: the modules that code which cannot be read may call.
        reads: pairs of a module and the name of an attribute, each with the module whose code
            reads it.

    Args:
        owners: the modules whose methods are evaluated.
        from_forward: start at forward alone, not at every method that a user may call.
    """

    def __init__(self, owners: Iterable[nn.Module], from_forward: bool = False) -> None:
        self.calls: set[nn.Module] = set()
        self.handed: set[nn.Module] = set()
        self.reads: dict[tuple[nn.Module, str], nn.Module] = {}
        self.seen: dict[object, Modules] = {}
        for owner in owners:
            for function in _methods(type(owner), from_forward):
                self.run_method(function, owner, 0)

    def run_method(self, function: FunctionType, owner: nn.Module, depth: int) -> Modules:
        """Evaluate a method that is given nothing but its owner, under whatever name."""
        code = function.__code__
        own = code.co_varnames[: min(code.co_argcount, 1)]
        return self.run(function, owner, dict.fromkeys(own, frozenset({owner})), depth)

    def run(
        self, function: FunctionType, owner: nn.Module, arguments: Mapping[str, Modules], depth: int
    ) -> Modules:
        """Evaluate ``function`` of ``owner``, and return the modules that it may return."""
        key = (function, owner, tuple(sorted(arguments.items(), key=lambda entry: entry[0])))
        if key in self.seen or depth > _DEPTH:
            return self.seen.get(key, _NONE)
        self.seen[key] = _NONE
        tree = _tree(function)
        if tree is None:
            self._skim(function, owner)
        else:
            self.seen[key] = _Evaluation(self, function, owner, arguments, depth).of(tree)
        return self.seen[key]

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
        self.calls.update(_with_entries(modules, owner))

    def hand_over(self, modules: Iterable[nn.Module], owner: nn.Module) -> None:
        """Note that ``modules`` may be called by code that cannot be read."""
        self.handed.update(_with_entries(modules, owner))

    def _skim(self, function: FunctionType, owner: nn.Module) -> None:
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


class _Evaluation:
    """One function, with the modules that its names may stand for."""

    def __init__(
        self,
        uses: ChildUses,
        function: FunctionType,
        owner: nn.Module,
        arguments: Mapping[str, Modules],
        depth: int,
    ) -> None:
        self._uses = uses
        self._function = function
        self._owner = owner
        self._depth = depth
        self._names = dict(arguments)
        self._local: dict[str, _Function] = {}
        self._active: list[_Function] = []
        self._returned = _NONE

    def of(self, tree: ast.FunctionDef | ast.AsyncFunctionDef) -> Modules:
        for _ in range(2):  # what a loop sets at its end is used at its start
            for statement in tree.body:
                self.visit(statement)
        return self._returned

    def visit(self, node: ast.AST | None) -> Modules:
        """Return the modules that an expression may be; of a statement none."""
        if node is None:
            return _NONE
        method = getattr(self, f"_{type(node).__name__.lower()}", None)
        if method is not None:
            result: Modules = method(node)
            return result
        found = [self.visit(child) for child in ast.iter_child_nodes(node)]
        is_joined = isinstance(
            node, (ast.IfExp, ast.BoolOp, ast.List, ast.Tuple, ast.Set, ast.Dict, ast.Starred)
        )
        return _NONE.union(*found) if is_joined else _NONE

    # Names and statements

    def _name(self, node: ast.Name) -> Modules:
        return self._names.get(node.id, _NONE)

    def _bind(self, target: ast.AST, modules: Modules) -> None:
        if isinstance(target, ast.Name):
            self._names[target.id] = self._names.get(target.id, _NONE) | modules
        elif isinstance(target, ast.Starred):
            self._bind(target.value, modules)
        elif isinstance(target, (ast.Tuple, ast.List)):
            for part in target.elts:  # of a container, or of pairs with an entry that is one
                self._bind(part, modules | _entries(modules))
        elif modules:  # an attribute or entry, read by whoever wants to
            self._uses.hand_over(modules, self._owner)

    def _assign(self, node: ast.Assign | ast.AnnAssign) -> Modules:
        modules = self.visit(node.value)
        for target in node.targets if isinstance(node, ast.Assign) else (node.target,):
            if isinstance(node.value, ast.Lambda) and isinstance(target, ast.Name):
                self._local[target.id] = node.value
            else:
                self._bind(target, modules)
        return _NONE

    _annassign = _assign

    def _functiondef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> Modules:
        self._local[node.name] = node
        self._call_local(node, [], {})
        return _NONE

    _asyncfunctiondef = _functiondef

    def _call_local(
        self,
        node: _Function,
        positional: list[Modules],
        named: Mapping[str | None, Modules],
    ) -> Modules:
        """Evaluate a function within this one, whose names are those of this one."""
        if node in self._active:  # it calls itself
            self._hand_over(positional, named)
            return _NONE
        arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
        known = dict(zip((a.arg for a in arguments), positional, strict=False))
        for argument in arguments:
            given = named.get(argument.arg, _NONE) | known.get(argument.arg, _NONE)
            self._names[argument.arg] = self._names.get(argument.arg, _NONE) | given
        names = {argument.arg for argument in arguments}
        beyond = {key: modules for key, modules in named.items() if key not in names}
        self._hand_over(positional[len(arguments) :], beyond)
        self.visit(node.args)
        outer, self._returned = self._returned, _NONE
        self._active.append(node)
        if isinstance(node, ast.Lambda):
            self._returned = self.visit(node.body)
        else:
            for statement in node.body:
                self.visit(statement)
        self._active.pop()
        found, self._returned = self._returned, outer
        return found

    def _arguments(self, node: ast.arguments) -> Modules:
        """Bind what a function within this one takes where a call gives it nothing."""
        last = zip((*node.posonlyargs, *node.args)[::-1], node.defaults[::-1], strict=False)
        for argument, default in (*last, *zip(node.kwonlyargs, node.kw_defaults, strict=True)):
            self._names[argument.arg] = self._names.get(argument.arg, _NONE) | self.visit(default)
        return _NONE

    def _namedexpr(self, node: ast.NamedExpr) -> Modules:
        modules = self.visit(node.value)
        self._bind(node.target, modules)
        return modules

    def _for(self, node: ast.For) -> Modules:
        self._bind(node.target, _entries(self.visit(node.iter)))
        for statement in (*node.body, *node.orelse):
            self.visit(statement)
        return _NONE

    def _comprehension(self, node: ast.comprehension) -> Modules:
        self._bind(node.target, _entries(self.visit(node.iter)))
        for condition in node.ifs:
            self.visit(condition)
        return _NONE

    def _listcomp(self, node: Any) -> Modules:
        for generator in node.generators:
            self.visit(generator)
        return self.visit(node.elt)

    _setcomp = _generatorexp = _listcomp

    def _dictcomp(self, node: ast.DictComp) -> Modules:
        for generator in node.generators:
            self.visit(generator)
        return self.visit(node.key) | self.visit(node.value)

    def _return(self, node: Any) -> Modules:
        self._returned |= self.visit(node.value)
        return _NONE

    _yield = _yieldfrom = _return

    # Expressions

    def _attribute(self, node: ast.Attribute) -> Modules:
        if node.attr in _METADATA and isinstance(node.value, ast.Attribute):
            return self.visit(node.value.value) and _NONE
        modules = self.visit(node.value)
        return _NONE.union(*(self._attribute_of(module, node.attr) for module in modules))

    def _attribute_of(self, module: nn.Module, name: str) -> Modules:
        child = module._modules.get(name)
        if child is not None:
            return frozenset({child})
        if name == "_modules":
            return frozenset(_children(module))
        held = _held(module.__dict__.get(name))
        entry = inspect.getattr_static(type(module), name, None)
        if isinstance(entry, property) and not held and not is_library(type(module)):
            function = function_of(entry)
            if function is not None:
                return self._uses.run_method(function, module, self._depth + 1)
        if not held:
            self._uses.read(module, name, self._owner)
        return held

    def _subscript(self, node: ast.Subscript) -> Modules:
        modules = self.visit(node.value)
        index = node.slice.value if isinstance(node.slice, ast.Constant) else None
        self.visit(node.slice)
        exact = [
            list(module._modules.values())[index]
            for module in modules
            if isinstance(index, int)
            and isinstance(module, (nn.Sequential, nn.ModuleList))
            and index < len(module)
        ]
        if exact and len(exact) == len(modules):
            return frozenset(m for m in exact if m is not None)
        sliced = modules if isinstance(node.slice, ast.Slice) else _NONE
        return _entries(modules) | sliced

    def _call(self, node: ast.Call) -> Modules:
        positional = [self.visit(argument) for argument in node.args]
        named = {k.arg: self.visit(k.value) for k in node.keywords}
        function = node.func
        if isinstance(function, ast.Attribute):
            if function.attr in _METADATA and isinstance(function.value, ast.Attribute):
                return self.visit(function.value.value) and _NONE
            return self._method(function, positional, named)
        if isinstance(function, ast.Name) and function.id not in self._names:
            return self._named_function(function.id, node, positional, named)
        called = self.visit(function)
        self._uses.call(called, self._owner)
        self._hand_over(positional, named)
        return _NONE

    def _method(
        self, node: ast.Attribute, positional: list[Modules], named: dict[str | None, Modules]
    ) -> Modules:
        if isinstance(node.value, ast.Call) and _is_super(node.value):
            return _NONE  # which is evaluated as a method of the owner
        modules = self.visit(node.value)
        if not modules:
            known = self._meaning(node.value)
            if isinstance(known, type) and isinstance(self._owner, known):
                return _NONE  # Base.forward(self, x)
            return self._follow(self._meaning(node), positional, named)
        found = _NONE
        for module in modules:
            child = self._child_or_held(module, node.attr)
            if child:
                self._uses.call(child, self._owner)
                self._hand_over(positional, named)
            elif node.attr in _ENTRIES:
                found |= _entries(frozenset({module}))
                if node.attr in ("children", "named_children"):
                    found |= frozenset(_children(module))
            elif node.attr in _OF_ALL:
                found |= frozenset(module.modules())
            elif node.attr in ("forward", "__call__"):
                self._uses.call([module], self._owner)
                self._hand_over(positional, named)
            elif not hasattr(nn.Module, node.attr):
                found |= self._own_method(module, node.attr, positional, named)
        return found

    def _child_or_held(self, module: nn.Module, name: str) -> Modules:
        child = module._modules.get(name)
        return _held(module.__dict__.get(name)) if child is None else frozenset({child})

    def _own_method(
        self,
        module: nn.Module,
        name: str,
        positional: list[Modules],
        named: dict[str | None, Modules],
    ) -> Modules:
        entry = inspect.getattr_static(type(module), name, None)
        function = function_of(entry)
        if function is None or isinstance(entry, property):
            self._uses.call(self._attribute_of(module, name), self._owner)
            self._hand_over(positional, named)
            return _NONE
        first = [] if isinstance(entry, staticmethod) else [frozenset({module})]
        return self._run(function, module, [*first, *positional], named)

    def _named_function(
        self,
        name: str,
        node: ast.Call,
        positional: list[Modules],
        named: dict[str | None, Modules],
    ) -> Modules:
        if name == "getattr" and len(node.args) > 1:
            attribute = node.args[1]
            if isinstance(attribute, ast.Constant) and isinstance(attribute.value, str):
                wanted = attribute.value
                return _NONE.union(*(self._attribute_of(m, wanted) for m in positional[0]))
            for module in positional[0]:
                self._uses.read(module, "*", self._owner)
            return _NONE.union(*(_children(module) for module in positional[0]))
        if name in self._local:
            return self._call_local(self._local[name], positional, named)
        if name in _HARMLESS:
            return _NONE
        if name == "cast":
            return _NONE.union(*positional)
        if name in _PASSING:
            return _NONE.union(*map(_entries, positional))
        return self._follow(self._meaning(node.func), positional, named)

    def _follow(
        self, function: Any, positional: list[Modules], named: dict[str | None, Modules]
    ) -> Modules:
        if isinstance(function, FunctionType) and not is_library(function):
            return self._run(function, self._owner, positional, named)
        self._hand_over(positional, named)
        return _NONE

    def _run(
        self,
        function: FunctionType,
        owner: nn.Module,
        positional: list[Modules],
        named: Mapping[str | None, Modules],
    ) -> Modules:
        function = inspect.unwrap(function)
        code = function.__code__
        names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        arguments = dict(zip(names, positional, strict=False))
        arguments |= {key: modules for key, modules in named.items() if key in names}
        beyond = [*positional[len(names) :], *(m for key, m in named.items() if key not in names)]
        self._uses.hand_over(_NONE.union(*beyond), owner)
        return self._uses.run(function, owner, arguments, self._depth + 1)

    def _meaning(self, node: ast.AST) -> Any:
        """Return what a name outside of the function stands for, such as ``F`` in ``F.linear``."""
        if isinstance(node, ast.Attribute):
            holder = self._meaning(node.value)
            is_known = isinstance(holder, (ModuleType, type))  # others run code to be asked
            return getattr(holder, node.attr, None) if is_known else None
        if not isinstance(node, ast.Name):
            return None
        cells = zip(
            self._function.__code__.co_freevars, self._function.__closure__ or (), strict=True
        )
        for name, cell in cells:
            if name == node.id:
                try:
                    return cell.cell_contents
                except ValueError:  # not set yet
                    return None
        return self._function.__globals__.get(node.id, getattr(builtins, node.id, None))

    def _hand_over(self, positional: list[Modules], named: Mapping[str | None, Modules]) -> None:
        self._uses.hand_over(_NONE.union(*positional, *named.values()), self._owner)


def _methods(cls: type[nn.Module], from_forward: bool) -> Iterator[FunctionType]:
    """Yield what may run in a forward: all methods but those that build; forward alone of torch."""
    yield from functions(cls.__mro__, "forward")
    for base in () if from_forward else cls.__mro__[: cls.__mro__.index(nn.Module)]:
        for name, entry in vars(base).items():
            is_building = name.startswith("__") or "init" in name or "reset" in name
            is_known = name in ("forward", "extra_repr", "_load_from_state_dict")
            function = None if is_building or is_known else function_of(entry)
            if function is not None and not is_library(base):
                yield function


_trees: WeakKeyDictionary[FunctionType, ast.FunctionDef | ast.AsyncFunctionDef | None] = (
    WeakKeyDictionary()
)


def _tree(function: FunctionType) -> ast.FunctionDef | ast.AsyncFunctionDef | None:
    """Return the source of ``function``, parsed; None where there is none."""
    if function not in _trees:
        try:
            (tree,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
        except (OSError, TypeError, SyntaxError, ValueError):
            tree = ast.Pass()
        is_function = isinstance(tree, (ast.FunctionDef, ast.AsyncFunctionDef))
        _trees[function] = tree if is_function else None  # type: ignore[assignment]
    return _trees[function]


def _with_entries(modules: Iterable[nn.Module], owner: nn.Module) -> Iterator[nn.Module]:
    """Yield ``modules``, the entries of containers among them, and the children of ``owner``."""
    for module in modules:
        yield module
        if module is owner or isinstance(module, _CONTAINERS):
            yield from _children(module)


def _children(module: nn.Module) -> list[nn.Module]:
    return [child for child in module._modules.values() if child is not None]


def _entries(modules: Modules) -> Modules:
    """Return what iterating over ``modules`` gives: of a container its entries."""
    inside = (_children(m) if isinstance(m, _CONTAINERS) else [m] for m in modules)
    return _NONE.union(*inside)


def _held(value: Any, depth: int = 0) -> Modules:
    """Return the modules in an attribute: itself, or the entries of a list, tuple or dict."""
    if isinstance(value, nn.Module):
        return frozenset({value})
    if isinstance(value, MethodType) and isinstance(value.__self__, nn.Module):
        return frozenset({value.__self__})
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)) and len(value) < 1000 and depth < _DEPTH:
        return _NONE.union(*(_held(entry, depth + 1) for entry in value))
    return _NONE


def _is_super(node: ast.Call) -> bool:
    return isinstance(node.func, ast.Name) and node.func.id == "super"
