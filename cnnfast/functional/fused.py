"""Convolution, batch norm, residual and activation as one call, and what lacks the norm or the convolution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ..activations import LEAKY_SLOPE, ActivationName, activate, check_activation, check_slopes, slopes_of
from ..dispatch import why_torch
from ..recording import record_torch
from .arguments import Algorithm, Size, autocast, autocasts, batched, check_algorithm
from .convolution import conv_geometry, conv_output_size, padded_for_torch
from .entrance import captured, operation
from .normalization import batch_norm_of_torch, check_group, check_norm, normalize_batch, normalized, values_per_channel
from .operators import ops

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@operation
def conv_bn_act(
    input: Tensor,
    weight: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    bn_weight: Tensor | None = None,
    bn_bias: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: ActivationName | None = "relu",
    activation_arg: float | Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
    groups: int = 1,
    algorithm: Algorithm = "auto",
    process_group: ProcessGroup | None = None,
) -> Tensor:
    """act(batch_norm(conv2d(input, weight, bias)) + residual).

        y = conv_bn_act(x, conv.weight, bn.running_mean, bn.running_var, bn.weight, bn.bias, residual=x, padding=1)

    In eval one kernel. In training the convolution leaves the statistics of its output, running_mean and running_var
    are updated in place if given, and a second kernel normalises, adds and activates. For a 1x1 convolution to more
    channels in half precision, where our kernels serve, it is one kernel in training too: the Gram matrix of the input
    tells the statistics before (ops/gram.py), and the convolution's own result is never stored.

    Shapes and dtypes as conv2d; running_mean, running_var, bn_weight, bn_bias [K], of input's dtype or float32;
    residual of the output's size and dtype. activation: None, "relu", "leaky_relu" (activation_arg: slope, 0.01),
    "relu6", "gelu", "gelu_tanh", "silu", "hardswish", "mish", "hardsigmoid", "prelu" (activation_arg: a tensor of the
    output's dtype, [1] or [K]; where a gradient is wanted PyTorch's prelu follows the kernels). process_group: as
    batch_norm has it. Raises as conv2d and batch_norm, ValueError for an unknown activation or a residual or slopes of
    another size or dtype, TypeError for an activation_arg of another type.

    The backward pass of gelu, gelu_tanh, silu, hardswish, mish and hardsigmoid needs what these were applied to. It
    computes that again from residual and bn_bias, and keeps them: to change these in place before backward is an error.
    The others' needs the result. In training without a residual it computes that again too, from bn_bias, which is kept
    in place of the result.
    """
    check_algorithm("conv_bn_act", algorithm)
    check_activation("conv_bn_act", activation, activation_arg)
    slope, slopes = (LEAKY_SLOPE, None) if activation_arg is None else slopes_of(activation, activation_arg)
    group = None if process_group is None else check_group("conv_bn_act", process_group, training)
    if input.dim() != 4:
        raise RuntimeError(f"conv_bn_act(): input must be of size [N, C, H, W], but got {list(input.shape)}")
    reason = why_torch(
        input, weight, bias, residual, running_mean, running_var, bn_weight, bn_bias, slopes, algorithm=algorithm
    )
    x, w, b, residual, slopes = autocast(input, weight, bias, residual, slopes)
    if reason:
        record_torch("conv_bn_act", reason, input, weight)
        x, padding = padded_for_torch(x, padding)
        y = F.conv2d(x, w, b, stride, padding, dilation, groups)
        y = batch_norm_of_torch(y, running_mean, running_var, bn_weight, bn_bias, training, momentum, eps, group)
        return _by_pytorch("conv_bn_act", y, residual, activation, slope, slopes)
    geometry = conv_geometry("conv_bn_act", x, w, b, stride, padding, dilation, groups)
    gamma, beta, momentum, eps = check_norm(
        "conv_bn_act", w.shape[0], x.dtype, running_mean, running_var, bn_weight, bn_bias, training, momentum, eps
    )
    size = conv_output_size(x, w, geometry) if training or residual is not None else ()
    if residual is not None or slopes is not None:
        _check_epilogue("conv_bn_act", residual, slopes, size, w.shape[0], x.dtype)
    apart = slopes if slopes is not None and wants_gradient(x, w, b, gamma, beta, residual, slopes) else None
    if apart is not None:
        activation, slopes = None, None
    end = residual, eps, activation, slope, slopes
    running = running_mean, running_var
    if training:
        count = values_per_channel("conv_bn_act", size, group)
        if group is None:
            # Who captures calls is told of the layer's usual operators, one for each part.
            if not captured() and ops.gram_serves(x, w, count, activation, slope, geometry, algorithm):
                norm = *running, momentum, gamma, beta
                z = ops.conv_bn_act_by_gram(x, w, b, *norm, *end[:-1], *geometry, algorithm)[0]
            else:
                norm = *running, True, momentum, gamma, beta
                z = ops.conv_bn_act_training(x, w, b, *norm, *end, *geometry, algorithm)[0]
        else:  # what the ranks exchange stands between the statistics and the norm
            y, mean, var = ops.conv_stats(x, w, b, *geometry, algorithm)
            z = normalize_batch(y, (mean, var), gamma, beta, running, momentum, *end, count, group)
    else:
        z = ops.conv_bn_act(x, w, b, *running, gamma, beta, *end, *geometry, algorithm)
    return z if apart is None else F.prelu(z, apart)


@operation
def conv_act(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
    groups: int = 1,
    *,
    residual: Tensor | None = None,
    activation: ActivationName | None = "relu",
    activation_arg: float | Tensor | None = None,
    algorithm: Algorithm = "auto",
) -> Tensor:
    """act(conv2d(input, weight, bias) + residual).

    One kernel; where the library's convolution serves, that and one pass for bias, residual and activation, or, for
    relu on a GPU, cuDNN's fused kernel. With gradients too, but for the activations whose derivative is not told by
    their result, gelu, gelu_tanh, silu, hardswish, mish and hardsigmoid: then the convolution and one pass. Their
    backward pass computes again what they were applied to, from residual and bias, and keeps them: to change these in
    place before backward is an error.

    Shapes and dtypes as conv2d; residual of the output's size and dtype; activation, activation_arg as conv_bn_act.
    Raises as conv2d, ValueError for an unknown activation or a residual or slopes of another size or dtype, TypeError
    for an activation_arg of another type.
    """
    check_algorithm("conv_act", algorithm)
    check_activation("conv_act", activation, activation_arg)
    slope, slopes = (LEAKY_SLOPE, None) if activation_arg is None else slopes_of(activation, activation_arg)
    reason = why_torch(input, weight, bias, residual, slopes, algorithm=algorithm)
    x, w, b, residual, slopes = autocast(input, weight, bias, residual, slopes)
    x, unbatched = batched(x)
    if unbatched and residual is not None:
        residual = residual.unsqueeze(0)
    if reason:
        record_torch("conv_act", reason, input, weight)
        x, padding = padded_for_torch(x, padding)
        y = F.conv2d(x, w, b, stride, padding, dilation, groups)
        z = _by_pytorch("conv_act", y, residual, activation, slope, slopes)
        return z.squeeze(0) if unbatched else z
    geometry = conv_geometry("conv_act", x, w, b, stride, padding, dilation, groups)
    channels = 0 if x.shape[1] == 0 else w.shape[0]  # as PyTorch has it, without channels in there are none out
    size = () if residual is None else (x.shape[0], channels, *conv_output_size(x, w, geometry)[2:])
    if residual is not None or slopes is not None:
        _check_epilogue("conv_act", residual, slopes, size, channels, x.dtype)
    apart = slopes if slopes is not None and wants_gradient(x, w, b, residual, slopes) else None
    if apart is not None:
        activation, slopes = None, None
    if channels == 0 or (activation is None and residual is None):
        z = ops.conv_fprop(x, w, b, *geometry, algorithm)
        z = z if channels else activate(z if residual is None else z + residual, activation, slope)
    else:
        z = ops.conv_act(x, w, b, residual, activation, slope, slopes, *geometry, algorithm)
    z = z if apart is None else F.prelu(z, apart)
    return z.squeeze(0) if unbatched else z


@operation
def bn_act(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    activation: ActivationName | None = "relu",
    activation_arg: float | Tensor | None = None,
    process_group: ProcessGroup | None = None,
) -> Tensor:
    """act(batch_norm(input) + residual).

    One pass over memory, in training after one that takes the statistics. Its backward pass is one of
    normalize_backward's: two passes, or with frozen statistics one. It reads the result only with a residual; without,
    it computes it again, from bias too: to change that in place before backward is an error.

    Shapes, dtypes, running statistics and process_group as batch_norm; residual of input's size and dtype; activation,
    activation_arg as conv_bn_act. Raises as batch_norm, ValueError for an unknown activation or a residual or slopes of
    another size or dtype, TypeError for an activation_arg of another type.
    """
    check_activation("bn_act", activation, activation_arg)
    slope, slopes = (LEAKY_SLOPE, None) if activation_arg is None else slopes_of(activation, activation_arg)
    group = None if process_group is None else check_group("bn_act", process_group, training)
    norm = running_mean, running_var, weight, bias, training, momentum, eps
    if reason := why_torch(input, running_mean, running_var, weight, bias, residual, slopes):
        record_torch("bn_act", reason, input)
        return _by_pytorch("bn_act", batch_norm_of_torch(input, *norm, group), residual, activation, slope, slopes)
    if input.dim() > 1:
        _check_epilogue("bn_act", residual, slopes, input.shape, input.shape[1], input.dtype)
    # PyTorch's prelu casts to the dtype of autocast, and nothing else here does
    if slopes is not None and (autocasts(input) or wants_gradient(input, weight, bias, residual, slopes)):
        return F.prelu(normalized("bn_act", input, *norm, residual, None, slope, None, group), slopes)
    return normalized("bn_act", input, *norm, residual, activation, slope, slopes, group)


# ----------------------------------------------------------------------------------------------------------------------
# What all of them do


def wants_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _check_epilogue(
    function: str,
    residual: Tensor | None,
    slopes: Tensor | None,
    size: Sequence[int],
    channels: int,
    dtype: torch.dtype,
) -> None:
    if residual is not None and (residual.shape != size or residual.dtype != dtype):
        raise ValueError(
            f"{function}(): residual must be the output's size {list(size)} and dtype {dtype},"
            f" but got {list(residual.shape)} {residual.dtype}"
        )
    if slopes is not None:
        check_slopes(function, slopes, channels, dtype)


def _by_pytorch(
    function: str,
    y: Tensor,
    residual: Tensor | None,
    activation: ActivationName | None,
    slope: float,
    slopes: Tensor | None,
) -> Tensor:
    """act(y + residual), of operands that are checked as elsewhere."""
    _check_epilogue(function, residual, slopes, y.shape, y.shape[1] if y.dim() > 1 else 1, y.dtype)
    return activate(y if residual is None else y + residual, activation, slope if slopes is None else slopes)
