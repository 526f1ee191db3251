"""Which activation a call computes, however the model spells it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from ...patterns import addition, called_activation
from ..graph import Graph
from .forms import arguments
from .sizes import Sizes

aten = torch.ops.aten

# A name in operators.ACTIVATIONS, and its numbers.
Activation = tuple[str, tuple[float, ...]]

# Activations that no kernel computes, and for which patterns.py has no name.
OTHERS: dict[Any, str] = {aten.sigmoid.default: "sigmoid", aten.tanh.default: "tanh"}
CLAMPS: dict[Any, tuple[str, str]] = {
    aten.hardtanh.default: ("min_val", "max_val"),
    aten.clamp.default: ("min", "max"),
}
RELU6: Activation = "hardtanh", (0.0, 6.0)


def activation(node: fx.Node) -> Activation | None:
    """What a call computes of its first argument; None if that is no activation that fused operators know."""
    if node.op != "call_function":
        return None
    found = called_activation(node)
    if found is not None:
        name, slope = found
        if name == "relu6":
            return RELU6
        return name, (float(slope),) if isinstance(slope, float) else ()
    if node.target in OTHERS:
        return OTHERS[node.target], ()
    if node.target is aten.elu.default:
        given = arguments(node)
        return ("elu", (float(given["alpha"]),)) if given["scale"] == given["input_scale"] == 1 else None
    if node.target in CLAMPS:
        given = arguments(node)
        low, high = (given[name] for name in CLAMPS[node.target])
        if low == 0 and high is None:
            return "relu", ()
        if isinstance(low, int | float) and isinstance(high, int | float) and low < high:
            return "hardtanh", (float(low), float(high))
    return None


def spell_in_one_call(graph: Graph, sizes: Sizes) -> None:
    """x * sigmoid(x) becomes silu(x), x * relu6(x + 3) / 6 hardswish(x), and so on."""
    for node in list(graph.calls.nodes):
        for read in (_hardsigmoid, _product, _hardswish):
            found = read(node)
            if found is not None:
                source, target, inner = found
                with graph.calls.inserting_before(node):
                    new = graph.calls.call_function(target, (source,))
                new.meta["fused"] = tuple(name for n in (*inner, node) for name in n.meta["fused"])
                sizes.replace(node, new)
                node.replace_all_uses_with(new)
                graph.calls.erase_node(node)
                for n in reversed(inner):
                    graph.calls.erase_node(n)
                break


Spelling = tuple[fx.Node, Callable[..., Any], tuple[fx.Node, ...]]


def _product(node: fx.Node) -> Spelling | None:
    """x * sigmoid(x), x * hardsigmoid(x), x * tanh(softplus(x))."""
    if node.target is not aten.mul.Tensor:
        return None
    left, right = _factors(node)
    for x, gate in ((left, right), (right, left)):
        if not isinstance(gate, fx.Node) or len(gate.users) > 1 or not gate.args:
            continue
        if gate.args[0] is x and gate.target is aten.sigmoid.default:
            return x, aten.silu.default, (gate,)
        if gate.args[0] is x and gate.target is aten.hardsigmoid.default:
            return x, aten.hardswish.default, (gate,)
        if gate.target is aten.tanh.default:
            inner: Any = gate.args[0]
            plain = isinstance(inner, fx.Node) and inner.target is aten.softplus.default and len(inner.users) == 1
            if plain and inner.args[0] is x and arguments(inner)["beta"] == 1 and arguments(inner)["threshold"] >= 20:
                return x, aten.mish.default, (inner, gate)
    return None


def _hardsigmoid(node: fx.Node) -> Spelling | None:
    """relu6(x + 3) / 6."""
    found = _over_six(node)
    if found is None:
        return None
    inner = _relu6_of_three_more(found)
    if inner is None:
        return None
    (x,) = inner[0].all_input_nodes
    return x, aten.hardsigmoid.default, inner


def _hardswish(node: fx.Node) -> Spelling | None:
    """(x * relu6(x + 3)) / 6."""
    found = _over_six(node)
    if found is None or found.target is not aten.mul.Tensor:
        return None
    left, right = _factors(found)
    for x, gate in ((left, right), (right, left)):
        inner = _relu6_of_three_more(gate)
        if inner is not None and inner[0].args[0] is x:
            return x, aten.hardswish.default, (*inner, found)
    return None


def _factors(node: fx.Node) -> tuple[Any, Any]:
    left, right = node.args
    return left, right


def _over_six(node: fx.Node) -> fx.Node | None:
    """What a call divides by six, if nobody else uses it."""
    if node.target not in (aten.div.Tensor, aten.mul.Tensor) or len(node.args) != 2:
        return None
    source, number = _factors(node)
    if not isinstance(source, fx.Node) or len(source.users) > 1 or not isinstance(number, int | float):
        return None
    divisor = number if node.target is aten.div.Tensor else 1 / (number or math.inf)
    return source if math.isclose(divisor, 6, rel_tol=1e-7) else None


def _relu6_of_three_more(node: Any) -> tuple[fx.Node, fx.Node] | None:
    """The calls of relu6(x + 3), if nobody else uses what they give."""
    if not isinstance(node, fx.Node) or len(node.users) > 1 or activation(node) != RELU6:
        return None
    (source,) = node.all_input_nodes
    more = addition(source)
    if more is None or len(source.users) > 1 or more.options or more.right != 3:
        return None
    return (source, node) if isinstance(more.left, fx.Node) else None
