"""The single layers that are measured: those of ResNet-50, and MobileNetV2's depthwise ones; and the residual blocks:
ResNet-50's and ResNet-18's. Each is there once, with how often its network has it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from ..nn import BasicBlock, BatchNorm2d, Bottleneck, Conv2d
from .job import FORWARD

CONVOLUTION = (FORWARD, "dgrad", "wgrad")


@dataclass(frozen=True)
class LayerShape:
    """A layer for an input [batch, C, size, size]. modes: what to measure of it (job.py). count: how often its network
    has it.
    """

    name: str
    module: nn.Module
    C: int
    size: int
    modes: tuple[str, ...]
    count: int = 1

    def __str__(self) -> str:
        return f"{self.name} {self.C}x{self.size}x{self.size}"


@dataclass(frozen=True)
class BlockShape:
    """A residual block of cnnfast.nn for an input [batch, C, size, size]. count: how often its network has it."""

    name: str
    module: nn.Module
    C: int
    size: int
    count: int

    def __str__(self) -> str:
        return f"{self.name}, {self.C}x{self.size}x{self.size}"


def resnet50_convolutions() -> list[tuple[int, int, int, int, int, int]]:
    """C, size, K, R, stride and count of the 23 that differ among its 53; the strides are in the 3x3 ones."""
    found = [(3, 224, 64, 7, 2, 1)]
    C, size = 64, 56
    for width, blocks, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        after = size // stride
        found += [
            (C, size, width, 1, 1, 1),
            (C, size, 4 * width, 1, stride, 1),
            (width, size, width, 3, stride, 1),
            (width, after, 4 * width, 1, 1, blocks),
            (4 * width, after, width, 1, 1, blocks - 1),
            (width, after, width, 3, 1, blocks - 1),
        ]
        C, size = 4 * width, after
    counts: dict[tuple[int, ...], int] = {}
    for *shape, count in found:
        counts[tuple(shape)] = counts.get(tuple(shape), 0) + count
    return [(*shape, count) for shape, count in counts.items()]  # pyright: ignore[reportReturnType]


# C, size, stride and count of MobileNetV2's depthwise 3x3 convolutions at 224 x 224.
DEPTHWISE = (
    (32, 112, 1, 1), (96, 112, 2, 1), (144, 56, 1, 1), (144, 56, 2, 1), (192, 28, 1, 2), (192, 28, 2, 1),
    (384, 14, 1, 4), (576, 14, 1, 2), (576, 14, 2, 1), (960, 7, 1, 3),
)  # fmt: skip
# C, size and count of ResNet-50's batch norms.
NORMS = (
    (64, 112, 1), (64, 56, 6), (256, 56, 4), (128, 56, 1), (128, 28, 7), (512, 28, 5), (256, 28, 1), (256, 14, 11),
    (1024, 14, 7), (512, 14, 1), (512, 7, 5), (2048, 7, 4),
)  # fmt: skip


def layers() -> Iterator[LayerShape]:
    """All layers. The gradient of the image is left out, for no network needs it."""
    for C, size, K, R, stride, count in resnet50_convolutions():
        module = nn.Conv2d(C, K, R, stride, R // 2, bias=False)
        modes = tuple(mode for mode in CONVOLUTION if C > 3 or mode != "dgrad")
        yield LayerShape(f"conv {R}x{R}/{stride} > {K},", module, C, size, modes, count)
    for C, size, stride, count in DEPTHWISE:
        yield LayerShape(
            f"depthwise 3x3/{stride}", nn.Conv2d(C, C, 3, stride, 1, groups=C, bias=False), C, size, CONVOLUTION, count
        )
    both = (FORWARD, "backward")
    for C, size, count in NORMS:
        yield LayerShape("batch norm", nn.BatchNorm2d(C), C, size, both, count)
    yield LayerShape("max pool 3x3/2", nn.MaxPool2d(3, 2, 1), 64, 112, both)
    yield LayerShape("average pool 2x2/2", nn.AvgPool2d(2), 256, 56, both)
    yield LayerShape("global average pool", nn.AdaptiveAvgPool2d(1), 2048, 7, both)


def blocks() -> Iterator[BlockShape]:
    """ResNet-50's eight that differ, and ResNet-18's seven."""
    for kind, name, depths in ((Bottleneck, "bottleneck", (3, 4, 6, 3)), (BasicBlock, "basic block", (2, 2, 2, 2))):
        C, size = 64, 56
        for planes, depth, stride in zip((64, 128, 256, 512), depths, (1, 2, 2, 2), strict=True):
            K, alike = planes * kind.expansion, depth
            if C != K:
                down = nn.Sequential(Conv2d(C, K, 1, stride, bias=False), BatchNorm2d(K))
                yield BlockShape(f"{name} > {K}/{stride}", kind(C, planes, stride, down), C, size, 1)
                alike -= 1
            C, size = K, size // stride
            yield BlockShape(f"{name} > {K}/1", kind(C, planes), C, size, alike)
