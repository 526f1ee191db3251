"""What the tests of explain model, and another way to count its launches: the whole step at once, each operator doing
on meta tensors what it would do on a GPU's.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import cnnfast
from cnnfast import calls, dispatch
from cnnfast.bench.counting import Replaying
from cnnfast_kernels import devices, launch

H200 = devices.Gpu("NVIDIA H200", 90)
LAST = torch.channels_last


class Net(nn.Module):
    """A fused block with a residual, its like, a depthwise convolution with a bias, a transposed one, pools, a linear
    layer.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(8, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.body = nn.ModuleList([Body(), Body()])
        self.depthwise = nn.Conv2d(16, 16, 3, groups=16)
        self.up = nn.ConvTranspose2d(16, 8, 2, 2, bias=False)
        self.pools = nn.Sequential(nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(1))
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = torch.relu(self.norm(self.stem(x)))
        for block in self.body:
            x = block(x)
        return self.head(self.pools(self.up(self.depthwise(x))).flatten(1))


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(16, 16, 1, bias=False), nn.BatchNorm2d(16)

    def forward(self, x):
        return torch.relu(self.bn(self.conv(x)) + x)


def image(batch: int = 4) -> Tensor:
    return torch.empty(batch, 8, 12, 12, dtype=torch.bfloat16, device="meta")


def counted(model: nn.Module, x: Tensor, train: bool) -> tuple[int, int]:
    """(launches, bytes of their tensors) of a step of the converted model. Both lie on meta."""
    moved: list[int] = []

    def note(kernel, grid, arguments, options):
        tensors = [getattr(argument, "base", argument) for argument in arguments]
        of = [t for t in tensors if isinstance(t, Tensor)]
        if "wgrad" in kernel.__name__ and len({t.untyped_storage()._cdata for t in of[:2]}) == 1:
            of = of[1:]  # a matrix times itself is read once
        moved.append(sum(t.numel() * t.element_size() for t in of))

    model = cnnfast.convert(model, memory_format=LAST).train(train)
    x = x.contiguous(memory_format=LAST)
    with dispatch.backend("kernels"), calls.standing_for(H200), launch.substituted(note), Replaying():
        with torch.set_grad_enabled(train):
            y = model(x)
        if train:
            y.backward(torch.ones_like(y))
    return len(moved), sum(moved)
