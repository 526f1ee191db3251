"""A convolution module and its input as the fused functions of cnnfast.functional take them: as a 2-D convolution,
whatever the module's padding mode, and of one row if it is a Conv1d.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cnnfast_kernels.problem import output_extent

from ..functional.arguments import Sides, autocast
from ..functional.convolution import as_rows
from .layers import SameConv2d


class Operands(NamedTuple):
    """What conv_act and conv_bn_act take. rows: the images are the one row of a 1-D convolution, and so is the result's
    third axis.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    stride: Any
    padding: Any
    dilation: Any
    groups: int
    rows: bool

    @property
    def output_size(self) -> tuple[int, ...]:
        N, _, H, W = self.x.shape
        K, _, R, S = self.weight.shape
        if self.padding == "same":
            return N, K, H, W
        if isinstance(self.padding, Sides):
            top, bottom, left, right = self.padding
        else:
            pads = 0 if self.padding == "valid" else self.padding
            top, left = bottom, right = (pads, pads) if isinstance(pads, int) else pads
        (step_h, step_w), (dil_h, dil_w) = self.stride, self.dilation
        P, Q = output_extent(H, R, step_h, top, bottom, dil_h), output_extent(W, S, step_w, left, right, dil_w)
        return N, K, P, Q

    @property
    def of_convolution(self) -> tuple[Any, ...]:
        """The arguments of functional.conv2d, and the first of conv_act's."""
        return self[:-1]

    def result(self, y: Tensor) -> Tensor:
        """What the module would return, of an image."""
        return y.squeeze(2) if self.rows else y


def operands(conv: Any, x: Tensor) -> Operands:
    """conv: a torch.nn.Conv2d of [N, C, H, W], one of ours, or a torch.nn.Conv1d of [N, C, L]. x has the dtype that the
    result will have, under autocast too. Raises what the convolution raises for another number of channels.
    """
    if x.shape[1] != conv.in_channels:  # its own error, before a norm has counted a batch
        conv(x)
    (x,) = autocast(x)
    weight, stride, padding, dilation = conv.weight, conv.stride, conv.padding, conv.dilation
    if isinstance(conv, SameConv2d):
        padding = conv.sides(x.shape[2:])
    elif conv.padding_mode != "zeros":
        x = F.pad(x, conv._reversed_padding_repeated_twice, mode=conv.padding_mode)
        padding = (0,) * len(stride)
    rows = isinstance(conv, torch.nn.Conv1d)
    if rows:
        x, weight, stride, dilation = as_rows(x), weight.unsqueeze(2), (1, *stride), (1, *dilation)
        padding = padding if isinstance(padding, str) else (0, *padding)
    return Operands(x, weight, conv.bias, stride, padding, dilation, conv.groups, rows)
