"""Residual networks (https://arxiv.org/abs/1512.03385), with the stride in the 3x3 convolution, as in torchvision."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec

import torch
from torch import Tensor, nn

from ..nn import AdaptiveAvgPool2d, BasicBlock, BatchNorm2d, Bottleneck, Conv2d, MaxPool2d
from ..nn.blocks import NormLayer, conv_bn_relu
from ..nn.scripting import TraceToScript
from ..nn.stages import through
from ..spelling import keywords_explained


class ResNet(TraceToScript):
    """torchvision's ResNet: its state_dict, its initialisation (the same numbers from the same seed) and its results.

    x [N, in_channels, H, W], of any height and width, to logits [N, num_classes]. In eval every convolution is one
    kernel with its norm, activation and addition.

        model = cnnfast.models.resnet50(num_classes=10)
        logits = model(torch.randn(8, 3, 224, 224))  # [8, 10]

    block: BasicBlock or Bottleneck; layers: how many of them in each of the four stages. num_classes: of the last
    layer's outputs. in_channels: of the image.

    zero_init_residual: the last norm of each block starts at zero, so that the block starts as the identity.
    groups, width_per_group: of Bottleneck's 3x3 convolutions; 32 and 4 give ResNeXt, 1 and 128 wide ResNets.
    replace_stride_with_dilation: for each of the last three stages, whether it keeps the resolution and dilates
    instead. norm_layer: makes a norm of so many channels, by default BatchNorm2d; batch norms are fused, other norms
    are called.

    Raises ValueError unless replace_stride_with_dilation has three entries, TypeError for an unknown option, and what
    the blocks raise: BasicBlock has no groups, no other width and no dilation.
    """

    @keywords_explained
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
        norm_layer: NormLayer | None = None,
    ) -> None:
        super().__init__()
        dilate = (False, False, False) if replace_stride_with_dilation is None else tuple(replace_stride_with_dilation)
        if len(dilate) != 3:
            raise ValueError(
                "ResNet: replace_stride_with_dilation must name the last three stages, but got"
                f" replace_stride_with_dilation={replace_stride_with_dilation}"
            )
        norm = norm_layer or BatchNorm2d
        self.inplanes = 64
        self.dilation = 1
        self.groups = groups
        self.base_width = width_per_group
        self.conv1 = Conv2d(in_channels, self.inplanes, 7, stride=2, padding=3, bias=False)
        self.bn1 = norm(self.inplanes)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = MaxPool2d(3, stride=2, padding=1)
        self.layer1 = self._stage(block, 64, layers[0], 1, False, norm)
        self.layer2 = self._stage(block, 128, layers[1], 2, dilate[0], norm)
        self.layer3 = self._stage(block, 256, layers[2], 2, dilate[1], norm)
        self.layer4 = self._stage(block, 512, layers[3], 2, dilate[2], norm)
        self.avgpool = AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(512 * block.expansion, num_classes)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(m, nn.BatchNorm2d | nn.GroupNorm) and m.affine:  # of a norm_layer that starts elsewhere
                nn.init.ones_(m.weight)
                nn.init.zeros_(m.bias)
        if zero_init_residual:
            for m in self.modules():
                last: Any = m.bn2 if isinstance(m, BasicBlock) else m.bn3 if isinstance(m, Bottleneck) else None
                if last is not None and last.weight is not None:
                    nn.init.zeros_(last.weight)

    def _stage(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        planes: int,
        blocks: int,
        stride: int,
        dilate: bool,
        norm: NormLayer,
    ) -> nn.Sequential:
        first_dilation = self.dilation
        if dilate:
            self.dilation *= stride
            stride = 1
        channels = planes * block.expansion
        downsample = None
        if stride != 1 or self.inplanes != channels:
            downsample = nn.Sequential(Conv2d(self.inplanes, channels, 1, stride, bias=False), norm(channels))
        stage = [block(self.inplanes, planes, stride, downsample, self.groups, self.base_width, first_dilation, norm)]
        self.inplanes = channels
        stage += [
            block(channels, planes, 1, None, self.groups, self.base_width, self.dilation, norm)
            for _ in range(1, blocks)
        ]
        return nn.Sequential(*stage)

    def forward(self, x: Tensor) -> Tensor:
        x = conv_bn_relu(x, self.conv1, self.bn1, self.relu, pool=self.maxpool)
        x, _ = through((self.layer1, self.layer2, self.layer3, self.layer4), x)
        return self.fc(torch.flatten(self.avgpool(x), 1))


P = ParamSpec("P")


def _options(
    num_classes: int = 1000,
    in_channels: int = 3,
    *,
    zero_init_residual: bool = False,
    groups: int = 1,
    width_per_group: int = 64,
    replace_stride_with_dilation: Sequence[bool] | None = None,
    norm_layer: NormLayer | None = None,
) -> ResNet:
    """The arguments of the factories below, which hand them on to ResNet as they were given."""
    raise NotImplementedError


def _lists(options: Callable[P, ResNet]) -> Callable[[Callable[..., ResNet]], Callable[P, ResNet]]:
    """Decorates a factory: editors, type checkers and help() show the arguments of `options` as its own."""

    def listing(factory: Callable[..., ResNet]) -> Callable[P, ResNet]:
        vars(factory)["__signature__"] = inspect.signature(options)
        return keywords_explained(factory)

    return listing


@_lists(_options)
def resnet18(num_classes: int = 1000, in_channels: int = 3, **options: Any) -> ResNet:
    """18 layers of BasicBlock, which takes no groups, no other width and no dilation; options as ResNet's."""
    return ResNet(BasicBlock, (2, 2, 2, 2), num_classes, in_channels, **options)


@_lists(_options)
def resnet34(num_classes: int = 1000, in_channels: int = 3, **options: Any) -> ResNet:
    """34 layers of BasicBlock, which takes no groups, no other width and no dilation; options as ResNet's."""
    return ResNet(BasicBlock, (3, 4, 6, 3), num_classes, in_channels, **options)


@_lists(_options)
def resnet50(num_classes: int = 1000, in_channels: int = 3, **options: Any) -> ResNet:
    """50 layers of Bottleneck; options as ResNet's."""
    return ResNet(Bottleneck, (3, 4, 6, 3), num_classes, in_channels, **options)


@_lists(_options)
def resnet101(num_classes: int = 1000, in_channels: int = 3, **options: Any) -> ResNet:
    """101 layers of Bottleneck; options as ResNet's."""
    return ResNet(Bottleneck, (3, 4, 23, 3), num_classes, in_channels, **options)


@_lists(_options)
def resnet152(num_classes: int = 1000, in_channels: int = 3, **options: Any) -> ResNet:
    """152 layers of Bottleneck; options as ResNet's."""
    return ResNet(Bottleneck, (3, 8, 36, 3), num_classes, in_channels, **options)


@keywords_explained
def resnext50_32x4d(
    num_classes: int = 1000,
    in_channels: int = 3,
    *,
    zero_init_residual: bool = False,
    replace_stride_with_dilation: Sequence[bool] | None = None,
    norm_layer: NormLayer | None = None,
) -> ResNet:
    """resnet50 with 3x3 convolutions of 32 groups (https://arxiv.org/abs/1611.05431); options as ResNet's."""
    return ResNet(
        Bottleneck,
        (3, 4, 6, 3),
        num_classes,
        in_channels,
        zero_init_residual=zero_init_residual,
        groups=32,
        width_per_group=4,
        replace_stride_with_dilation=replace_stride_with_dilation,
        norm_layer=norm_layer,
    )


@keywords_explained
def wide_resnet50_2(
    num_classes: int = 1000,
    in_channels: int = 3,
    *,
    zero_init_residual: bool = False,
    groups: int = 1,
    replace_stride_with_dilation: Sequence[bool] | None = None,
    norm_layer: NormLayer | None = None,
) -> ResNet:
    """resnet50 with 3x3 convolutions of twice the width (https://arxiv.org/abs/1605.07146); options as ResNet's."""
    return ResNet(
        Bottleneck,
        (3, 4, 6, 3),
        num_classes,
        in_channels,
        zero_init_residual=zero_init_residual,
        groups=groups,
        width_per_group=128,
        replace_stride_with_dilation=replace_stride_with_dilation,
        norm_layer=norm_layer,
    )
