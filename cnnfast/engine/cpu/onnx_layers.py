"""Convolutions and norms in ONNX."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .onnx_activations import activate
from .onnx_products import unless_zero
from .onnx_sizes import NoOnnxForm
from .onnx_writer import OnnxValue, OnnxWriter

Pair = Sequence[int]


def per_axis(numbers: Pair | int, axes: int) -> list[int]:
    """One number an axis: PyTorch takes one for all."""
    given = [numbers] if isinstance(numbers, int) else list(numbers)
    return given * axes if len(given) == 1 else given


def convolved(
    w: OnnxWriter,
    x: OnnxValue,
    weight: OnnxValue,
    bias: OnnxValue | None,
    stride: Pair | int,
    padding: Pair | int,
    dilation: Pair | int,
    groups: int,
) -> str:
    axes = len(weight.shape) - 2
    batched = len(x.shape) == axes + 2
    image = x if batched else w.call("Unsqueeze", x, w.integers([0]))
    y = w.call(
        "Conv",
        image,
        weight,
        unless_zero(bias),
        kernel_shape=weight.sizes(*range(2, axes + 2)),
        strides=per_axis(stride, axes),
        pads=per_axis(padding, axes) * 2,
        dilations=per_axis(dilation, axes),
        group=groups,
    )
    return y if batched else w.call("Squeeze", y, w.integers([0]))


def convolution(
    w: OnnxWriter,
    x: OnnxValue,
    weight: OnnxValue,
    bias: OnnxValue | None,
    residual: OnnxValue | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    activation: str | None,
    numbers: Sequence[float],
) -> str:
    """cnnfast.convolution. onnxruntime makes one step of it again."""
    y = convolved(w, x, weight, bias, stride, padding, dilation, groups)
    return activate(w, y if residual is None else w.call("Add", y, residual), activation, numbers)


def transposed_convolution(
    w: OnnxWriter,
    x: OnnxValue,
    weight: OnnxValue,
    bias: OnnxValue | None,
    stride: Pair | int,
    padding: Pair | int,
    output_padding: Pair | int,
    groups: int,
    dilation: Pair | int,
) -> str:
    axes = len(weight.shape) - 2
    if len(x.shape) != axes + 2:
        raise NoOnnxForm("a transposed convolution without a batch")
    return w.call(
        "ConvTranspose",
        x,
        weight,
        bias,
        kernel_shape=weight.sizes(*range(2, axes + 2)),
        strides=per_axis(stride, axes),
        pads=per_axis(padding, axes) * 2,
        output_padding=per_axis(output_padding, axes),
        dilations=per_axis(dilation, axes),
        group=groups,
    )


def affine(
    w: OnnxWriter,
    x: OnnxValue,
    scale: OnnxValue,
    shift: OnnxValue,
    residual: OnnxValue | None,
    activation: str | None,
    numbers: Sequence[float],
) -> str:
    """Written as a batch norm of mean 0 and variance 1: onnxruntime keeps its blocked layout over a batch norm, and
    not over a product with a tensor.
    """
    channels = scale.size(0)
    parts: list[Any]
    if scale.value is not None and shift.value is not None:
        parts = [w.tensor(constant.reshape(channels)) for constant in (scale.value, shift.value)]
    else:
        parts = [w.call("Reshape", each, w.integers([channels])) for each in (scale, shift)]
    zero, one = w.number([0.0] * channels, x.dtype), w.number([1.0] * channels, x.dtype)
    y = w.call("BatchNormalization", x, *parts, zero, one, epsilon=0.0)
    return activate(w, y if residual is None else w.call("Add", y, residual), activation, numbers)


def batch_norm(
    w: OnnxWriter,
    x: OnnxValue,
    weight: OnnxValue | None,
    bias: OnnxValue | None,
    mean: OnnxValue | None,
    var: OnnxValue | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn: bool = False,
) -> str:
    if training or mean is None or var is None:
        raise NoOnnxForm("a batch norm by the batch's own statistics")
    gamma = weight or w.number([1.0] * x.size(1), x.dtype)
    beta = bias or w.number([0.0] * x.size(1), x.dtype)
    return w.call("BatchNormalization", x, gamma, beta, mean, var, epsilon=eps)


def layer_norm(
    w: OnnxWriter,
    x: OnnxValue,
    normalized: Sequence[int],
    weight: OnnxValue | None = None,
    bias: OnnxValue | None = None,
    eps: float = 1e-5,
    cudnn: bool = False,
) -> str:
    scale = weight or w.tensor(torch.ones(list(normalized), dtype=x.dtype))
    return w.call("LayerNormalization", x, scale, bias, axis=-len(normalized), epsilon=eps)


def rms_norm(
    w: OnnxWriter, x: OnnxValue, normalized: Sequence[int], weight: OnnxValue | None = None, eps: float | None = None
) -> str:
    """x / sqrt(mean(x * x) + eps) * weight; without an eps PyTorch takes the dtype's."""
    axes = w.integers(range(-len(normalized), 0))
    squares = w.call("ReduceMean", w.call("Mul", x, x), axes, keepdims=1)
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    y = w.call("Div", x, w.call("Sqrt", w.call("Add", squares, w.number(eps, x.dtype))))
    return y if weight is None else w.call("Mul", y, weight)


def channelwise(w: OnnxWriter, y: str, weight: OnnxValue | None, bias: OnnxValue | None, rank: int) -> str:
    """y * weight + bias, with one number a channel, dimension 1."""
    shape = w.integers([-1] + [1] * (rank - 2))
    for operator, vector in (("Mul", weight), ("Add", bias)):
        if vector is not None:
            y = w.call(operator, y, w.call("Reshape", vector, shape))
    return y


def group_norm(
    w: OnnxWriter,
    x: OnnxValue,
    groups: int,
    weight: OnnxValue | None = None,
    bias: OnnxValue | None = None,
    eps: float = 1e-5,
    cudnn: bool = False,
) -> str:
    """Each group as a row of a layer norm: ONNX's own group norm takes a scale a group in this operator set."""
    row = math.prod(x.sizes(*range(1, len(x.shape)))) // groups
    rows = w.call("Reshape", x, w.integers([-1, groups, row]))
    normal = w.call("LayerNormalization", rows, w.tensor(torch.ones(row, dtype=x.dtype)), axis=-1, epsilon=eps)
    y = w.call("Reshape", normal, w.integers([-1, *x.sizes(*range(1, len(x.shape)))]))
    return channelwise(w, y, weight, bias, len(x.shape))


def instance_norm(
    w: OnnxWriter,
    x: OnnxValue,
    weight: OnnxValue | None,
    bias: OnnxValue | None,
    mean: OnnxValue | None,
    var: OnnxValue | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    cudnn: bool,
) -> str:
    if not use_input_stats:
        return batch_norm(w, x, weight, bias, mean, var, False, momentum, eps)
    return group_norm(w, x, x.size(1), weight, bias, eps)


FORMS: dict[str, Callable[..., Any]] = {
    "cnnfast.convolution": convolution,
    "cnnfast.affine": affine,
    **{f"aten.conv{axes}d.default": convolved for axes in (1, 2, 3)},
    "aten.conv_transpose1d.default": transposed_convolution,
    "aten.conv_transpose2d.input": transposed_convolution,
    "aten.conv_transpose3d.input": transposed_convolution,
    "aten.batch_norm.default": batch_norm,
    "aten.layer_norm.default": layer_norm,
    "aten.group_norm.default": group_norm,
    "aten.instance_norm.default": instance_norm,
    "aten.rms_norm.default": rms_norm,
}
