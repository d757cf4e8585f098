"""What of a method runs in eval mode: an ``if self.training`` in its source is decided."""

from __future__ import annotations

import ast
import inspect
import textwrap
from types import FunctionType
from weakref import WeakKeyDictionary

_LEAVING = (ast.Return, ast.Raise, ast.Break, ast.Continue)


class EvalMode(ast.NodeTransformer):
    """Takes out of a tree what ``self.training`` of False never reaches.

    Args:
        own: what the method calls ``self``.
    """

    def __init__(self, own: str) -> None:
        self._own = own

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
        decided = self._decide(node.test)
        return node if decided is None else node.body if decided else node.orelse

    def visit_IfExp(self, node: ast.IfExp) -> ast.AST:
        """Return the expression that is taken."""
        self.generic_visit(node)
        decided = self._decide(node.test)
        return node if decided is None else node.body if decided else node.orelse

    def _decide(self, test: ast.expr) -> bool | None:
        """Return what a condition is in eval mode; None where the mode does not decide it."""
        if isinstance(test, ast.Attribute) and isinstance(test.value, ast.Name):
            return False if (test.value.id, test.attr) == (self._own, "training") else None
        if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            inner = self._decide(test.operand)
            return None if inner is None else not inner
        if isinstance(test, ast.BoolOp):
            enough = isinstance(test.op, ast.Or)
            found = [self._decide(value) for value in test.values]
            return enough if enough in found else None if None in found else not enough
        return None


def _cut(statements: list[ast.stmt]) -> list[ast.stmt]:
    ends = (i for i, statement in enumerate(statements, 1) if isinstance(statement, _LEAVING))
    return statements[: next(ends, None)]


_Parsed = ast.FunctionDef | ast.AsyncFunctionDef | None
_trees: WeakKeyDictionary[FunctionType, dict[bool, _Parsed]] = WeakKeyDictionary()


def parse_function(function: FunctionType, in_any_mode: bool) -> _Parsed:
    """Return what of the source of ``function`` runs in eval mode, or all; None without source."""
    trees = _trees.setdefault(function, {})
    if in_any_mode not in trees:
        try:
            (tree,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
        except (OSError, TypeError, SyntaxError, ValueError):
            tree = ast.Pass()
        if isinstance(tree, (ast.FunctionDef, ast.AsyncFunctionDef)):
            is_method = function.__qualname__.rpartition(".")[0].rpartition(".")[2].isidentifier()
            own = next(iter(function.__code__.co_varnames), "") if is_method else "self"
            trees[in_any_mode] = tree if in_any_mode else EvalMode(own).visit(tree)
        else:
            trees[in_any_mode] = None
    return trees[in_any_mode]
