"""Convolutions of one value that are added become one convolution, and so does a batch norm of it that is added to
them: RepVGG and MobileOne are trained with such branches.

A convolution with fewer taps is one with more of which the outer ones are zero, and a batch norm is a convolution of
each channel by itself with one tap.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.nn.functional import pad

from ...patterns import addition
from ..graph import Graph
from .forms import CONVOLUTION
from .scaling import norm, replace_weights, weights
from .sizes import Sizes


class Branch(NamedTuple):
    """A convolution of `source`. geometry: stride, padding, dilation and groups. weight, bias: float64."""

    source: Any
    geometry: tuple[list[int], list[int], list[int], int]
    weight: Tensor
    bias: Tensor


def merge_branches(graph: Graph, sizes: Sizes, dtype: torch.dtype) -> None:
    for node in list(graph.calls.nodes):
        found = addition(node)
        if found is None or not found.is_of_two_tensors or not sizes.equal(found.left, found.right):
            continue
        for wide, narrow in ((found.left, found.right), (found.right, found.left)):
            if len(wide.users) == len(narrow.users) == 1 and _merge(graph, sizes, dtype, wide, narrow):
                node.replace_all_uses_with(wide)
                wide.meta["fused"] += narrow.meta["fused"] + node.meta["fused"]
                graph.calls.erase_node(node)
                graph.calls.erase_node(narrow)
                break


def _merge(graph: Graph, sizes: Sizes, dtype: torch.dtype, wide: fx.Node, narrow: fx.Node) -> bool:
    """Whether the first call, a convolution, computes the sum of both now."""
    one = _branch(graph, wide)
    other = None if one is None else _branch(graph, narrow) or _norm_as_branch(graph, sizes, narrow, one)
    if one is None or other is None or other.source is not one.source:
        return False
    stride, padding, dilation, groups = one.geometry
    if (stride, dilation, groups) != (other.geometry[0], other.geometry[2], other.geometry[3]):
        return False
    margins = [(p - q, d) for p, q, d in zip(padding, other.geometry[1], dilation, strict=True)]
    taps = zip(one.weight.shape[2:], other.weight.shape[2:], strict=True)
    # As many taps more on either side as there is more padding: each tap meets what it met.
    if any(margin < 0 or 2 * margin != d * (a - b) for (margin, d), (a, b) in zip(margins, taps, strict=True)):
        return False
    around = [margin // d for margin, d in reversed(margins) for _ in range(2)]
    return replace_weights(graph, dtype, wide, one.weight + pad(other.weight, around), one.bias + other.bias)


def _branch(graph: Graph, node: fx.Node) -> Branch | None:
    if node.target is not CONVOLUTION:
        return None
    weight, bias = weights(graph, node)
    geometry: Any = node.args[4:8]
    return Branch(node.args[0], geometry, weight, weight.new_zeros(len(weight)) if bias is None else bias)


def _norm_as_branch(graph: Graph, sizes: Sizes, node: fx.Node, beside: Branch) -> Branch | None:
    """A batch norm as a convolution with as many groups as the one that it is added to."""
    found, channels = norm(graph, node), len(beside.bias)
    groups = beside.geometry[3]
    if found is None or sizes.size(found.source, 1) != channels or beside.weight.shape[1] * groups != channels:
        return None
    dims = beside.weight.dim() - 2
    weight = torch.zeros(channels, channels // groups, dtype=torch.float64)
    weight[torch.arange(channels), torch.arange(channels) % (channels // groups)] = found.scale.expand(channels)
    geometry = [1] * dims, [0] * dims, beside.geometry[2], groups
    return Branch(found.source, geometry, weight.reshape(*weight.shape, *[1] * dims), found.shift.expand(channels))
