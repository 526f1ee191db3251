"""Blocks of convolution and batch norm, in which a convolution, its norm, the residual addition and the activation are
one step.

In eval that is one kernel; in training it is a convolution that leaves statistics, and one pass over its output. If
kernels do not serve, or a member has a hook or is of another class, the members are called one after the other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.utils import _pair

from ..activations import LEAKY_SLOPE, ActivationName, activate, check_activation
from ..functional.blocks import Link
from ..spelling import keywords_explained
from .fused import conv_bn_act, fusable, is_batch_norm, is_conv2d
from .layers import BatchNorm2d, Conv2d
from .pooled import conv_bn_act_pool
from .residual import layer_of, less_memory, residual_block
from .scripting import TraceToScript

Size2 = int | tuple[int, int]
PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]
NormLayer = Callable[[int], nn.Module]  # makes a norm of so many channels


class ConvBNAct(TraceToScript):
    """act(bn(conv(x)) + residual), of the children `conv` (Conv2d) and `bn` (BatchNorm2d).

        block = cnnfast.nn.ConvBNAct(3, 64, 7, stride=2, activation="silu")
        y = block(x)  # [N, 3, H, W] to [N, 64, (H + 1) // 2, (W + 1) // 2]

    x [N, in_channels, H, W] to [N, out_channels, P, Q], in the parameters' dtype: float16, bfloat16, float32 or
    float64. padding: int, pair, "valid" or "same": with stride 1 as torch.nn.Conv2d's "same", otherwise
    dilation * (kernel_size - 1) // 2 on each side, as ResNets pad.

    activation: None, "relu", "leaky_relu" (activation_arg: slope, 0.01), "relu6", "gelu", "gelu_tanh", "silu",
    "hardswish", "mish", "hardsigmoid", "prelu" (activation_arg: its slopes, a Parameter [1] or [out_channels], which
    becomes the block's). eps and momentum (None: the average of all batches) are the norm's, everything else the
    convolution's. residual: added before the activation; broadcast and promoted as PyTorch does.

    Raises what torch.nn.Conv2d and BatchNorm2d raise, ValueError for an unknown activation, and TypeError for an
    unknown keyword and for an activation_arg of another type.
    """

    @keywords_explained
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size2,
        stride: Size2 = 1,
        padding: Size2 | str = "same",
        dilation: Size2 = 1,
        groups: int = 1,
        *,
        bias: bool = False,
        activation: ActivationName | None = "relu",
        activation_arg: float | nn.Parameter | None = None,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        padding_mode: PaddingMode = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_activation("ConvBNAct", activation, activation_arg)
        if padding == "same" and _pair(stride) != (1, 1):
            height, width = (d * (k - 1) // 2 for d, k in zip(_pair(dilation), _pair(kernel_size), strict=True))
            padding = height, width
        sizes = in_channels, out_channels, kernel_size
        where = stride, padding, dilation, groups
        self.conv = Conv2d(*sizes, *where, bias, padding_mode, device, dtype)
        self.bn = BatchNorm2d(out_channels, eps, momentum, device=device, dtype=dtype)
        self.activation: ActivationName | None = activation
        self.activation_arg = activation_arg

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if fusable(x, self.conv, self.bn) and is_conv2d(self.conv) and is_batch_norm(self.bn):
            return conv_bn_act(self.conv, self.bn, x, residual, self.activation, self.activation_arg)
        y = self.bn(self.conv(x))
        y = y if residual is None else y + residual
        return activate(y, self.activation, LEAKY_SLOPE if self.activation_arg is None else self.activation_arg)

    def extra_repr(self) -> str:
        arg = self.activation_arg
        shown = f"slopes of size {list(arg.shape)}" if isinstance(arg, Tensor) else arg
        return f"activation={self.activation}" + ("" if arg is None else f", activation_arg={shown}")


def conv_bn_relu(
    x: Tensor,
    conv: nn.Module,
    bn: nn.Module,
    relu: nn.Module | None = None,
    shortcut: Callable[[], Tensor] | None = None,
    pool: nn.Module | None = None,
) -> Tensor:
    """pool(relu(bn(conv(x)) + shortcut())) of a ResNet's members, the pool not with a shortcut: in one step if
    `fusable`, else in torchvision's order.
    """
    members = (conv, bn) if relu is None else (conv, bn, relu)
    if fusable(x, *members) and is_conv2d(conv) and is_batch_norm(bn) and (relu is None or type(relu) is nn.ReLU):
        if pool is not None:
            return conv_bn_act_pool(conv, bn, x, pool, None if relu is None else "relu")  # pyright: ignore[reportArgumentType]
        # the addition in place below keeps the dtype that autocast gave to bn's output, and so does this
        residual = None if shortcut is None else shortcut().to(x.dtype)
        return conv_bn_act(conv, bn, x, residual, None if relu is None else "relu")  # pyright: ignore[reportArgumentType]
    y = bn(conv(x))
    if shortcut is not None:
        y += shortcut()
    y = y if relu is None else relu(y)
    return y if pool is None else pool(y)


class _Block(TraceToScript):
    """What torchvision's blocks share: the arguments, and a residual that `downsample` may adapt."""

    expansion: int
    relu: nn.Module

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: NormLayer | None = None,
    ) -> None:
        super().__init__()
        self._add_members(inplanes, planes, stride, groups, base_width, dilation, norm_layer or BatchNorm2d)
        self.downsample = downsample
        self.stride = stride

    def _add_members(
        self, inplanes: int, planes: int, stride: int, groups: int, base_width: int, dilation: int, norm: NormLayer
    ) -> None:
        """Makes the convolutions and norms of the branch, in torchvision's order."""
        raise NotImplementedError

    def branch(self) -> tuple[tuple[nn.Module, nn.Module], ...]:
        """Its convolutions, each with its norm."""
        raise NotImplementedError

    def linked(self, x: Tensor, below: Link | None) -> tuple[Tensor, Link | None] | None:
        """See stages.py. A subclass may have another forward."""
        own = type(self).forward in (BasicBlock.forward, Bottleneck.forward)
        return self.as_one(x, below, hands_over=True) if own else None

    def as_one(
        self, x: Tensor, below: Link | None = None, hands_over: bool = False
    ) -> tuple[Tensor, Link | None] | None:
        """The whole block as one operator, in training, if that computes what its members would."""
        down = self.downsample
        how: Any = {"less_memory": less_memory(self), "below": below, "hands_over": hands_over}
        if type(self.relu) is not nn.ReLU:
            return None
        if down is None:
            return residual_block(x, self.branch(), None, self.relu, **how)
        projection = layer_of(down)
        if projection is None:
            return None
        return residual_block(x, self.branch(), projection, self.relu, down, **how)

    def shortcut(self, x: Tensor) -> Tensor:
        """The residual: x, or `downsample` of x, in one step if that is a convolution and a norm."""
        if self.downsample is None:
            return x
        layer = layer_of(self.downsample)
        if layer is not None and fusable(x, self.downsample):
            return conv_bn_relu(x, *layer)
        return self.downsample(x)


def _conv3x3(inplanes: int, planes: int, stride: int = 1, groups: int = 1, dilation: int = 1) -> Conv2d:
    return Conv2d(inplanes, planes, 3, stride, dilation, dilation, groups, bias=False)


class BasicBlock(_Block):
    """torchvision's block of two 3x3 convolutions: its arguments, state_dict and numbers.

    x [N, inplanes, H, W] to [N, planes, P, Q] with P = ceil(H / stride). downsample: makes the residual of x; needed
    where sizes differ. norm_layer(channels): BatchNorm2d. Raises ValueError for groups or base_width,
    NotImplementedError for dilation.
    """

    expansion = 1

    def _add_members(
        self, inplanes: int, planes: int, stride: int, groups: int, base_width: int, dilation: int, norm: NormLayer
    ) -> None:
        if groups != 1 or base_width != 64:
            raise ValueError(
                f"BasicBlock: must have groups=1 and base_width=64, but got groups={groups}, base_width={base_width}"
            )
        if dilation > 1:
            raise NotImplementedError(f"BasicBlock: dilation must be 1, but got dilation={dilation}")
        self.conv1 = _conv3x3(inplanes, planes, stride)
        self.bn1 = norm(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = _conv3x3(planes, planes)
        self.bn2 = norm(planes)

    def branch(self) -> tuple[tuple[nn.Module, nn.Module], ...]:
        return (self.conv1, self.bn1), (self.conv2, self.bn2)

    def forward(self, x: Tensor) -> Tensor:
        found = self.as_one(x)
        if found is not None:
            return found[0]
        y = conv_bn_relu(x, self.conv1, self.bn1, self.relu)
        return conv_bn_relu(y, self.conv2, self.bn2, self.relu, lambda: self.shortcut(x))


class Bottleneck(_Block):
    """torchvision's block of a 1x1, a 3x3 (strided) and a 1x1 convolution: its arguments, state_dict and numbers.

    x [N, inplanes, H, W] to [N, 4 * planes, P, Q] with P = ceil(H / stride). groups and base_width give ResNeXt and
    wide ResNets. downsample: makes the residual of x; needed where sizes differ. norm_layer(channels): BatchNorm2d.
    Raises what torch.nn.Conv2d raises.
    """

    expansion = 4

    def _add_members(
        self, inplanes: int, planes: int, stride: int, groups: int, base_width: int, dilation: int, norm: NormLayer
    ) -> None:
        width = int(planes * (base_width / 64)) * groups
        self.conv1 = Conv2d(inplanes, width, 1, bias=False)
        self.bn1 = norm(width)
        self.conv2 = _conv3x3(width, width, stride, groups, dilation)
        self.bn2 = norm(width)
        self.conv3 = Conv2d(width, planes * self.expansion, 1, bias=False)
        self.bn3 = norm(planes * self.expansion)
        self.relu = nn.ReLU(inplace=True)

    def branch(self) -> tuple[tuple[nn.Module, nn.Module], ...]:
        return (self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)

    def forward(self, x: Tensor) -> Tensor:
        found = self.as_one(x)
        if found is not None:
            return found[0]
        y = conv_bn_relu(x, self.conv1, self.bn1, self.relu)
        y = conv_bn_relu(y, self.conv2, self.bn2, self.relu)
        return conv_bn_relu(y, self.conv3, self.bn3, self.relu, lambda: self.shortcut(x))
