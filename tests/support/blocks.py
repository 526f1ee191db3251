"""Small containers to convert: a residual block, and the same members under any other forward."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.support.model_zoo import randomise

CHANNELS = 4


def image(channels: int = CHANNELS, size: int = 5) -> Tensor:
    return torch.randn(2, channels, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(channels))


class Block(nn.Module):
    """A residual block with the members that the forwards below use; its own `forward` is a ResNet's."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
        self.bn = nn.BatchNorm2d(CHANNELS)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(CHANNELS, CHANNELS, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(CHANNELS)

    def forward(self, x: Tensor) -> Any:
        return self.relu(self.bn2(self.conv2(self.relu(self.bn(self.conv(x))))) + x)


def build(kind: Callable[[], nn.Module], device: torch.device | str = "cpu") -> nn.Module:
    torch.manual_seed(0)
    return randomise(kind()).double().to(device).eval()


def block(forward: Callable[..., Any], **members: Any) -> type[Block]:
    """A Block with another forward and further members, each a value or a function that makes one."""

    def init(self) -> None:
        Block.__init__(self)
        for name, member in members.items():
            setattr(self, name, member() if isinstance(member, type | functools.partial) else member)

    return type(forward.__name__, (Block,), {"forward": forward, "__init__": init})


class Net(nn.Module):
    """A stem in a Sequential, two blocks and a head. [N, 3, H, W] to [N, 3]."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, CHANNELS, 3, bias=False), nn.BatchNorm2d(CHANNELS), nn.ReLU())
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.layers = nn.Sequential(Block(), nn.Dropout2d(dropout), Block())
        self.average = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(CHANNELS, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers(self.pool(self.stem(x)))
        return self.fc(torch.flatten(self.average(x), 1))


CONVOLUTIONS = 5  # of a Net, and all of them before a norm
