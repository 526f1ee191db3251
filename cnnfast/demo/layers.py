"""The residual block that both of the demo's networks have, made of cnnfast.nn's layers, and weights to start with."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

import cnnfast.nn as cnn

Network = TypeVar("Network", bound=nn.Module)


class ResidualBlock(nn.Module):
    """ResNet's basic block: two 3x3 convolutions and a shortcut, which is a 1x1 convolution where the sizes differ."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.first = cnn.ConvBNAct(in_channels, out_channels, 3)
        self.second = cnn.ConvBNAct(out_channels, out_channels, 3)
        same = in_channels == out_channels
        self.shortcut = nn.Identity() if same else cnn.ConvBNAct(in_channels, out_channels, 1, activation=None)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x), residual=self.shortcut(x))


def seeded(build: Callable[[], Network], seed: int) -> Network:
    """A network made by `build`, the same for the same seed, its convolutions with weights as ResNets start with."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = build()
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return network
