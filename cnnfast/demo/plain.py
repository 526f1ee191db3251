"""The digits network as anybody writes it, in plain torch.nn, with the trained weights: after conversion it must read
every digit as before.

`python -m cnnfast.demo.plain FILE` reads digits in a process of its own, in which Triton interprets the kernels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import cnnfast.nn as cnn

from .digits import DigitNet


class PlainBlock(nn.Module):
    """ResNet's basic block."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = nn.Sequential()
        if in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += self.shortcut(x)
        return self.relu(y)


class PlainDigitNet(nn.Module):
    """DigitNet's layers, [N, 1, 8, 8] to ten logits [N, 10]: nothing here is cnnfast's."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.block1 = PlainBlock(width, width)
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.block2 = PlainBlock(width, 2 * width)
        self.average = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(2 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block2(self.pool(self.block1(self.stem(x))))
        return self.head(torch.flatten(self.average(x), 1))


def plain_twin(network: DigitNet) -> PlainDigitNet:
    """A PlainDigitNet with the weights and statistics of `network`, on its device, in eval mode."""
    twin = PlainDigitNet(network.head.in_features // 2).to(network.head.weight)
    blocks = ((network.block1, twin.block1), (network.block2, twin.block2))
    pairs: list[tuple[cnn.ConvBNAct, nn.Module, nn.Module]] = [(network.stem, twin.stem[0], twin.stem[1])]
    for ours, plain in blocks:
        pairs += [(ours.first, plain.conv1, plain.bn1), (ours.second, plain.conv2, plain.bn2)]
        if isinstance(ours.shortcut, cnn.ConvBNAct):
            pairs.append((ours.shortcut, plain.shortcut[0], plain.shortcut[1]))
    for trained, conv, norm in pairs:
        conv.load_state_dict(trained.conv.state_dict())
        norm.load_state_dict(trained.bn.state_dict())
    twin.head.load_state_dict(network.head.state_dict())
    return twin.eval()
