"""Which part of a network a call belongs to, for people and for runners that have a kernel for such a part."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..graph import Graph
from .activations import activation
from .forms import AFFINE, CONVOLUTION, LINEAR
from .sizes import Sizes

aten = torch.ops.aten

POOLS = {
    *(aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default),
    *(aten.avg_pool1d.default, aten.avg_pool2d.default, aten.avg_pool3d.default),
    *(aten.adaptive_avg_pool1d.default, aten.adaptive_avg_pool2d.default, aten.adaptive_avg_pool3d.default),
    *(aten.adaptive_max_pool2d.default, aten.max_pool2d_with_indices.default),
}
# They only change how a value's numbers are counted.
VIEWS = {aten.reshape.default, aten.flatten.using_ints, aten.squeeze.dims, aten.unsqueeze.default}
GATES = {aten.sigmoid.default, aten.hardsigmoid.default, aten.hardtanh.default, aten.clamp.default}

GATE_NAMES = ("sigmoid", "hardsigmoid", "hardtanh")


def label(graph: Graph, sizes: Sizes) -> None:
    """Writes node.meta["pattern"] of every call."""
    calls = [node for node in graph.calls.nodes if node.op == "call_function"]
    for node in calls:
        node.meta["pattern"] = _by_itself(node, sizes)
    for node in calls:
        for name, part in (
            ("depthwise + pointwise", _depthwise_and_pointwise(graph, node)),
            ("pre-activation", _pre_activation(node)),
            ("squeeze-excitation", _squeeze_excitation(graph, sizes, node)),
            ("classifier", _classifier(sizes, node)),
        ):
            for member in part:
                member.meta["pattern"] = name


def _by_itself(node: fx.Node, sizes: Sizes) -> str:
    if node.target is CONVOLUTION:
        return "convolution"
    return "pool" if node.target in POOLS or is_global_pool(node, sizes) else ""


def is_global_pool(node: Any, sizes: Sizes) -> bool:
    """Whether a call gives the mean of each channel of an image."""
    if not isinstance(node, fx.Node) or not node.args:
        return False
    if node.target is aten.adaptive_avg_pool2d.default:
        return node.args[1] in ([1, 1], (1, 1))
    rank = sizes.rank(node.args[0])
    if node.target is not aten.mean.dim or rank != 4:
        return False
    dims: Any = node.args[1]
    return sorted(d % rank for d in dims) == [2, 3]


def _pre_activation(node: fx.Node) -> tuple[fx.Node, ...]:
    """What stands between a batch norm's input and the convolution after it."""
    bounds = node.target in (aten.maximum.default, aten.clamp.Tensor) and node.args[1].op == "get_attr"  # type: ignore
    norms = node.target is AFFINE and node.args[-2] is not None and node.args[3] is None
    return (node,) if (bounds or norms) and any(user.target is CONVOLUTION for user in node.users) else ()


def _depthwise_and_pointwise(graph: Graph, node: fx.Node) -> tuple[fx.Node, ...]:
    """A convolution of each channel by itself whose only user is one of all channels at one place."""
    if not _is_depthwise(graph, node) or len(node.users) > 1:
        return ()
    (user,) = node.users
    return (node, user) if _is_pointwise(graph, user) and user.args[0] is node else ()


def _is_depthwise(graph: Graph, node: fx.Node) -> bool:
    weight = graph.constant(node.args[1]) if node.target is CONVOLUTION else None
    groups: Any = node.args[7:8]
    return weight is not None and weight.shape[1] == 1 and groups[0] > 1


def _is_pointwise(graph: Graph, node: fx.Node) -> bool:
    weight = graph.constant(node.args[1]) if node.target is CONVOLUTION else None
    groups: Any = node.args[7:8]
    return weight is not None and set(weight.shape[2:]) == {1} and groups[0] == 1


def _squeeze_excitation(graph: Graph, sizes: Sizes, node: fx.Node) -> tuple[fx.Node, ...]:
    """x * gate(second(act(first(pool(x)))))."""
    if node.target is not aten.mul.Tensor:
        return ()
    for x, gate in (node.args[:2], node.args[1::-1]):
        members: list[fx.Node] = [node]
        products, gated = 0, False
        above: Any = gate
        while isinstance(above, fx.Node) and len(above.users) == 1 and not is_global_pool(above, sizes):
            product = above.target is LINEAR or _is_pointwise(graph, above)
            if not (product or above.target in VIEWS or activation(above) is not None):
                break
            gated = gated or above.target in GATES or (product and above.args[-2] in GATE_NAMES)
            products += product
            members.append(above)
            above = above.args[0]
        if products == 2 and gated and is_global_pool(above, sizes) and above.args[0] is x and len(above.users) == 1:
            return (*members, above)
    return ()


def _classifier(sizes: Sizes, node: fx.Node) -> tuple[fx.Node, ...]:
    """linear(flatten(pool(x))), by whatever views."""
    if node.target is not LINEAR:
        return ()
    members = [node]
    above: Any = node.args[0]
    while isinstance(above, fx.Node) and above.target in VIEWS:
        members.append(above)
        above = above.args[0]
    return (*members, above) if is_global_pool(above, sizes) else ()
