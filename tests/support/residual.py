"""Residual blocks of PyTorch's own modules, the same blocks of ours, and which blocks calls compute as one operator."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import cnnfast
import cnnfast.nn as cnn
from cnnfast.nn import residual
from tests.support.model_zoo import randomise

IMAGES = (3, 3, 6, 5)


class PlainBlock(nn.Module):
    """torchvision's BasicBlock, or its Bottleneck where `longer`, with their names of the members."""

    def __init__(self, inplanes: int, planes: int, stride: int = 1, longer: bool = False) -> None:
        super().__init__()
        width = 4 * planes if longer else planes
        sizes = [(inplanes, planes, 1), (planes, planes, 3), (planes, width, 1)]
        sizes = sizes if longer else [(inplanes, planes, 3), (planes, planes, 3)]
        for i, (before, after, kernel) in enumerate(sizes, 1):
            step = stride if i == len(sizes) - 1 else 1  # the 3x3 convolution's that is first
            self.add_module(f"conv{i}", nn.Conv2d(before, after, kernel, step, kernel // 2, bias=False))
            self.add_module(f"bn{i}", nn.BatchNorm2d(after))
        self.relu = nn.ReLU(inplace=True)
        changed = stride > 1 or inplanes != width
        self.downsample = projection(inplanes, width, stride) if changed else None
        self.longer = longer

    def forward(self, x: Tensor) -> Tensor:
        z = self.relu(self.bn1(self.conv1(x)))
        z = self.bn2(self.conv2(z))
        if self.longer:
            z = self.bn3(self.conv3(self.relu(z)))
        z += x if self.downsample is None else self.downsample(x)
        return self.relu(z)


def projection(inplanes: int, width: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inplanes, width, 1, stride, bias=False), nn.BatchNorm2d(width))


def plain_blocks(device: torch.device | str = "cpu") -> nn.Sequential:
    """A bottleneck with a projection, strided, and a basic block without: [N, 3, H, W] to [N, 8, H / 2, W / 2]."""
    torch.manual_seed(0)
    blocks = nn.Sequential(PlainBlock(3, 2, 2, longer=True), PlainBlock(8, 8))
    return randomise(blocks).double().to(device)


def of_ours(model: nn.Module) -> nn.Sequential:
    """plain_blocks of cnnfast.nn, with copies of the model's tensors."""
    blocks = nn.Sequential(cnn.Bottleneck(3, 2, 2, projection(3, 8, 2)), cnn.BasicBlock(8, 8))
    device = next(model.parameters()).device
    blocks.double().to(device).load_state_dict(model.state_dict())
    return blocks


def converted(model: nn.Module) -> nn.Module:
    """With copies of the model's tensors."""
    return cnnfast.convert(copy.deepcopy(model))


@contextmanager
def joined() -> Iterator[list[int]]:
    """A list of the blocks that calls within the context compute as one operator each: how many convolutions the branch
    of each has. They are told by who is called, as capturing the calls would keep blocks apart.
    """
    blocks: list[int] = []
    computed = residual.computed

    def seen(x: Any, layers: Any, *rest: Any) -> Any:
        blocks.append(len(layers))
        return computed(x, layers, *rest)

    with mock.patch.object(residual, "computed", seen):
        yield blocks
