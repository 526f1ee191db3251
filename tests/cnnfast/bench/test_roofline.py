"""Bytes and FLOPs of every level of fusion, against networks counted by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cnnfast.bench.graph import graph_of
from cnnfast.bench.roofline import OPTIMIZER_BYTES, Kernel, levels
from cnnfast.measuring.machine import Peaks
from cnnfast.models import resnet50

F32 = 4


class Unit(nn.Module):
    """Convolution, norm, ReLU, 1x1 convolution: 4 to 8 to 6 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.last = nn.Conv2d(8, 6, 1, bias=False)

    def forward(self, x):
        return self.last(torch.relu(self.bn(self.conv(x))))


class Residual(nn.Module):
    """relu(norm(conv(x)) + x), then the same with a projection of x, and a mean over all positions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.wide, self.wide_bn = nn.Conv2d(4, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8)
        self.side, self.side_bn = nn.Conv2d(4, 8, 1, 2, bias=False), nn.BatchNorm2d(8)

    def forward(self, x):
        x = torch.relu(self.bn(self.conv(x)) + x)
        y = torch.relu(self.wide_bn(self.wide(x)) + self.side_bn(self.side(x)))
        return y.mean((2, 3))


def works(model: nn.Module, shape: tuple[int, ...], mode: str = "infer", dtype: torch.dtype = torch.float32) -> dict:
    return levels(graph_of(model, [shape], dtype, mode))


def moved(work) -> list[int]:
    return sorted(kernel.bytes for kernel in work.kernels)


def test_a_unit_in_eval():
    X, Y, Z = 2 * 4 * 64 * F32, 2 * 8 * 64 * F32, 2 * 6 * 64 * F32
    W, V, bn = 8 * 4 * 9 * F32, 6 * 8 * F32, 4 * 8 * F32  # filters of both; mean, variance, weight and bias
    found = works(Unit(), (2, 4, 8, 8))
    assert moved(found["operators"]) == sorted([X + W + Y, Y + bn + Y, Y + Y, Y + V + Z])
    assert moved(found["pointwise"]) == sorted([X + W + bn + Y, Y + Y, Y + V + Z])
    assert moved(found["conv"]) == sorted([X + W + bn + Y, Y + V + Z])
    assert moved(found["chains"]) == [X + W + bn + V + Z]
    assert {work.flops for work in found.values()} == {2 * 2 * 64 * (8 * 4 * 9 + 6 * 8)}


def test_a_residual_and_a_projection_in_eval():
    X, Y = 3 * 4 * 64 * F32, 3 * 8 * 16 * F32  # before and after the stride
    mean = 3 * 8 * F32
    W, wide, side = (4 * 4 * 9 + 16) * F32, (8 * 4 * 9 + 32) * F32, (8 * 4 + 32) * F32  # with their norms
    found = works(Residual(), (3, 4, 8, 8))
    assert moved(found["pointwise"]) == sorted(
        # convolutions with their norms (the projection skips three of four pixels), the first sum, and the second with
        # the mean
        [X + W + X, X + wide + Y, X // 4 + side + Y, X + X + X, Y + Y + mean]
    )
    assert moved(found["conv"]) == sorted([X + W + X, X + wide + Y, X // 4 + side + Y + Y, Y + mean])
    assert moved(found["chains"]) == sorted([X + W + X, X + wide + side + Y, Y + mean])


def test_a_unit_in_training():
    """Its output's gradient is given; x needs none."""
    X, Y, Z = 2 * 4 * 64 * F32, 2 * 8 * 64 * F32, 2 * 6 * 64 * F32
    W, V = 8 * 4 * 9 * F32, 6 * 8 * F32
    found = works(Unit(), (2, 4, 8, 8), "train")
    optimizer = OPTIMIZER_BYTES * (8 * 4 * 9 + 16 + 6 * 8)
    large = {  # without vectors of a channel each, which are below this
        "operators": [
            X + W + Y,
            Y,
            Y + Y,
            Y + Y,
            Y + V + Z,
            Z + V + Y,
            Z + Y + V,
            Y + Y + Y,
            Y + Y,
            Y + Y + Y,
            Y + X + W,
        ],
        # statistics, norm and ReLU; sums of the masked gradient, and its norm's gradient, with the mask from the
        # convolution's output
        "pointwise": [X + W + Y, Y, Y + Y, Y + V + Z, Z + V + Y, Z + Y + V, Y + Y, Y + Y + Y, Y + X + W],
        # with its statistics; norm and ReLU while loading; the gradient with its sums; both weights' gradients
        "conv": [X + W + Y, Y + V + Z, Z + V + Y + Y, Z + Y + V, Y + Y + X + W],
    }
    vectors = 8 * 8 * F32 * 2
    for level, expected in large.items():
        kernels = [kernel.bytes for kernel in found[level].kernels if kernel.operators != ("optimizer",)]
        kernels = sorted(size for size in kernels if size > vectors)
        assert len(kernels) == len(expected), level
        assert all(0 <= size - least <= vectors for size, least in zip(kernels, sorted(expected), strict=True)), level
        assert found[level].kernels[-1] == Kernel(("optimizer",), 0, optimizer)
    assert found["conv"].flops == 2 * 2 * 64 * (2 * 8 * 4 * 9 + 3 * 6 * 8)


@pytest.mark.parametrize(("mode", "read"), [("dgrad", "dy w"), ("wgrad", "dy x")])
def test_gradients_of_a_depthwise_convolution(mode, read):
    sizes = {"dy": 2 * 16 * 16 * F32, "x": 2 * 16 * 64 * F32, "w": 16 * 9 * F32}
    (kernel,) = works(nn.Conv2d(16, 16, 3, 2, 1, groups=16, bias=False), (2, 16, 8, 8), mode)["operators"].kernels
    assert kernel.bytes == sum(sizes[name] for name in read.split()) + sizes["x" if mode == "dgrad" else "w"]
    assert kernel.flops == 2 * 2 * 16 * 16 * 9


def test_a_pool_stores_a_byte_for_a_position():
    x, y = 2 * 3 * 64 * F32, 2 * 3 * 16
    found = works(nn.Sequential(nn.Identity(), nn.MaxPool2d(2)), (2, 3, 8, 8), "backward")
    assert moved(found["pointwise"]) == [y * F32 + x + y]
    assert moved(found["operators"]) == [y * F32 + y * 8 + x]


# Images a second that ResNet-50 cannot exceed at 790 TFLOP/s and 4.3 TB/s, bfloat16, added up kernel by kernel without
# this code.
CEILINGS = {
    ("infer", 1): {"operators": 20100, "pointwise": 29900, "conv": 40600, "chains": 53000},
    ("infer", 256): {"operators": 24300, "pointwise": 40000, "conv": 62500, "chains": 88700},
    ("train", 256): {"operators": 8200, "pointwise": 11200, "conv": 15700},
}


@pytest.mark.parametrize(("mode", "batch"), CEILINGS)
def test_resnet50(mode, batch):
    found = works(resnet50(), (batch, 3, 224, 224), mode, torch.bfloat16)
    ceilings = {level: batch / work.seconds(Peaks(790e12, 4.3e12)) for level, work in found.items()}
    assert ceilings == pytest.approx(CEILINGS[mode, batch], rel=0.015 if mode == "infer" else 0.025)


def test_a_kernel_is_bound_by_arithmetic_or_by_memory():
    assert Kernel(("conv",), 100, 10).seconds(Peaks(10, 10)) == 10
    assert Kernel(("add",), 0, 10).seconds(Peaks(10, 10)) == 1
