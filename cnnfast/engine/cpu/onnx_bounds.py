"""A bound for each channel before a convolution, spelled so that onnxruntime keeps its blocked layout.

    max(x, b) = b + relu(x - b)        min(x, b) = b - relu(b - x)

The folded graph bounds what it convolves (preactivation.py). onnxruntime has no maximum of blocked images: it would
change the layout before and behind it. x - b, with ReLU, is a batch norm to it; the b in front belongs to the bias of
the convolution, and the minus to its weights.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from ..graph import Graph
from ..operators import affine, convolution

aten = torch.ops.aten


def spell_bounds(graph: Graph) -> Graph:
    """Another graph, over the same tensors but for the convolutions that it changes; nodes keep their names."""
    graph = graph.copy()
    for node in list(graph.calls.nodes):
        bound = _bound(graph, node)
        if bound is not None and all(_convolves(graph, user, node) for user in node.users):
            _spell(graph, node, *bound)
    graph.prune()
    return graph


def _bound(graph: Graph, node: fx.Node) -> tuple[Tensor, Tensor] | None:
    """The bounds of a call, one a channel in float64, and 1 for each that is a lower one, -1 for an upper one."""
    if node.target is aten.maximum.default:
        values = [graph.constant(node.args[1])]
    elif node.target is aten.clamp.Tensor and len(node.args) == 3:
        values = [graph.constant(bound) for bound in node.args[1:]]
    else:
        return None
    if any(value is None or value.dim() != 4 or value.numel() != value.shape[1] for value in values):
        return None
    low, high = (value.double().flatten() for value in (values[0], values[-1]))  # type: ignore[union-attr]
    if len(values) == 2 and not bool((low.isfinite() ^ high.isfinite()).all()):
        return None
    return torch.where(low.isfinite(), low, high), torch.where(low.isfinite(), 1.0, -1.0).double()


def _convolves(graph: Graph, user: fx.Node, node: fx.Node) -> bool:
    """Zeros around an image would be bounded before, and not afterwards."""
    return (
        user.target is convolution
        and user.args[0] is node
        and user.args[3] is not node
        and graph.constant(user.args[1]) is not None
        and (user.args[2] is None or graph.constant(user.args[2]) is not None)
        and not any(user.args[5])  # type: ignore[arg-type]
    )


def _spell(graph: Graph, node: fx.Node, bound: Tensor, sign: Tensor) -> None:
    for conv in list(node.users):
        weight, bias = (graph.constant(argument) for argument in conv.args[1:3])
        assert weight is not None
        groups: Any = conv.args[7]
        exact = weight.double()
        added = F.conv2d(bound.view(1, -1, 1, 1).expand(1, -1, *weight.shape[2:]), exact, groups=groups).flatten()
        if bias is not None:
            added = added + bias.double()
        # [groups, filters of a group, channels of a group, *taps]
        signed = exact.unflatten(0, (groups, -1)) * sign.view(groups, 1, -1, 1, 1)
        with graph.calls.inserting_before(conv):
            changed = weight if bool((sign > 0).all()) else signed.flatten(0, 1).to(weight.dtype)
            constants = graph.new_constant(changed), graph.new_constant(added.to(weight.dtype))
        conv.args = (conv.args[0], *constants, *conv.args[3:])
    with graph.calls.inserting_before(node):
        scale, shift = (graph.new_constant(each.view(-1, 1, 1).float()) for each in (sign, -bound * sign))
    node.target, node.args, node.kwargs = affine, (node.args[0], scale, shift, None, "relu", ()), {}
