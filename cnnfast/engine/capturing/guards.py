"""The conditions on sizes that a capture was made under, from what is asked about sizes while a module is traced.

Wherever a decision depends on a size, torch.export decides as for the example. Three kinds of code ask: the module's
own Python, whose decisions are in the graph and must hold; PyTorch's rules for shapes, which every call applies again
when it runs; and PyTorch's bookkeeping of strides, on which no graph of ours depends. We note what the first kind asks.
What the other two ask are torch.export's guards, of which few matter: ResNet-50 at 32 x 32 pixels ends with images of
one pixel, and a guard about strides alone forbids that.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import sympy
import torch
from torch import fx
from torch.fx.experimental.sym_node import SymNode

from ..operators import CannotCapture
from ..planning import conditions

aten = torch.ops.aten
PYTORCH = os.path.dirname(torch.__file__) + os.sep
# What modules call, and what decides in Python as they do: F.interpolate, Tensor.split.
LIKE_A_MODULE = tuple(PYTORCH + part for part in ("nn" + os.sep, "functional.py", "_tensor.py"))
STRIDES = os.path.join(PYTORCH, "_prims_common") + os.sep

Decision = tuple[Any, bool]  # an expression of sizes that was asked about, and the answer


@contextlib.contextmanager
def decisions() -> Iterator[list[Decision]]:
    """Notes what a module's own Python asks about sizes while it is traced in this thread. A guard tells who asked
    first: where PyTorch's bookkeeping has asked whether a size is one, torch.export answers the module without another
    guard. Nor is there one where it takes the answer for granted: that a size which is free is not one.
    """
    noted: list[Decision] = []
    thread, answered = threading.get_ident(), SymNode.bool_

    def bool_(self: SymNode) -> bool:
        expression, answer = self.expr, answered(self)
        if threading.get_ident() == thread and _is_module(sys._getframe(2).f_code.co_filename):  # who wrote `if`
            noted.append((expression, answer))
        return answer

    SymNode.bool_ = bool_
    try:
        yield noted
    finally:
        SymNode.bool_ = answered


def conditions_of(placeholders: Sequence[fx.Node], calls: fx.Graph, noted: Sequence[Decision]) -> tuple[str, ...]:
    """What sizes must satisfy. Raises CannotCapture if torch.export does not tell what it has noted, or what it has
    cannot be said.
    """
    names, found = _sizes(placeholders)
    if not names:
        return tuple(found)
    environment = _environment(placeholders)
    if not hasattr(environment, "guards") or not hasattr(environment, "replacements"):
        raise CannotCapture("this version of PyTorch does not tell which sizes a captured network is right for")
    arithmetic = any(map(_is_computed_size, calls.nodes))
    expressions = [expression if answer else sympy.Not(expression) for expression, answer in noted]
    expressions += [guard.expr for guard in environment.guards if _matters(guard, arithmetic)]
    for expression in expressions:
        resolved = _resolved(expression, environment.replacements)
        if resolved is not sympy.true:
            found.append(_text(resolved, names))
    return tuple(dict.fromkeys(found))


def _sizes(placeholders: Sequence[fx.Node]) -> tuple[dict[str, str], list[str]]:
    """The inputs' sizes by the names that torch.export gave them, and conditions: sizes of one name are equal, and
    torch.export takes for granted that one of height or width is at least 2. (It does so for the batch too, which no
    capture of a network for images may depend on: judging compares with the original.)
    """
    names: dict[str, str] = {}
    found: list[str] = []
    derived: list[tuple[str, Any]] = []
    for index, node in enumerate(placeholders):
        for dim, size in enumerate(node.meta["val"].shape):
            if isinstance(size, int):
                continue
            here, expression = f"size({index}, {dim})", size.node.expr
            if not isinstance(expression, sympy.Symbol):
                derived.append((here, expression))
            elif expression.name in names:
                found.append(f"{here} == {names[expression.name]}")
            else:
                names[expression.name] = here
                if dim > 0:
                    found.append(f"{here} >= 2")
    found += [f"{here} == {_text(expression, names)}" for here, expression in derived]
    return names, found


def _environment(placeholders: Sequence[fx.Node]) -> Any:
    for node in placeholders:
        for size in node.meta["val"].shape:
            if not isinstance(size, int):
                return size.node.shape_env
    return None


def _resolved(expression: Any, replacements: dict[Any, Any]) -> Any:
    while (again := expression.xreplace(replacements)) != expression:
        expression = again
    return expression


def _is_computed_size(node: fx.Node) -> bool:
    is_size = isinstance(node.meta.get("val"), (torch.SymInt, torch.SymFloat, torch.SymBool))
    return is_size and node.op == "call_function" and node.target is not aten.sym_size.int


def _is_module(file: str) -> bool:
    """Whether Python in a file decides like a module's own."""
    return not file.startswith(PYTORCH) or file.startswith(LIKE_A_MODULE)


def _matters(guard: Any, arithmetic: bool) -> bool:
    """Whether a graph is wrong, or gives PyTorch's own errors only, for sizes that do not satisfy a guard. arithmetic:
    whether the graph computes sizes: torch.export simplifies such computations by means of guards on shapes.
    """
    place = getattr(getattr(guard, "sloc", None), "framework_loc", None)
    if str(getattr(place, "filename", "")).startswith(STRIDES) or isinstance(guard.expr, sympy.Ne):
        return False  # that two sizes differ says how memory can be viewed, and simplifies nothing
    if arithmetic:
        return True
    # An equality, or a least size, is what an operator needs, and refusing it here gives a better sentence than there.
    # Other comparisons are branches, such as that of a pool which rounds up: each call decides again when it runs.
    parts = guard.expr.args if isinstance(guard.expr, sympy.And) else (guard.expr,)
    return all(isinstance(part, sympy.Eq) or (isinstance(part, sympy.Ge) and part.rhs.is_number) for part in parts)


def _text(expression: Any, names: dict[str, str]) -> str:
    from torch.utils._sympy.printers import PythonPrinter

    try:
        return conditions.translated(PythonPrinter().doprint(expression), names)
    except ValueError as error:
        raise CannotCapture(f"the network is right only for sizes with {expression}, which cannot be kept") from error
