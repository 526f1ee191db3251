"""What the tests of tune measure, and a clock that is told what to show."""

from __future__ import annotations

import torch
from torch import nn

from cnnfast.measuring.timing import Times
from cnnfast.tuning import racing
from tests.support.agreement import integers

LAST = torch.channels_last


class Net(nn.Module):
    """A fused block, its like, a depthwise convolution without batch norm, and a transposed one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv3, self.bn3 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.up = nn.ConvTranspose2d(8, 4, 2, 2)

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.bn2(self.conv2(x)) + x)
        x = torch.relu(self.bn3(self.conv3(x)) + x)
        return self.up(self.depthwise(x))


def image(device, batch=2):
    return integers(batch, 4, 6, 6).to(device)


def clock(**microseconds):
    """Measures nothing: runs every step, and gives those named their times a set of operands, others ten and more, in
    their order.
    """

    def measure(steps):
        for step in steps.values():
            step()
        times = [microseconds.get(name, 10.0 + i) / 1e6 for i, name in enumerate(steps)]
        return {name: Times(racing.FEWEST_SETS * time, 0, 0, 1) for name, time in zip(steps, times, strict=True)}

    return measure


def convolution(device):
    """One plain convolution as a model."""
    return nn.Conv2d(4, 8, 3, padding=1).to(device)
