"""Max, average, adaptive and global average pooling: what they take, checked."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import prod
from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from cnnfast_kernels.problem import pool_extent

from ..dispatch import why_torch
from ..recording import record_torch
from .arguments import Size, as_int, axis_sizes, batched, check_flag, expand_sizes
from .entrance import operation
from .operators import ops


@overload
def max_pool2d(
    input: Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    dilation: Size = 1,
    ceil_mode: bool = False,
    return_indices: Literal[False] = False,
) -> Tensor: ...


@overload
def max_pool2d(
    input: Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    dilation: Size = 1,
    ceil_mode: bool = False,
    *,
    return_indices: Literal[True],
) -> tuple[Tensor, Tensor]: ...


@overload
def max_pool2d(
    input: Tensor,
    kernel_size: Size,
    stride: Size | None,
    padding: Size,
    dilation: Size,
    ceil_mode: bool,
    return_indices: Literal[True],
) -> tuple[Tensor, Tensor]: ...


@overload
def max_pool2d(
    input: Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    dilation: Size = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Tensor | tuple[Tensor, Tensor]: ...


@operation
def max_pool2d(
    input: Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    dilation: Size = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Maximum over windows, as torch.nn.functional.max_pool2d: input [N, C, H, W] or [C, H, W]; padding counts as -inf,
    NaN wins.

    Returns [N, C, P, Q] of input's dtype, stride being kernel_size by default; with return_indices a pair of it and the
    int64 positions h * W + w of the maxima, as torch.nn.functional.max_unpool2d takes them. Raises RuntimeError and
    TypeError where PyTorch does.
    """
    if reason := why_torch(input):
        record_torch("max_pool2d", reason, input)
        return F.max_pool2d(input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)  # pyright: ignore
    x, unbatched = _batched(input)
    window = checked_window("max_pool2d", x.shape, kernel_size, stride, padding, dilation, ceil_mode)
    y, taps = ops.max_pool(x, bool(return_indices), *window)
    if not return_indices:
        return y.squeeze(0) if unbatched else y
    indices = ops.max_pool_indices(taps, x.shape, *window)
    return (y.squeeze(0), indices.squeeze(0)) if unbatched else (y, indices)


@operation
def avg_pool2d(
    input: Tensor,
    kernel_size: Size,
    stride: Size | None = None,
    padding: Size = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """Mean over windows, as torch.nn.functional.avg_pool2d: input [N, C, H, W] or [C, H, W].

    Returns [N, C, P, Q] of input's dtype, stride being kernel_size by default. count_include_pad: zeros of the padding
    count in the divisor; divisor_override replaces it. Raises RuntimeError and TypeError where PyTorch does.
    """
    if reason := why_torch(input):
        record_torch("avg_pool2d", reason, input)
        return F.avg_pool2d(input, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)
    check_flag("avg_pool2d", "count_include_pad", count_include_pad)
    if divisor_override is not None:
        divisor_override = as_int("avg_pool2d", "divisor_override", divisor_override)
        if divisor_override == 0:
            raise RuntimeError("avg_pool2d(): divisor_override must not be zero, but got divisor_override=0")
    x, unbatched = _batched(input)
    kernel, step, pad, _, _ = checked_window("avg_pool2d", x.shape, kernel_size, stride, padding, 1, ceil_mode)
    y = ops.avg_pool(x, kernel, step, pad, ceil_mode, count_include_pad, divisor_override)
    return y.squeeze(0) if unbatched else y


@partial(operation, refusal=lambda given: AttributeError)
def adaptive_avg_pool2d(input: Tensor, output_size: int | Sequence[int | None] | None) -> Tensor:
    """Mean over windows, as torch.nn.functional.adaptive_avg_pool2d: input [N, C, H, W] or [C, H, W] to [N, C, P, Q].

    output_size: P = Q, or (P, Q), of which each may be None (as input's) and larger than input's. Window p covers rows
    floor(p * H / P) to ceil((p + 1) * H / P). Raises RuntimeError, TypeError and ValueError where PyTorch does.
    """
    if reason := why_torch(input):
        record_torch("adaptive_avg_pool2d", reason, input)
        return F.adaptive_avg_pool2d(input, output_size)  # pyright: ignore[reportArgumentType]
    size = _adaptive_size("adaptive_avg_pool2d", input, output_size)
    if size == (1, 1):
        return _plane_means("adaptive_avg_pool2d", input)
    x, unbatched = _batched(input)
    if x.dim() != 4 or 0 in x.shape[2:]:
        raise RuntimeError(
            f"adaptive_avg_pool2d(): expected input of size [C, H, W] or [N, C, H, W] with at least one pixel, "
            f"but got {list(input.shape)}"
        )
    # PyTorch takes the first axis for a batch, which may be empty in backward; channels may not
    if unbatched and input.shape[0] == 0:
        return ops.adaptive_avg_pool(input.unsqueeze(1), size).squeeze(1)
    y = ops.adaptive_avg_pool(x, size)
    return y.squeeze(0) if unbatched else y


def _adaptive_size(function: str, input: Tensor, output_size: Any) -> tuple[int, ...]:
    if not isinstance(output_size, int | torch.SymInt):
        try:
            n = len(output_size)
        except TypeError:
            raise TypeError(
                f"{function}(): output_size must be an int or a pair of ints, but got output_size={output_size!r}"
            ) from None
        if input.dim() <= n:
            raise ValueError(
                f"{function}(): input must have more dimensions than output_size={output_size} has values, "
                f"but got size {list(input.shape)}"
            )
        output_size = [own if v is None else v for v, own in zip(output_size, input.shape[-n:], strict=False)]
        if len(expand_sizes(function, "output_size", output_size, n)) != 2:
            raise RuntimeError(
                f"{function}(): output_size must be an int or have 2 values, but got output_size={output_size}"
            )
    return axis_sizes(function, "output_size", output_size, 0)


def _plane_means(function: str, input: Tensor) -> Tensor:
    """[..., H, W] to [..., 1, 1]: PyTorch takes any number of axes here, and the mean of no pixels is NaN."""
    if input.dim() < 2:
        raise IndexError(f"{function}(): input must be of size [..., H, W], but got {list(input.shape)}")
    if input.dim() == 4:
        return ops.global_avg_pool(input)
    planes = input.shape[:-2]
    return ops.global_avg_pool(_planes(input.reshape(1, prod(planes), *input.shape[-2:]))).view(*planes, 1, 1)


@operation
def global_avg_pool2d(input: Tensor, keepdim: bool = True) -> Tensor:
    """Mean of each plane: [N, C, H, W] to [N, C, 1, 1], or [N, C] without keepdim (and likewise unbatched [C, H, W]).

    The mean of no pixels is NaN, as in PyTorch. Raises RuntimeError for any other number of axes.
    """
    if input.dim() not in (3, 4):
        raise RuntimeError(
            f"global_avg_pool2d(): expected input of size [C, H, W] or [N, C, H, W], but got {list(input.shape)}"
        )
    if reason := why_torch(input):
        record_torch("global_avg_pool2d", reason, input)
        return input.mean((-2, -1), keepdim=keepdim)
    x, unbatched = _batched(input)
    y = ops.global_avg_pool(x)
    y = y if keepdim else y.flatten(1)
    return y.squeeze(0) if unbatched else y


def _batched(input: Tensor) -> tuple[Tensor, bool]:
    x, unbatched = batched(input)
    return _planes(x) if unbatched else x, unbatched


def _planes(x: Tensor) -> Tensor:
    """x [1, C, H, W] of an input that is no batch: never channels_last, as in PyTorch, though strides of planes of one
    pixel may say so.
    """
    return x.clone(memory_format=torch.contiguous_format) if x.shape[2:] == (1, 1) and x.stride(3) != 1 else x


def checked_window(
    function: str,
    size: Sequence[int],
    kernel_size: Size,
    stride: Size | None,
    padding: Size,
    dilation: Size,
    ceil_mode: bool,
):
    """The checked window of a pooling of an input of this size: (kernel_size, stride, padding, dilation, ceil_mode)."""
    check_flag(function, "ceil_mode", ceil_mode)
    _check_image(function, size)
    kernel = axis_sizes(function, "kernel_size", kernel_size, 1)
    own = stride is None or (isinstance(stride, (tuple, list)) and not stride)
    step = kernel if own else axis_sizes(function, "stride", stride, 1)
    pad = axis_sizes(function, "padding", padding, 0)
    dil = axis_sizes(function, "dilation", dilation, 1)
    if pad[0] > kernel[0] // 2 or pad[1] > kernel[1] // 2:
        raise RuntimeError(
            f"{function}(): padding must be at most half of kernel_size, but got padding={pad}, kernel_size={kernel}"
        )
    _, _, H, W = size
    P = pool_extent(H, kernel[0], step[0], pad[0], dil[0], ceil_mode)
    Q = pool_extent(W, kernel[1], step[1], pad[1], dil[1], ceil_mode)
    if P < 1 or Q < 1:
        raise RuntimeError(
            f"{function}(): with kernel_size={kernel} the output of input size {list(size)} would be {P}x{Q}: too small"
        )
    return kernel, step, pad, dil, ceil_mode


def _check_image(function: str, size: Sequence[int]) -> None:
    if len(size) != 4 or 0 in size[1:]:
        error = IndexError if function == "avg_pool2d" and len(size) < 3 else RuntimeError
        raise error(
            f"{function}(): expected input of size [C, H, W] or [N, C, H, W], only N may be 0, but got {list(size)}"
        )
