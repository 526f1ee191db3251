"""Convolution with batch normalisation, and the residual block, as modules over cnnfast.functional."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import cnnfast.functional as F


class ConvBN(nn.Module):
    """act(batch_norm(conv(x)) + residual): x [N, in_channels, H, W] to [N, out_channels, P, Q]; padded by half the
    kernel.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, activation: str | None = "relu"
    ):
        super().__init__()
        self.stride, self.padding, self.activation = stride, kernel_size // 2, activation
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, kernel_size, kernel_size))
        nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")
        self.bn_weight = nn.Parameter(torch.ones(out_channels))
        self.bn_bias = nn.Parameter(torch.zeros(out_channels))
        self.register_buffer("running_mean", torch.zeros(out_channels))
        self.register_buffer("running_var", torch.ones(out_channels))

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return F.conv_bn_act(
            x, self.weight, self.running_mean, self.running_var, self.bn_weight, self.bn_bias,
            residual=residual, activation=self.activation, training=self.training, stride=self.stride, padding=self.padding,
        )  # fmt: skip


class ResidualBlock(nn.Module):
    """ResNet's basic block: two 3x3 convolutions and a shortcut, which is a 1x1 convolution where the sizes differ."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1):
        super().__init__()
        self.first = ConvBN(in_channels, out_channels, 3, stride)
        self.second = ConvBN(out_channels, out_channels, 3)
        same = in_channels == out_channels and stride == 1
        self.shortcut = nn.Identity() if same else ConvBN(in_channels, out_channels, 1, stride, activation=None)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x), residual=self.shortcut(x))
