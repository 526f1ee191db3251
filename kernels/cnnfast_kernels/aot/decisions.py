"""What a kernel decides while it is compiled, read from its source: which branch it takes at each `if` whose test the
compiler can work out, and whether an unrolled loop runs never, once, or more often.

Two launches with operands of the same types for which a kernel and its helpers decide alike are the same program to
Triton's front end, with other numbers in it. What is decided by an index of an unrolled loop, or by the result of a
helper, is not looked at.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterable, Mapping
from types import CodeType
from typing import Any

import triton.language as tl
from triton.runtime import JITFunction


class Unknown:
    """A value that only the running kernel knows. It is present, so `is None` is false of it; any other question
    about it raises ValueError.
    """

    def __bool__(self) -> bool:
        raise ValueError("not known while the kernel is compiled")

    def __eq__(self, other: object) -> bool:
        raise ValueError("not known while the kernel is compiled")

    __hash__ = object.__hash__


UNKNOWN = Unknown()


@functools.cache
def body_of(function: JITFunction) -> list[ast.stmt]:
    (definition,) = function.parse().body
    assert isinstance(definition, ast.FunctionDef)
    return definition.body


@functools.cache
def code_of(expression: ast.expr) -> CodeType:
    return compile(ast.Expression(expression), "<kernel>", "eval")


# How often a helper that halves something calls itself at most; where it is not known how many parts there are, a
# reader would never come to an end.
MOST_TURNS = 10


class Reader:
    """Reads one call of a jit function, and those that it makes, whose decisions go to the same list. within: those
    whose call it is part of.
    """

    def __init__(
        self,
        function: JITFunction,
        arguments: Mapping[str, Any],
        decisions: list[Any],
        within: tuple[JITFunction, ...] = (),
    ) -> None:
        self.function, self.decisions, self.within = function, decisions, (*within, function)
        self.names = {**function.fn.__globals__, **dict.fromkeys(function.arg_names, UNKNOWN), **arguments}
        self.statements(body_of(function))

    def value(self, expression: ast.expr) -> Any:
        try:
            return eval(code_of(expression), self.names)
        except Exception:  # of Unknown, of Triton's language outside a kernel: whatever cannot be worked out now
            return UNKNOWN

    def decide(self, test: ast.expr) -> bool | None:
        """Which way a test goes, if that is known."""
        try:
            decision = bool(self.value(test))
        except ValueError:
            return None
        self.decisions.append(decision)
        return decision

    def statements(self, body: Iterable[ast.stmt]) -> None:
        for statement in body:
            match statement:
                case ast.If(test, yes, no):
                    self.expression(test)
                    decision = self.decide(test)
                    self.statements([*(yes if decision is not False else ()), *(no if decision is not True else ())])
                case ast.For(target, over, inner):
                    self.expression(over)
                    self.turns(over)
                    for name in ast.walk(statement):
                        if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store):
                            self.names[name.id] = UNKNOWN
                    self.statements(inner)
                case ast.Assign([target], value) | ast.AnnAssign(target, _, ast.expr() as value):
                    self.expression(value)
                    self.bind(target, self.value(value))
                case ast.AugAssign(target, _, value):
                    self.expression(value)
                    self.bind(target, UNKNOWN)
                case ast.Return(ast.expr() as value) | ast.Expr(value):
                    self.expression(value)

    def turns(self, over: ast.expr) -> None:
        """Notes whether an unrolled loop runs never, once or more often: a tuple that grows in it has another type."""
        if isinstance(over, ast.Call) and self.value(over.func) is tl.static_range:
            bounds = [self.value(bound) for bound in over.args]
            if not any(bound is UNKNOWN for bound in bounds):
                self.decisions.append(min(2, len(range(*map(int, bounds)))))

    def bind(self, target: ast.expr, value: Any) -> None:
        if isinstance(target, ast.Tuple):
            members = (
                value if isinstance(value, tuple) and len(value) == len(target.elts) else [UNKNOWN] * len(target.elts)
            )
            for name, member in zip(target.elts, members, strict=True):
                self.bind(name, member)
        elif isinstance(target, ast.Name):
            self.names[target.id] = value

    def expression(self, expression: ast.expr) -> None:
        """The decisions inside an expression, and those of the helpers that it calls."""
        for node in ast.walk(expression):
            if isinstance(node, ast.IfExp):
                self.decide(node.test)
            elif isinstance(node, ast.Call) and isinstance(helper := self.value(node.func), JITFunction):
                arguments = dict(zip(helper.arg_names, map(self.value, node.args), strict=False))
                arguments |= {keyword.arg: self.value(keyword.value) for keyword in node.keywords if keyword.arg}
                if sum(caller is helper for caller in self.within) < MOST_TURNS:
                    Reader(helper, arguments, self.decisions, self.within)


def decisions(kernel: JITFunction, arguments: Mapping[str, Any]) -> tuple[Any, ...]:
    """Of a kernel, given what the compiler knows of its arguments: constants, None where an operand is absent."""
    found: list[Any] = []
    Reader(kernel, arguments, found)
    return tuple(found)
