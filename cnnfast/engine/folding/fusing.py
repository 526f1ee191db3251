"""A convolution, the addition after it and the activation after that become one call, and so do others with theirs."""

from __future__ import annotations

from typing import Any

from torch import fx

from ...patterns import addition
from ..graph import Graph
from .activations import activation
from .forms import AFFINE, CONVOLUTION, LINEAR, SUM
from .sizes import Sizes

RESIDUAL = 3  # the place of that argument, in both that have it
TAKE_RESIDUAL = (CONVOLUTION, AFFINE)
TAKE_ACTIVATION = (CONVOLUTION, AFFINE, LINEAR, SUM)  # their last two arguments are its name and its numbers


def fuse(graph: Graph, sizes: Sizes) -> None:
    """Where a call's only user is an addition or an activation, the user's work is done by the call, which moves to the
    user's place, so that all which it needs is there.
    """
    order = {node: i for i, node in enumerate(graph.calls.nodes)}
    for node in list(graph.calls.nodes):
        found = activation(node)
        if found is not None:
            _with_activation(graph, node, *found)
        else:
            _with_residual(graph, sizes, order, node)


def _with_residual(graph: Graph, sizes: Sizes, order: dict[fx.Node, int], node: fx.Node) -> None:
    found = addition(node)
    if found is None or not found.is_of_two_tensors:
        return
    pairs = [(found.left, found.right), (found.right, found.left)]
    able = [
        (call, residual)
        for call, residual in pairs
        if call.target in TAKE_RESIDUAL
        and len(call.users) == 1
        and call.args[RESIDUAL] is None
        and _activates_nothing(call)
        and residual.op != "get_attr"
        and sizes.equal(call, residual)
    ]
    if able:
        # Of two convolutions the later one adds: what the other computes is there when it runs.
        call, residual = max(able, key=lambda pair: (pair[0].target is CONVOLUTION, order[pair[0]]))
        call.update_arg(RESIDUAL, residual)
        order[call] = order[node]
        _take_over(graph, node, call)


def _with_activation(graph: Graph, node: fx.Node, name: str, numbers: tuple[float, ...]) -> None:
    call: Any = node.args[0]
    if len(call.users) > 1:
        return
    summed = addition(call)
    if summed is not None and summed.is_of_two_tensors:
        call.target, call.kwargs = SUM, {}
        call.args = (summed.left, summed.right, None, ())
    if call.target in TAKE_ACTIVATION and _activates_nothing(call):
        call.args = (*call.args[:-2], name, numbers)
        _take_over(graph, node, call)


def _activates_nothing(call: fx.Node) -> bool:
    return call.args[-2] is None


def _take_over(graph: Graph, node: fx.Node, call: fx.Node) -> None:
    """`call` gives what `node` gave, and stands in its place."""
    node.prepend(call)
    node.replace_all_uses_with(call)
    graph.calls.erase_node(node)
    call.meta["fused"] += node.meta["fused"]
