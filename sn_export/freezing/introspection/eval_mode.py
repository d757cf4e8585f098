"""What of a method runs in eval mode: an ``if self.training`` in its source is decided."""

from __future__ import annotations

import ast

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
