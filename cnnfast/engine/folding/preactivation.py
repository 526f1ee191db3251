"""Batch norm and ReLU before a convolution without padding: one maximum, and the rest in the convolution's weights.

    relu(scale * x + shift) = scale * max(x, -shift / scale) + shift    where scale > 0
    relu(scale * x + shift) = scale * min(x, -shift / scale) + shift    where scale < 0

as DenseNet and ResNetV2 have it. Zeros around an image would stand before the maximum, and not behind it: hence no
padding.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx

from ..graph import Graph
from .activations import activation
from .constants import exactly, fits
from .forms import arguments
from .scaling import CONVOLUTION, Scaling, norm, replace_weights, scaled_inputs, takes_scaled_input, weights
from .sizes import Sizes

aten = torch.ops.aten

# Where the ReLU gives zero, the rewritten convolution adds w * scale * (-shift / scale) and w * shift, which cancel but
# for their rounding: an error of some 2 u |w * shift|, u half of the dtype's eps, where batch norm and ReLU make none.
# It may be as large as the error that the convolution makes of an input so many times as large as it is. In float32
# that is 16 * 2 * 6e-8 = 2e-6 of the result. Half precision has no such room, and keeps the affine call.
MOST_TIMES = 16


def cut_off_before_convolutions(graph: Graph, sizes: Sizes, dtype: torch.dtype) -> None:
    if dtype.itemsize < 4:
        return
    for relu in list(graph.calls.nodes):
        if activation(relu) != ("relu", ()) or len(relu.users) > 1:
            continue
        (bn,) = relu.all_input_nodes
        (conv,) = relu.users or (None,)
        by = norm(graph, bn)
        if by is None or conv is None or len(bn.users) > 1 or sizes.size(by.source, 1) is None:
            continue
        if conv.target is not CONVOLUTION or not takes_scaled_input(graph, conv, relu) or any(conv.args[5]):
            continue
        _cut_off(graph, sizes, dtype, relu, bn, by, conv)


def _cut_off(
    graph: Graph, sizes: Sizes, dtype: torch.dtype, relu: fx.Node, bn: fx.Node, by: Scaling, conv: fx.Node
) -> None:
    channels = sizes.size(by.source, 1)
    assert channels is not None
    scale, shift = by.scale.expand(channels), by.shift.expand(channels)
    weight, bias = weights(graph, conv)
    if not _is_accurate(scale, shift, _of_inputs(conv, weight, channels), *_moments(graph, bn, scale, shift), dtype):
        return
    # A channel that is multiplied by zero is the constant relu(shift), whatever it is cut off at.
    zero = scale == 0
    edge = torch.where(zero, 0.0, -shift / torch.where(zero, 1.0, scale))
    moved = scaled_inputs(conv, weight, bias, Scaling(by.source, scale, torch.where(zero, shift.relu(), shift)))
    if not all(fits(value, dtype) for value in moved):
        return
    replace_weights(graph, dtype, conv, *moved)
    shape = (1, channels, *(1,) * ((sizes.rank(by.source) or 0) - 2))
    infinite = torch.full_like(edge, math.inf)
    with graph.calls.inserting_before(relu):
        if bool((scale >= 0).all()):
            relu.target, bounds = aten.maximum.default, (edge,)
        else:
            low, high = torch.where(scale < 0, -infinite, edge), torch.where(scale < 0, edge, infinite)
            relu.target, bounds = aten.clamp.Tensor, (low, high)
        relu.args = (by.source, *(graph.new_constant(bound.reshape(shape)) for bound in bounds))
        relu.kwargs = {}
    relu.meta["fused"] = bn.meta["fused"] + relu.meta["fused"]
    graph.calls.erase_node(bn)


def _is_accurate(
    scale: Tensor, shift: Tensor, of_inputs: Tensor, mean: Tensor, deviation: Tensor, dtype: torch.dtype
) -> bool:
    """Whether the shifts are not too large beside what the ReLU lets through, and the scales not so small that their
    products with weights, or the quotients by them, leave the dtype's range. of_inputs: the norm of the weights that
    multiply each channel. mean, deviation: of scale * x + shift.
    """
    limits = torch.finfo(dtype)
    used = scale != 0
    small = used & ((scale.abs() < limits.tiny / limits.eps) | (shift.abs() > limits.max * limits.eps * scale.abs()))
    if bool(small.any()):
        return False
    # The mean square of relu(u) for u of the normal distribution: (m^2 + d^2) Phi(m / d) + m d phi(m / d).
    z = mean / deviation.clamp(min=1e-300)
    density = (-z * z / 2).exp() / math.sqrt(2 * math.pi)
    passed = (mean**2 + deviation**2) * torch.special.ndtr(z) + mean * deviation * density
    lost = torch.where(used, shift, 0.0) * of_inputs
    return bool(lost.norm() <= MOST_TIMES * (passed.clamp(min=0).sqrt() * of_inputs).norm())


def _of_inputs(conv: fx.Node, weight: Tensor, channels: int) -> Tensor:
    """The norm of the weights of each input channel."""
    groups: Any = conv.args[7]
    return weight.unflatten(0, (groups, -1)).flatten(3).square().sum((1, 3)).sqrt().reshape(channels)


def _moments(graph: Graph, bn: fx.Node, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of what a batch norm gives, by its statistics."""
    given = arguments(bn)
    mean, var = (exactly(graph.constant(given[name])) for name in ("running_mean", "running_var"))
    return mean * scale + shift, var.sqrt() * scale.abs()
