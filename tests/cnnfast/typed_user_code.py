# pyright: strict
"""Code as a user of cnnfast writes it, for pyright alone: test_types.py says what pyright must find in it.

A line with a comment that names rules of pyright's must be flagged by these, and no other line by any. assert_type
holds what pyright takes an expression for. In strict mode pyright also tells where it knows only a part of a type.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import assert_type

import torch
from torch import Tensor, nn

import cnnfast
import cnnfast.functional as F
import cnnfast.nn as cnn
from cnnfast.activations import ActivationName
from cnnfast.checking import CheckReport
from cnnfast.conversion import ConversionReport
from cnnfast.engine.profiling import Profile
from cnnfast.engine.reporting import FrozenReport
from cnnfast.models import ResNet
from cnnfast.recording import Call, Trace
from cnnfast.tuning import Tuning
from cnnfast.workers import Warming


class Net(nn.Module):
    width = 8

    def features(self, x: Tensor) -> Tensor:
        return x


# --- Conversion -------------------------------------------------------------------------------------------------------


def conversion(x: Tensor, module: nn.Module, flag: bool) -> None:
    model = cnnfast.convert(Net(), memory_format=torch.channels_last)
    assert_type(model, Net)
    assert_type(model.features(x), Tensor)
    assert_type(cnnfast.convert(model, inplace=flag), Net)
    assert_type(cnnfast.revert(model), Net)
    assert_type(cnnfast.revert(model, inplace=True).width, int)
    assert_type(cnnfast.convert(module), nn.Module)
    assert_type(cnnfast.convert(cnnfast.models.resnet18()), ResNet)
    assert_type(cnnfast.report(model, x), ConversionReport)
    cnnfast.convert(x)  # flagged: reportArgumentType
    cnnfast.convert(model, memory_format="channels_last")  # flagged: reportArgumentType
    cnnfast.convert(model, memoryformat=torch.channels_last)  # flagged: reportCallIssue
    cnnfast.convert(model, True)  # flagged: reportCallIssue
    cnnfast.revert(Net)  # flagged: reportArgumentType
    cnnfast.convrt(model)  # flagged: reportAttributeAccessIssue, reportUnknownMemberType


# --- Checking, tuning, warming, tracing -------------------------------------------------------------------------------


def tools(x: Tensor, function: Callable[[Tensor], Tensor]) -> None:
    assert_type(cnnfast.check(Net(), x, dtype="bf16", backward=False), CheckReport)
    assert_type(cnnfast.check(function, x, dtype=torch.float16).ok, bool)
    assert_type(cnnfast.tune(Net(), x, train=True, budget=300), Tuning)
    assert_type(cnnfast.warm(Net(), x, train=True), Warming)
    with cnnfast.trace() as calls:
        Net()(x)
    assert_type(calls, Trace)
    assert_type([call.served_by == "kernels" for call in calls], list[bool])
    assert_type(next(iter(calls)), Call)
    with cnnfast.backend("kernels"):
        pass
    scope: AbstractContextManager[None] = cnnfast.backend("auto")
    with scope, cnnfast.backend("torch"):
        pass
    cnnfast.backend("kernel")  # flagged: reportArgumentType
    cnnfast.warm(Net(), x, training=True)  # flagged: reportCallIssue
    cnnfast.check(x)  # flagged: reportArgumentType
    cnnfast.tune(Net(), x, budget="300")  # flagged: reportArgumentType
    assert_type(cnnfast.__version__, str)


# --- Freezing ---------------------------------------------------------------------------------------------------------


def freezing(x: Tensor) -> None:
    frozen = cnnfast.freeze(Net(), x, dtype="bf16", preprocessing={"size": 224}, classes=["ant", "bee"])
    assert_type(frozen, cnnfast.Frozen)
    assert_type(cnnfast.load("net.cnnfast"), cnnfast.Frozen)
    assert_type(frozen.report(), FrozenReport)
    assert_type(frozen.profile(x), Profile)
    assert_type(frozen.classes, tuple[str, ...] | None)
    frozen.save("net.cnnfast")
    frozen.to_onnx("net.onnx")
    cnnfast.freeze(x)  # flagged: reportArgumentType
    cnnfast.freeze(Net(), x, quantize="int8")  # flagged: reportArgumentType
    cnnfast.freeze(Net(), x, batches=(1, 8))  # flagged: reportCallIssue
    frozen.dtype = torch.float32  # flagged: reportAttributeAccessIssue


# --- Functions --------------------------------------------------------------------------------------------------------


def functions(x: Tensor, w: Tensor, v: Tensor, flag: bool) -> None:
    assert_type(F.conv2d(x, w, v, stride=2, padding="same", algorithm="direct"), Tensor)
    assert_type(F.conv1d(x, w, None, [1], (2,), algorithm="im2col"), Tensor)
    assert_type(F.conv_transpose2d(x, w, output_padding=1, algorithm="torch"), Tensor)
    assert_type(F.batch_norm(x, v, v, training=True), Tensor)
    assert_type(F.conv_bn_act(x, w, v, v, residual=x, activation=None), Tensor)
    assert_type(F.conv_bn_act(x, w, v, v, activation="leaky_relu", activation_arg=0.1), Tensor)
    assert_type(F.conv_act(x, w, None, 1, "same", residual=x, activation="mish"), Tensor)
    assert_type(F.bn_act(x, v, v, activation="prelu", activation_arg=v), Tensor)
    name: ActivationName | None = "hardsigmoid" if flag else None
    assert_type(F.conv_act(x, w, activation=name, algorithm="im2col"), Tensor)
    assert_type(F.avg_pool2d(x, 2, divisor_override=3), Tensor)
    assert_type(F.adaptive_avg_pool2d(x, (1, None)), Tensor)
    assert_type(F.global_avg_pool2d(x, keepdim=False), Tensor)
    assert_type(cnnfast.functional.conv2d(x, w), Tensor)
    conv = nn.Conv2d(3, 8, 3)
    assert_type(F.conv2d(x, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups), Tensor)
    F.conv2d(x, w, algorithm="im2cols")  # flagged: reportArgumentType
    F.conv1d(x, w, algorithm="cudnn")  # flagged: reportArgumentType
    F.conv_transpose2d(x, w, algorithm="")  # flagged: reportArgumentType
    F.conv_bn_act(x, w, v, v, activation="swish")  # flagged: reportArgumentType
    F.conv_act(x, w, activation=nn.ReLU())  # flagged: reportArgumentType
    F.bn_act(x, v, v, activation="ReLU")  # flagged: reportArgumentType
    F.conv_act(x, w, algorithm="gemm")  # flagged: reportArgumentType
    F.conv_bn_act(x, w, v, v, algorithm="gemm")  # flagged: reportArgumentType
    F.conv2d(x, w, strides=2)  # flagged: reportCallIssue
    F.conv2d(x, w, None, 1, 0, 1, 1, "auto")  # flagged: reportCallIssue
    F.batch_norm(x)  # flagged: reportCallIssue
    F.avg_pool2d(x, kernel_size="2")  # flagged: reportArgumentType
    F.max_pool3d(x, 2)  # flagged: reportAttributeAccessIssue, reportUnknownMemberType


def pooling(x: Tensor, flag: bool) -> None:
    assert_type(F.max_pool2d(x, 2), Tensor)
    assert_type(F.max_pool2d(x, 2, return_indices=False), Tensor)
    assert_type(F.max_pool2d(x, 3, 2, 1, 1, True, False), Tensor)
    assert_type(F.max_pool2d(x, 2, return_indices=True), tuple[Tensor, Tensor])
    assert_type(F.max_pool2d(x, 3, 2, 1, 1, True, True), tuple[Tensor, Tensor])
    assert_type(F.max_pool2d(x, 2, return_indices=flag), Tensor | tuple[Tensor, Tensor])
    assert_type(F.max_pool2d(x, 3, 2, 1, 1, True, flag), Tensor | tuple[Tensor, Tensor])
    F.max_pool2d(x, 2, return_indices="yes")  # flagged: reportArgumentType, reportCallIssue
    F.max_pool2d(x)  # flagged: reportCallIssue


# --- Layers and models ------------------------------------------------------------------------------------------------


def layers() -> None:
    block = cnn.ConvBNAct(3, 8, 3, stride=2, activation=None, padding_mode="reflect")
    assert_type(block, cnn.ConvBNAct)
    assert_type(cnn.Conv2d(3, 8, 3), cnn.Conv2d)
    bottleneck: nn.Module = cnn.Bottleneck(64, 16)
    assert_type(cnnfast.nn.GlobalAvgPool2d(keepdim=False).keepdim, bool)
    nn.Sequential(block, bottleneck)
    cnn.ConvBNAct(3, 8, 3, activation="prelu", activation_arg=nn.Parameter(torch.ones(8)))
    cnn.ConvBNAct(3, 8, 3, activation="swish")  # flagged: reportArgumentType
    cnn.ConvBNAct(3, 8, 3, activation=nn.ReLU)  # flagged: reportArgumentType
    cnn.ConvBNAct(3, 8, 3, padding_mode="mirror")  # flagged: reportArgumentType
    cnn.ConvBNAct(3, 8, 3, act="relu")  # flagged: reportCallIssue
    cnn.ConvBNAct(3, 8)  # flagged: reportCallIssue


def models() -> None:
    assert_type(cnnfast.models.resnet18(10), ResNet)
    assert_type(cnnfast.models.resnet34(num_classes=10, in_channels=1), ResNet)
    assert_type(cnnfast.models.resnet50(norm_layer=lambda channels: nn.GroupNorm(8, channels)), ResNet)
    assert_type(cnnfast.models.resnet101(replace_stride_with_dilation=(False, True, True)), ResNet)
    assert_type(cnnfast.models.resnet152(zero_init_residual=True), ResNet)
    assert_type(cnnfast.models.resnext50_32x4d(10), ResNet)
    assert_type(cnnfast.models.wide_resnet50_2(10, groups=2), ResNet)
    cnnfast.models.resnet18(num_class=10)  # flagged: reportCallIssue
    cnnfast.models.resnext50_32x4d(groups=2)  # flagged: reportCallIssue
    cnnfast.models.resnet50(num_classes="10")  # flagged: reportArgumentType
    cnnfast.models.resnet50(pretrained=True)  # flagged: reportCallIssue
