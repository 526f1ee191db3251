"""conv_bn_act: convolution, batch norm, residual and activation as one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ..activations import LEAKY_SLOPE, activate, check_activation
from ..dispatch import why_torch
from ..recording import record_torch
from .arguments import Size, autocast, check_algorithm
from .convolution import conv2d, conv_geometry, conv_output_size
from .entrance import operation
from .normalization import batch_norm, batch_norm_of_torch, check_group, check_norm, normalize_batch, values_per_channel
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
    activation: str | None = "relu",
    activation_arg: float | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
    groups: int = 1,
    algorithm: str = "auto",
    process_group: ProcessGroup | None = None,
) -> Tensor:
    """act(batch_norm(conv2d(input, weight, bias)) + residual).

    In eval one kernel. In training the convolution leaves the statistics of its output, running_mean and running_var
    are updated in place if given, and a second kernel normalises, adds and activates.

    Shapes and dtypes as conv2d; running_mean, running_var, bn_weight, bn_bias [K], of input's dtype or float32;
    residual of the output's size and dtype. activation: None, "relu", "leaky_relu" (activation_arg: slope, 0.01),
    "relu6", "gelu", "gelu_tanh", "silu", "hardswish". process_group: as batch_norm has it. Raises as conv2d and
    batch_norm, ValueError for an unknown activation or a residual of another size or dtype.

    The backward pass of gelu, gelu_tanh, silu and hardswish needs what these were applied to. It computes that again
    from residual and bn_bias, and keeps them: to change these in place before backward is an error.
    """
    check_algorithm("conv_bn_act", algorithm)
    check_activation("conv_bn_act", activation, activation_arg)
    slope = LEAKY_SLOPE if activation_arg is None else float(activation_arg)
    group = check_group("conv_bn_act", process_group, training)
    if input.dim() != 4:
        raise RuntimeError(f"conv_bn_act(): input must be of size [N, C, H, W], but got {list(input.shape)}")
    reason = why_torch(
        input, weight, bias, residual, running_mean, running_var, bn_weight, bn_bias, algorithm=algorithm
    )
    x, w, b, residual = autocast(input, weight, bias, residual)
    if reason:
        record_torch("conv_bn_act", reason, input, weight)
        y = F.conv2d(x, w, b, stride, padding, dilation, groups)
        y = batch_norm_of_torch(
            y, running_mean, running_var, bn_weight, bn_bias, training, momentum, eps, process_group
        )
        if residual is not None:
            _check_residual(residual, y.shape, y.dtype)
            y = y + residual
        return activate(y, activation, slope)
    geometry = conv_geometry("conv_bn_act", x, w, b, stride, padding, dilation, groups)
    gamma, beta, momentum, eps = check_norm(
        "conv_bn_act", w.shape[0], x.dtype, running_mean, running_var, bn_weight, bn_bias, training, momentum, eps
    )
    size = conv_output_size(x, w, geometry) if training or residual is not None else ()
    if residual is not None:
        _check_residual(residual, size, x.dtype)
    if not training:
        return ops.conv_bn_act(
            x, w, b, running_mean, running_var, gamma, beta, residual, eps, activation, slope, *geometry, algorithm
        )
    count = values_per_channel("conv_bn_act", size, group)
    y, mean, var = ops.conv_stats(x, w, b, *geometry, algorithm)
    running = running_mean, running_var
    return normalize_batch(
        y, (mean, var), gamma, beta, residual, running, momentum, eps, activation, slope, count, group
    )


def _check_residual(residual: Tensor, size: Sequence[int], dtype: torch.dtype) -> None:
    if residual.shape != size or residual.dtype != dtype:
        raise ValueError(
            f"conv_bn_act(): residual must be the output's size {list(size)} and dtype {dtype},"
            f" but got {list(residual.shape)} {residual.dtype}"
        )


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
    activation: str | None = "relu",
    activation_arg: float | Tensor | None = None,
    algorithm: str = "auto",
) -> Tensor:
    """act(conv2d(input, weight, bias) + residual)."""
    y = conv2d(input, weight, bias, stride, padding, dilation, groups, algorithm=algorithm)
    y = y if residual is None else y + residual
    return activate(y, activation, LEAKY_SLOPE if activation_arg is None else activation_arg)


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
    activation: str | None = "relu",
    activation_arg: float | Tensor | None = None,
    process_group: ProcessGroup | None = None,
) -> Tensor:
    """act(batch_norm(input) + residual). process_group: as batch_norm has it."""
    y = batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps, process_group=process_group)
    y = y if residual is None else y + residual
    return activate(y, activation, LEAKY_SLOPE if activation_arg is None else activation_arg)
