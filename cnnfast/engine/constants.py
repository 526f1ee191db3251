"""The constants of a graph: what follows from constants alone is computed once, and each is rounded once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate, map_arg

from .graph import Graph
from .sizes import Sizes


def exactly(value: Any) -> Any:
    """A floating tensor in float64; anything else as it is."""
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def fold_constants(graph: Graph) -> None:
    """Computes every call that depends on no input, in float64: standardised weights, rearranged tables."""
    values: dict[fx.Node, Any] = {}
    for node in list(graph.calls.nodes):
        if node.op == "get_attr":
            values[node] = exactly(graph.constant(node))
        elif node.op == "call_function" and all(source in values for source in node.all_input_nodes):
            args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
            with torch.no_grad():
                values[node] = map_aggregate(node.target(*args, **kwargs), exactly)
    for node, value in values.items():
        if node.op == "call_function" and isinstance(value, Tensor):
            if any(user not in values for user in node.users):
                with graph.calls.inserting_before(node):
                    node.replace_all_uses_with(graph.new_constant(value), lambda user: user not in values)
        elif node.op == "call_function" and isinstance(value, int | float):
            for user in [user for user in node.users if user not in values]:
                user.args, user.kwargs = map_arg(
                    (user.args, user.kwargs), lambda n, node=node, value=value: value if n is node else n
                )
    graph.prune()


def main_dtype(graph: Graph) -> torch.dtype | None:
    """What a network computes in: the dtype of its first floating input, or of its first floating constant."""
    dtypes = [*(i.dtype for i in graph.inputs), *(value.dtype for value in graph.constants.values())]
    return next((dtype for dtype in dtypes if dtype.is_floating_point), None)


def fits(value: Tensor, dtype: torch.dtype) -> bool:
    """Whether float64 numbers, as a whole, are rounded to a dtype without overflow and without underflow."""
    error = value.to(dtype).double() - value
    return bool(error.isfinite().all()) and bool(error.norm() <= torch.finfo(dtype).eps * value.norm())


def round_constants(graph: Graph, given: Graph, dtype: torch.dtype) -> None:
    """Rounds every floating constant to `dtype`, but for those that `given` has in another dtype than the rest. Where
    the model casts a value to another dtype, as attention does to float32, the constants that meet it have that dtype.
    """
    main = main_dtype(given)
    originals = {name: value.dtype for name, value in given.constants.items() if value.dtype != main}
    exact = dict(graph.constants)
    for name, value in exact.items():
        if value.is_floating_point() and name not in originals:
            graph.constants[name] = value.to(dtype)
    sizes = Sizes(graph)
    for node in list(graph.calls.nodes):
        if node.op != "call_function":
            continue
        constants = [n for n in node.all_input_nodes if n.op == "get_attr" and exact[str(n.target)].is_floating_point()]
        others = {sizes.dtype(n) for n in node.all_input_nodes if n.op != "get_attr"}
        met = {d for d in others if d is not None and d.is_floating_point}
        if len(met) == 1 and (wanted := met.pop()) != dtype:
            for constant in constants:
                if str(constant.target) not in originals:
                    with graph.calls.inserting_before(node):
                        node.replace_input_with(constant, graph.new_constant(exact[str(constant.target)].to(wanted)))
    graph.prune()
