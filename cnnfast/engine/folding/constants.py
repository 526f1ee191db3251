"""The constants of a graph: what follows from constants alone is computed once, and each is rounded once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate, map_arg

from ..graph import Graph
from .sizes import Shapes


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
    """Whether float64 numbers can be rounded to a dtype: none is too large for it, and where one is too small the error
    is still below eps / 2 of the largest.
    """
    low, high = (float(bound) for bound in value.aminmax())
    largest = max(-low, high)
    return largest == 0 or torch.finfo(dtype).tiny <= largest <= torch.finfo(dtype).max


def round_constants(graph: Graph, given: Graph, dtype: torch.dtype, shapes: Shapes | None) -> None:
    """Rounds every floating constant once: to `dtype`, or to that of the value that it meets, where the network casts
    values, as to float32 before a softmax. What `given` has in another dtype than the rest stays as it is. shapes:
    some that the inputs can have; without them, all constants are rounded to `dtype`.
    """
    main = main_dtype(given)
    kept = {name for name, value in given.constants.items() if value.dtype != main}
    exact = {name: v for name, v in graph.constants.items() if v.is_floating_point() and name not in kept}
    graph.constants.update({name: value.to(dtype) for name, value in exact.items()})
    if shapes is None:
        return
    values: dict[fx.Node, Any] = {}
    inputs = iter([torch.empty(s, dtype=i.dtype, device="meta") for s, i in zip(shapes, graph.inputs, strict=True)])
    for node in list(graph.calls.nodes):
        if node.op == "placeholder":
            values[node] = next(inputs)
        elif node.op == "get_attr":
            values[node] = graph.constants[str(node.target)].to("meta")
        elif node.op == "call_function":
            constants = [n for n in node.all_input_nodes if n.op == "get_attr"]
            met = {getattr(values[n], "dtype", None) for n in node.all_input_nodes if n.op != "get_attr"}
            floating = [d for d in met if d is not None and d.is_floating_point]
            for constant in constants:
                if len(floating) == 1 and floating[0] != dtype and str(constant.target) in exact:
                    with graph.calls.inserting_before(node):
                        rounded = graph.new_constant(exact[str(constant.target)].to(floating[0]))
                    values[rounded] = graph.constants[str(rounded.target)].to("meta")
                    node.replace_input_with(constant, rounded)
            args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = node.target(*args, **kwargs)
    graph.prune()
