"""Which modules a network's code calls, and which tensors of them it merely reads.

The weight of a layer under a pre-hook is set when the layer is called. A forward that reads it and
never calls the layer, such as ``F.linear(x, self.out.weight)``, uses what stands there. Whether it
does is seen in the source of the methods. Each is evaluated on the real modules; an expression is
those that it may be::

    layer = self.blocks[i].out            # {blocks.0.out, blocks.1.out}
    y = F.linear(x, layer.weight)         # reads (blocks.0.out, weight), (blocks.1.out, weight)
    for block in self.blocks: y = block(y)  # calls blocks.0, blocks.1

An ``if`` on ``self.training`` or a setting is decided by `eval_mode`; other branches and the order
of statements play no part. A module that code without source is given may be called or not.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

from torch import nn

from .eval_mode import parse_function
from .module_uses import DEPTH, NONE, Given, Modules, Uses, find_held, list_children, list_entries
from .source_code import is_library, iter_methods, resolve_name, unwrap_function

_Function = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
# Attributes of a tensor that say nothing of its values.
_METADATA = {"dtype", "device", "shape", "ndim", "size", "dim", "numel", "requires_grad"}
_HARMLESS = {"isinstance", "len", "hasattr", "type", "id", "print", "str", "bool", "super"}
_PASSING = {"enumerate", "zip", "list", "tuple", "dict", "reversed", "iter", "next", "sorted"}
_ENTRIES = {"values", "items", "get", "children", "named_children", "keys"}
_OF_ALL = {"modules", "named_modules", "get_submodule"}


class ChildUses(Uses):
    """What the code of some modules does with the modules below them.

    Args:
        owners: the modules whose methods are evaluated.
        from_forward: start at forward alone, not at every method that a user may call.
        in_any_mode: count what is done in train mode alone, too.
    """

    def __init__(
        self, owners: Iterable[nn.Module], from_forward: bool = False, in_any_mode: bool = False
    ) -> None:
        super().__init__()
        self._in_any_mode = in_any_mode
        self._seen: dict[object, Modules] = {}
        chains: dict[nn.Module, FunctionType] = {}  # run their entries where they are run
        for position, owner in enumerate(owners):
            for function in iter_methods(type(owner), from_forward):
                if position and function is nn.Sequential.forward and not in_any_mode:
                    chains[owner] = function
                else:
                    self.run_method(function, owner, 0)
        while running := chains.keys() & (self.calls | self.handed):
            for chain in running:
                self.run_method(chains.pop(chain), chain, 0)

    def run_method(self, function: FunctionType, owner: nn.Module, depth: int) -> Modules:
        """Evaluate a method that is given nothing but its owner, under whatever name."""
        code = function.__code__
        own = code.co_varnames[: min(code.co_argcount, 1)]
        return self.run(function, owner, dict.fromkeys(own, frozenset({owner})), depth)

    def run(
        self, function: FunctionType, owner: nn.Module, arguments: Mapping[str, Modules], depth: int
    ) -> Modules:
        """Evaluate ``function`` of ``owner``, and return the modules that it may return."""
        key = (function, owner, frozenset(arguments.items()))
        if key in self._seen or depth > DEPTH:
            return self._seen.get(key, NONE)
        self._seen[key] = NONE
        tree = parse_function(function, self._in_any_mode, arguments)
        if tree is None:
            self.skim(function, owner)
        else:
            names = dict(arguments)
            self._seen[key] = _Evaluation(self, function, owner, names, depth).evaluate(tree)
        return self._seen[key]


@dataclass(eq=False)
class _Evaluation:
    """One function, with the modules that its names may stand for, first those of its arguments.

    Its owner is the module whose method it is, or whose method called it; the depth is how many
    calls of other functions it is in. What it does with modules is noted in ``_uses``.
    """

    _uses: ChildUses
    _function: FunctionType
    _owner: nn.Module
    _names: dict[str, Modules]
    _depth: int
    _local: dict[str, _Function] = field(default_factory=dict)
    _active: list[_Function] = field(default_factory=list)
    _returned: Modules = NONE

    def evaluate(self, tree: ast.FunctionDef | ast.AsyncFunctionDef) -> Modules:
        """Evaluate the parsed function, and return the modules that it may return."""
        for _ in range(2):  # what a loop sets at its end is used at its start
            for statement in tree.body:
                self.visit(statement)
        return self._returned

    def visit(self, node: ast.AST | None) -> Modules:
        """Return the modules that an expression may be; of a statement none."""
        if node is None:
            return NONE
        method = getattr(self, f"_{type(node).__name__.lower()}", None)
        if method is not None:
            result: Modules = method(node)
            return result
        found = [self.visit(child) for child in ast.iter_child_nodes(node)]
        is_joined = isinstance(
            node, (ast.IfExp, ast.BoolOp, ast.List, ast.Tuple, ast.Set, ast.Dict, ast.Starred)
        )
        return NONE.union(*found) if is_joined else NONE

    def _name(self, node: ast.Name) -> Modules:
        return self._names.get(node.id, NONE)

    def _bind(self, target: ast.AST, modules: Modules) -> None:
        if isinstance(target, ast.Name):
            self._names[target.id] = self._names.get(target.id, NONE) | modules
        elif isinstance(target, ast.Starred):
            self._bind(target.value, modules)
        elif isinstance(target, (ast.Tuple, ast.List)):
            for part in target.elts:  # of a container, or of pairs with an entry that is one
                self._bind(part, modules | list_entries(modules))
        elif modules:  # an attribute or an entry, which any code may read
            self._uses.hand_over(modules, self._owner)

    def _assign(self, node: ast.Assign | ast.AnnAssign) -> Modules:
        modules = self.visit(node.value)
        for target in node.targets if isinstance(node, ast.Assign) else (node.target,):
            if isinstance(node.value, ast.Lambda) and isinstance(target, ast.Name):
                self._local[target.id] = node.value
            else:
                self._bind(target, modules)
        return NONE

    _annassign = _assign

    def _functiondef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> Modules:
        self._local[node.name] = node
        self._call_local(node, Given())
        return NONE

    _asyncfunctiondef = _functiondef

    def _call_local(self, node: _Function, given: Given) -> Modules:
        """Evaluate a function within this one, which shares its names."""
        if node in self._active:  # it calls itself
            self._hand_over(given)
            return NONE
        names = [a.arg for a in node.args.posonlyargs + node.args.args + node.args.kwonlyargs]
        bound, beyond = given.bind(names)
        for name in names:
            self._names[name] = self._names.get(name, NONE) | bound.get(name, NONE)
        self._uses.hand_over(beyond, self._owner)
        self.visit(node.args)
        outer, self._returned = self._returned, NONE
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
        """Bind the defaults of a function within this one."""
        last = zip((*node.posonlyargs, *node.args)[::-1], node.defaults[::-1], strict=False)
        for argument, default in (*last, *zip(node.kwonlyargs, node.kw_defaults, strict=True)):
            self._names[argument.arg] = self._names.get(argument.arg, NONE) | self.visit(default)
        return NONE

    def _namedexpr(self, node: ast.NamedExpr) -> Modules:
        modules = self.visit(node.value)
        self._bind(node.target, modules)
        return modules

    def _for(self, node: ast.For) -> Modules:
        self._bind(node.target, list_entries(self.visit(node.iter)))
        for statement in (*node.body, *node.orelse):
            self.visit(statement)
        return NONE

    def _comprehension(self, node: ast.comprehension) -> Modules:
        self._bind(node.target, list_entries(self.visit(node.iter)))
        for condition in node.ifs:
            self.visit(condition)
        return NONE

    def _listcomp(self, node: Any) -> Modules:
        for generator in node.generators:
            self.visit(generator)
        parts = (node.key, node.value) if isinstance(node, ast.DictComp) else (node.elt,)
        return NONE.union(*map(self.visit, parts))

    _setcomp = _generatorexp = _dictcomp = _listcomp

    def _return(self, node: Any) -> Modules:
        self._returned |= self.visit(node.value)
        return NONE

    _yield = _yieldfrom = _return

    def _attribute(self, node: ast.Attribute) -> Modules:
        if node.attr in _METADATA and isinstance(node.value, ast.Attribute):
            return self.visit(node.value.value) and NONE
        modules = self.visit(node.value)
        return NONE.union(*(self._evaluate_attribute(module, node.attr) for module in modules))

    def _evaluate_attribute(self, module: nn.Module, name: str) -> Modules:
        child = module._modules.get(name)
        if child is not None:
            return frozenset({child})
        if name == "_modules":
            return frozenset(list_children(module))
        held = find_held(module.__dict__.get(name))
        entry = inspect.getattr_static(type(module), name, None)
        if isinstance(entry, property) and not held and not is_library(type(module)):
            function = unwrap_function(entry)
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
        sliced = modules if isinstance(node.slice, ast.Slice) else NONE
        return list_entries(modules) | sliced

    def _call(self, node: ast.Call) -> Modules:
        given = Given(
            [self.visit(argument) for argument in node.args],
            {k.arg: self.visit(k.value) for k in node.keywords},
        )
        function = node.func
        if isinstance(function, ast.Attribute):
            if function.attr in _METADATA and isinstance(function.value, ast.Attribute):
                return self.visit(function.value.value) and NONE
            return self._call_method(function, given)
        if isinstance(function, ast.Name) and function.id not in self._names:
            return self._call_named_function(function.id, node, given)
        called = self.visit(function)
        self._uses.call(called, self._owner)
        self._hand_over(given)
        return NONE

    def _call_method(self, node: ast.Attribute, given: Given) -> Modules:
        if isinstance(node.value, ast.Call) and getattr(node.value.func, "id", None) == "super":
            return NONE  # the base's method is evaluated as one of the owner
        modules = self.visit(node.value)
        if not modules:
            known = resolve_name(node.value, self._function)
            if isinstance(known, type) and isinstance(self._owner, known):
                return NONE  # Base.forward(self, x)
            return self._follow(resolve_name(node, self._function), given)
        found = NONE
        for module in modules:
            child = module._modules.get(node.attr)
            held = find_held(module.__dict__.get(node.attr)) if child is None else {child}
            if held:
                self._uses.call(held, self._owner)
                self._hand_over(given)
            elif node.attr in _ENTRIES:
                found |= list_entries(frozenset({module}))
                if node.attr in ("children", "named_children"):
                    found |= frozenset(list_children(module))
            elif node.attr in _OF_ALL:
                found |= frozenset(module.modules())
            elif node.attr in ("forward", "__call__"):
                self._uses.call([module], self._owner)
                self._hand_over(given)
            elif not hasattr(nn.Module, node.attr):
                found |= self._call_own_method(module, node.attr, given)
        return found

    def _call_own_method(self, module: nn.Module, name: str, given: Given) -> Modules:
        entry = inspect.getattr_static(type(module), name, None)
        function = unwrap_function(entry)
        if function is None or isinstance(entry, property):
            self._uses.call(self._evaluate_attribute(module, name), self._owner)
            self._hand_over(given)
            return NONE
        first = [] if isinstance(entry, staticmethod) else [frozenset({module})]
        return self._run(function, module, given._replace(positional=[*first, *given.positional]))

    def _call_named_function(self, name: str, node: ast.Call, given: Given) -> Modules:
        if name == "getattr" and len(node.args) > 1:
            attribute = node.args[1]
            if isinstance(attribute, ast.Constant) and isinstance(attribute.value, str):
                wanted = attribute.value
                return NONE.union(
                    *(self._evaluate_attribute(m, wanted) for m in given.positional[0])
                )
            for module in given.positional[0]:
                self._uses.read(module, "*", self._owner)
            return NONE.union(*(list_children(module) for module in given.positional[0]))
        if name in self._local:
            return self._call_local(self._local[name], given)
        if name in _HARMLESS:
            return NONE
        if name == "cast":
            return NONE.union(*given.positional)
        if name in _PASSING:
            return NONE.union(*map(list_entries, given.positional))
        return self._follow(resolve_name(node.func, self._function), given)

    def _follow(self, function: Any, given: Given) -> Modules:
        if isinstance(function, FunctionType) and not is_library(function):
            return self._run(function, self._owner, given)
        self._hand_over(given)
        return NONE

    def _run(self, function: FunctionType, owner: nn.Module, given: Given) -> Modules:
        function = inspect.unwrap(function)
        code = function.__code__
        names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        arguments, beyond = given.bind(names)
        self._uses.hand_over(beyond, owner)
        return self._uses.run(function, owner, arguments, self._depth + 1)

    def _hand_over(self, given: Given) -> None:
        self._uses.hand_over(NONE.union(*given.positional, *given.named.values()), self._owner)
