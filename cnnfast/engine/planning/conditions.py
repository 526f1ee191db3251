"""What the sizes of a network's inputs must satisfy, as text that a file can hold: "size(0, 2) >= 3" says that the
first input is at least three high. Integers, + - * // %, comparisons, and, or, not, min, max, abs and size(input,
dimension), in Python's notation: nothing else is understood, and nothing is run as Python.

A file is hostile until proven otherwise: text is short, and numbers stay below 2**63, for otherwise a handful of
multiplications would make numbers of gigabytes.
"""

from __future__ import annotations

import ast
import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

LONGEST = 8000  # characters of a condition; the longest of those of torchvision's and timm's networks has below 2,000
DEEPEST = 100  # of operations within operations
LARGEST = 2**63

ARITHMETIC: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
COMPARISONS: dict[type[ast.cmpop], Callable[[int, int], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
# With how many arguments, from and to. size(input, dimension) is no function of numbers.
FUNCTIONS: dict[str, tuple[Callable[..., Any], int, int]] = {
    "min": (min, 2, 8),
    "max": (max, 2, 8),
    "abs": (abs, 1, 1),
}

Shapes = Sequence[Sequence[int]]


def violated(conditions: Sequence[str], shapes: Shapes) -> str:
    """A sentence for the first condition that inputs of these shapes do not satisfy; the empty string if they satisfy
    all. Raises ValueError for a condition that is not written as this file's first lines say.
    """
    for condition in conditions:
        if not _value(parsed(condition), shapes):
            return f"inputs of the shapes {', '.join(str(tuple(s)) for s in shapes)} do not satisfy {condition}"
    return ""


def check(condition: str, ranks: Sequence[int]) -> None:
    """Raises ValueError unless a condition is well written and asks only for sizes that inputs with these numbers of
    dimensions have.
    """
    for node in ast.walk(parsed(condition)):
        match node:
            case ast.Call(
                func=ast.Name(id="size"),
                args=[ast.Constant(value=int() as index), ast.Constant(value=int() as dimension)],
            ):
                if not (index < len(ranks) and dimension < ranks[index]):
                    raise ValueError(f"a condition asks for size({index}, {dimension}), which no input has")


def fixed_size(condition: str) -> tuple[int, int, int] | None:
    """Input, dimension and number of a condition such as "size(0, 2) == 224"; None of any other."""
    match parsed(condition):
        case ast.Compare(
            left=ast.Call(
                func=ast.Name(id="size"),
                args=[ast.Constant(value=int() as index), ast.Constant(value=int() as dimension)],
            ),
            ops=[ast.Eq()],
            comparators=[ast.Constant(value=int() as number)],
        ):
            return index, dimension, number
    return None


@functools.lru_cache(4096)
def parsed(condition: str) -> ast.expr:
    """The tree of a condition, with only what this file knows. Raises ValueError."""
    if len(condition) > LONGEST:
        raise ValueError(f"a condition on sizes has {len(condition)} characters; at most {LONGEST} are read")
    if not condition.isprintable():  # which Python's parser refuses by one error or another, by its version
        raise ValueError(f"cannot read the condition on sizes {condition[:100]!r}: it is no line of text")
    try:
        tree = ast.parse(condition, mode="eval").body
        _check_tree(tree)
    except (SyntaxError, MemoryError, RecursionError) as error:
        raise ValueError(f"cannot read the condition on sizes {condition[:100]!r}: {error}") from error
    return tree


def _check_tree(tree: ast.AST, depth: int = 0) -> None:
    if depth > DEEPEST:
        raise SyntaxError(f"operations lie within one another more than {DEEPEST} deep")
    match tree:
        case ast.Constant(value=int() as number) if not isinstance(number, bool) and abs(number) < LARGEST:
            return
        case ast.BinOp(op=op) if type(op) in ARITHMETIC:
            parts = [tree.left, tree.right]
        case ast.UnaryOp(op=ast.USub() | ast.Not()):
            parts = [tree.operand]
        case ast.BoolOp():
            parts = tree.values
        case ast.Compare(ops=ops) if all(type(op) in COMPARISONS for op in ops):
            parts = [tree.left, *tree.comparators]
        case ast.Call(func=ast.Name(id="size"), args=[ast.Constant(), ast.Constant()] as parts, keywords=[]):
            pass
        case ast.Call(func=ast.Name(id=name), args=parts, keywords=[]) if name in FUNCTIONS:
            if not FUNCTIONS[name][1] <= len(parts) <= FUNCTIONS[name][2]:
                raise SyntaxError(f"{name} does not take {len(parts)} arguments")
        case _:
            raise SyntaxError(f"{type(tree).__name__} is not understood")
    for part in parts:
        _check_tree(part, depth + 1)


def _value(tree: ast.expr, shapes: Shapes) -> int:
    def of(part: ast.expr) -> int:
        return _value(part, shapes)

    match tree:
        case ast.Constant(value=int() as number):
            return number
        case ast.UnaryOp(op=ast.Not()):
            return not of(tree.operand)
        case ast.UnaryOp():
            return -of(tree.operand)
        case ast.BoolOp():
            values = map(of, tree.values)
            return all(values) if isinstance(tree.op, ast.And) else any(values)
        case ast.Compare():
            numbers = [of(part) for part in (tree.left, *tree.comparators)]
            return all(COMPARISONS[type(op)](a, b) for op, a, b in zip(tree.ops, numbers, numbers[1:], strict=False))
        case ast.BinOp():
            try:
                number = ARITHMETIC[type(tree.op)](of(tree.left), of(tree.right))
            except ZeroDivisionError as error:
                raise ValueError("a condition on sizes divides by zero") from error
            if abs(number) >= LARGEST:
                raise ValueError(f"a condition on sizes computes {number}, beyond 2**63")
            return number
        case ast.Call(
            func=ast.Name(id="size"), args=[ast.Constant(value=int() as index), ast.Constant(value=int() as dimension)]
        ):
            try:
                return shapes[index][dimension]  # type: ignore[index]
            except IndexError as error:
                raise ValueError(f"a condition asks for size({index}, {dimension}), which no input has") from error
        case ast.Call(func=ast.Name(id=name)):
            return FUNCTIONS[name][0](*map(of, tree.args))
    raise ValueError("a condition on sizes is not understood")  # parsed() lets nothing else through


class _Translation(ast.NodeTransformer):
    """Names become what they stand for, and small powers products."""

    def __init__(self, names: Mapping[str, str]) -> None:
        self.names = names

    def visit_Name(self, node: ast.Name) -> ast.AST:
        return ast.parse(self.names[node.id], mode="eval").body if node.id in self.names else node

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        self.generic_visit(node)
        match node:
            case ast.BinOp(op=ast.Pow(), right=ast.Constant(value=int() as power)) if power in (2, 3):
                product = node.left
                for _ in range(power - 1):
                    product = ast.BinOp(product, ast.Mult(), node.left)
                return product
        return node


def translated(text: str, names: Mapping[str, str]) -> str:
    """A condition, or a number, from a Python expression over other names: names says which size each is, such as
    "size(0, 2)". Raises ValueError for what cannot be said in our notation.
    """
    try:
        condition = ast.unparse(_Translation(names).visit(ast.parse(text, mode="eval").body))
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(f"cannot read the condition on sizes {text!r}") from error
    parsed(condition)
    return condition
