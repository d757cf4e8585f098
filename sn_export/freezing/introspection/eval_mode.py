"""What of a method runs in eval mode: a condition on plain attributes of ``self`` is decided.

Besides ``self.training`` these are settings, such as ``self.fused`` and ``self.bias is None``: what
no forward sets, and no change of the mode.
"""

from __future__ import annotations

import ast
import copy
import dis
import inspect
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import FunctionType
from weakref import WeakKeyDictionary

from torch import nn

from .module_uses import NONE, Modules
from .source_code import find_functions, read_code

_LEAVING = (ast.Return, ast.Raise, ast.Break, ast.Continue)
_PLAIN = {bool, int, float, str, type(None)}
_UNKNOWN = object()
_Parsed = ast.FunctionDef | ast.AsyncFunctionDef


class EvalMode(ast.NodeTransformer):
    """Takes out of a tree what is never reached.

    Args:
        own: what the method calls ``self``.
        read: returns the value of an attribute of it; `_UNKNOWN` where that may change.
    """

    def __init__(self, own: str, read: Callable[[str], object]) -> None:
        self._own = own
        self._read = read

    def generic_visit(self, node: ast.AST) -> ast.AST:
        """Take out, below ``node``, what is not reached; after a return nothing is."""
        super().generic_visit(node)
        for name in ("body", "orelse", "finalbody"):
            statements = getattr(node, name, None)
            if isinstance(statements, list):
                setattr(node, name, _cut(statements))
        return node

    def visit_If(self, node: ast.If) -> ast.AST | list[ast.stmt]:
        """Return the statements of the side that runs."""
        self.generic_visit(node)
        decided = self.decide(node.test)
        return node if decided is None else node.body if decided else node.orelse

    def visit_IfExp(self, node: ast.IfExp) -> ast.AST:
        """Return the expression that is taken."""
        self.generic_visit(node)
        decided = self.decide(node.test)
        return node if decided is None else node.body if decided else node.orelse

    def decide(self, test: ast.expr) -> bool | None:
        """Return what a condition is; None where no attribute decides it."""
        if isinstance(test, ast.Attribute):
            value = self._value(test)
            return bool(value) if type(value) in _PLAIN else None
        if isinstance(test, ast.Compare):
            return self._compare(test)
        if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            inner = self.decide(test.operand)
            return None if inner is None else not inner
        if isinstance(test, ast.BoolOp):
            enough = isinstance(test.op, ast.Or)
            found = [self.decide(value) for value in test.values]
            return enough if enough in found else None if None in found else not enough
        return None

    def _compare(self, test: ast.Compare) -> bool | None:
        value, operator, other = self._value(test.left), test.ops[0], test.comparators[0]
        if value is _UNKNOWN or len(test.ops) > 1 or not isinstance(other, ast.Constant):
            return None
        if other.value is None and isinstance(operator, (ast.Is, ast.IsNot)):
            return (value is None) == isinstance(operator, ast.Is)
        if type(value) in _PLAIN and isinstance(operator, (ast.Eq, ast.NotEq)):
            return (value == other.value) == isinstance(operator, ast.Eq)
        return None

    def _value(self, node: ast.expr) -> object:
        if not (isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)):
            return _UNKNOWN
        return self._read(node.attr) if node.value.id == self._own else _UNKNOWN


def _cut(statements: list[ast.stmt]) -> list[ast.stmt]:
    ends = (i for i, statement in enumerate(statements, 1) if isinstance(statement, _LEAVING))
    return statements[: next(ends, None)]


def _read_setting(modules: Modules, name: str) -> object:
    if name == "training":
        return False
    module = next(iter(modules)) if len(modules) == 1 else None
    if module is None or name in _collect_set(type(module)):
        return _UNKNOWN
    for held in (module.__dict__, module._parameters, module._buffers, module._modules):
        if name in held:
            return held[name]
    entry = inspect.getattr_static(type(module), name, _UNKNOWN)
    return entry if type(entry) in _PLAIN else _UNKNOWN


_set: WeakKeyDictionary[type, frozenset[str]] = WeakKeyDictionary()


def _collect_set(cls: type[nn.Module]) -> frozenset[str]:
    """Return the attributes that a forward of ``cls`` sets, or a change of its mode."""
    if cls not in _set:
        code = read_code(cls)
        starts = [] if code.is_torch else [code.forward]
        starts += [code.members[name] for name in ("train", "eval") if name in code.members]
        names = {used.name for start in starts for used in (start, *code.iter_used(start))}
        functions = [f for name in names for f in find_functions(cls.__mro__, name)]
        _set[cls] = frozenset(
            instruction.argval
            for function in functions
            for instruction in dis.get_instructions(function)
            if instruction.opname in ("STORE_ATTR", "DELETE_ATTR")
        )
    return _set[cls]


@dataclass
class _Source:
    """A parsed function, and what is left of it by how its conditions are decided."""

    tree: _Parsed
    own: str
    tests: list[ast.expr]
    left: dict[tuple[bool | None, ...], _Parsed] = field(default_factory=dict)


_sources: WeakKeyDictionary[FunctionType, _Source | None] = WeakKeyDictionary()


def parse_function(
    function: FunctionType, in_any_mode: bool, arguments: Mapping[str, Modules]
) -> _Parsed | None:
    """Return what of the source of ``function`` runs in eval mode, or all; None without source.

    Args:
        function: a method, or any function.
        in_any_mode: return the whole source.
        arguments: the modules that its arguments may be.
    """
    if function not in _sources:
        _sources[function] = _parse(function)
    source = _sources[function]
    if source is None:
        return None
    if in_any_mode:
        return source.tree
    mode = EvalMode(source.own, partial(_read_setting, arguments.get(source.own, NONE)))
    decided = tuple(map(mode.decide, source.tests))
    if decided not in source.left:
        source.left[decided] = mode.visit(copy.deepcopy(source.tree))
    return source.left[decided]


def _parse(function: FunctionType) -> _Source | None:
    try:
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    except (OSError, TypeError, SyntaxError, ValueError):
        return None
    if not isinstance(tree, (ast.FunctionDef, ast.AsyncFunctionDef)):
        return None
    is_method = function.__qualname__.rpartition(".")[0].rpartition(".")[2].isidentifier()
    own = next(iter(function.__code__.co_varnames), "") if is_method else "self"
    tests = [node.test for node in ast.walk(tree) if isinstance(node, (ast.If, ast.IfExp))]
    return _Source(tree, own, tests)
