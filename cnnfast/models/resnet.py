"""Residual networks (https://arxiv.org/abs/1512.03385), with the stride in the 3x3 convolution, as in torchvision."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..nn import AdaptiveAvgPool2d, BasicBlock, BatchNorm2d, Bottleneck, Conv2d, MaxPool2d
from ..nn.blocks import conv_bn_relu
from ..nn.scripting import TraceToScript


class ResNet(TraceToScript):
    """torchvision's ResNet: its state_dict, its initialisation (the same numbers from the same seed) and its results.

    x [N, in_channels, H, W] to [N, num_classes]. In eval every convolution is one kernel with its norm, activation and
    addition.

    block: BasicBlock or Bottleneck; layers: how many of them in each of the four stages.
    zero_init_residual: the last norm of each block starts at zero, so that the block starts as the identity.
    groups, width_per_group: of Bottleneck's 3x3 convolutions. replace_stride_with_dilation: for each of the last three
    stages, whether it keeps the resolution and dilates instead. Raises ValueError unless it has three entries.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        layers: Sequence[int],
        num_classes: int = 1000,
        in_channels: int = 3,
        *,
        zero_init_residual: bool = False,
        groups: int = 1,
        width_per_group: int = 64,
        replace_stride_with_dilation: Sequence[bool] | None = None,
    ) -> None:
        super().__init__()
        dilate = (False, False, False) if replace_stride_with_dilation is None else tuple(replace_stride_with_dilation)
        if len(dilate) != 3:
            raise ValueError(
                "ResNet: replace_stride_with_dilation must name the last three stages, but got"
                f" replace_stride_with_dilation={replace_stride_with_dilation}"
            )
        self.inplanes = 64
        self.dilation = 1
        self.groups = groups
        self.base_width = width_per_group
        self.conv1 = Conv2d(in_channels, self.inplanes, 7, stride=2, padding=3, bias=False)
        self.bn1 = BatchNorm2d(self.inplanes)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = MaxPool2d(3, stride=2, padding=1)
        self.layer1 = self._stage(block, 64, layers[0], 1, False)
        self.layer2 = self._stage(block, 128, layers[1], 2, dilate[0])
        self.layer3 = self._stage(block, 256, layers[2], 2, dilate[1])
        self.layer4 = self._stage(block, 512, layers[3], 2, dilate[2])
        self.avgpool = AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(512 * block.expansion, num_classes)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
            elif zero_init_residual and isinstance(m, BasicBlock | Bottleneck):
                last: Any = m.bn2 if isinstance(m, BasicBlock) else m.bn3
                nn.init.zeros_(last.weight)

    def _stage(
        self, block: type[BasicBlock] | type[Bottleneck], planes: int, blocks: int, stride: int, dilate: bool
    ) -> nn.Sequential:
        first_dilation = self.dilation
        if dilate:
            self.dilation *= stride
            stride = 1
        channels = planes * block.expansion
        downsample = None
        if stride != 1 or self.inplanes != channels:
            downsample = nn.Sequential(Conv2d(self.inplanes, channels, 1, stride, bias=False), BatchNorm2d(channels))
        stage = [block(self.inplanes, planes, stride, downsample, self.groups, self.base_width, first_dilation)]
        self.inplanes = channels
        stage += [
            block(channels, planes, groups=self.groups, base_width=self.base_width, dilation=self.dilation)
            for _ in range(1, blocks)
        ]
        return nn.Sequential(*stage)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(conv_bn_relu(x, self.conv1, self.bn1, self.relu))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def resnet18(num_classes: int = 1000, in_channels: int = 3, **options: Any) -> ResNet:
    """18 layers of BasicBlock; options as ResNet's."""
    return ResNet(BasicBlock, (2, 2, 2, 2), num_classes, in_channels, **options)


def resnet34(num_classes: int = 1000, in_channels: int = 3, **options: Any) -> ResNet:
    """34 layers of BasicBlock; options as ResNet's."""
    return ResNet(BasicBlock, (3, 4, 6, 3), num_classes, in_channels, **options)


def resnet50(num_classes: int = 1000, in_channels: int = 3, **options: Any) -> ResNet:
    """50 layers of Bottleneck; options as ResNet's."""
    return ResNet(Bottleneck, (3, 4, 6, 3), num_classes, in_channels, **options)


def resnet101(num_classes: int = 1000, in_channels: int = 3, **options: Any) -> ResNet:
    """101 layers of Bottleneck; options as ResNet's."""
    return ResNet(Bottleneck, (3, 4, 23, 3), num_classes, in_channels, **options)


def resnet152(num_classes: int = 1000, in_channels: int = 3, **options: Any) -> ResNet:
    """152 layers of Bottleneck; options as ResNet's."""
    return ResNet(Bottleneck, (3, 8, 36, 3), num_classes, in_channels, **options)


def resnext50_32x4d(num_classes: int = 1000, in_channels: int = 3, **options: Any) -> ResNet:
    """resnet50 with 3x3 convolutions of 32 groups (https://arxiv.org/abs/1611.05431); options as ResNet's."""
    return ResNet(Bottleneck, (3, 4, 6, 3), num_classes, in_channels, groups=32, width_per_group=4, **options)


def wide_resnet50_2(num_classes: int = 1000, in_channels: int = 3, **options: Any) -> ResNet:
    """resnet50 with 3x3 convolutions of twice the width (https://arxiv.org/abs/1605.07146); options as ResNet's."""
    return ResNet(Bottleneck, (3, 4, 6, 3), num_classes, in_channels, width_per_group=128, **options)
