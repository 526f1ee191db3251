"""Convolutions over one and two axes, and transposed: what they take, checked."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from cnnfast_kernels.layout import Laid, convolution_format
from cnnfast_kernels.problem import output_extent

from ..dispatch import why_torch
from ..recording import record_torch
from .arguments import Algorithm, Sides, Size, as_int, autocast, axis_sizes, batched, check_algorithm
from .entrance import operation
from .operators import ops


@operation
def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
    groups: int = 1,
    *,
    algorithm: Algorithm = "auto",
) -> Tensor:
    """2-D convolution, as torch.nn.functional.conv2d.

    input [N, C, H, W] or [C, H, W], weight [K, C / groups, R, S], bias [K], all of one dtype (float16, bfloat16,
    float32, float64); padding: int, pair, "same" or "valid". Returns [N, K, P, Q], channels_last if input or weight is.
    algorithm: "auto", "direct" (implicit GEMM), "im2col" (explicit, in a bounded workspace), "torch". Raises
    RuntimeError and TypeError where PyTorch does.
    """
    check_algorithm("conv2d", algorithm)
    if reason := why_torch(input, weight, bias, algorithm=algorithm):
        record_torch("conv2d", reason, input, weight)
        input, padding = padded_for_torch(input, padding)
        return F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    x, w, b = autocast(input, weight, bias)
    x, unbatched = batched(x)
    geometry = conv_geometry("conv2d", x, w, b, stride, padding, dilation, groups)
    y = ops.conv_fprop(x, w, b, *geometry, algorithm)
    return y.squeeze(0) if unbatched else y


@operation
def conv1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
    groups: int = 1,
    *,
    algorithm: Algorithm = "auto",
) -> Tensor:
    """1-D convolution, as torch.nn.functional.conv1d: conv2d of images one row high.

    input [N, C, L] or [C, L], weight [K, C / groups, S], bias [K]; dtypes, padding and algorithm as conv2d. Returns [N,
    K, Q], in memory [N, Q, K] if weight lies as [K, S, C / groups]. Raises RuntimeError and TypeError where PyTorch
    does.
    """
    check_algorithm("conv1d", algorithm)
    if reason := why_torch(input, weight, bias, algorithm=algorithm):
        record_torch("conv1d", reason, input, weight)
        return F.conv1d(input, weight, bias, stride, padding, dilation, groups)
    x, w, b = autocast(input, weight, bias)
    x, unbatched = batched(x, 1)
    step, pads, dil, groups = conv_geometry("conv1d", x, w, b, stride, padding, dilation, groups, 1)
    rows, filters = as_rows(x), w.unsqueeze(2)
    y = ops.conv_fprop(rows, filters, b, (1, *step), (0, 0, *pads), (1, *dil), groups, algorithm).squeeze(2)
    return y.squeeze(0) if unbatched else y


def as_rows(x: Tensor) -> Tensor:
    """[N, C, L] as images [N, C, 1, L]."""
    # PyTorch makes input contiguous: where the channels of ours are adjacent, a row's stride of 1 hides that from the
    # output's format. Of one channel it would not.
    x = x.contiguous() if x.shape[1] == 1 else x
    return x.unsqueeze(2) if x.is_contiguous() else x.unsqueeze(3).transpose(2, 3)


@operation
def conv_transpose2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Size = 0,
    output_padding: Size = 0,
    groups: int = 1,
    dilation: Size = 1,
    *,
    algorithm: Algorithm = "auto",
) -> Tensor:
    """2-D transposed convolution, as torch.nn.functional.conv_transpose2d: the gradient of a convolution as an
    operation of its own.

    input [N, C, H, W] or [C, H, W], weight [C, K / groups, R, S], bias [K]; dtypes and algorithm as conv2d. Returns [N,
    K, P, Q] with P = (H - 1) * stride - 2 * padding + dilation * (R - 1) + output_padding + 1, channels_last if input
    or weight is. Raises RuntimeError and TypeError where PyTorch does.
    """
    check_algorithm("conv_transpose2d", algorithm)
    if reason := why_torch(input, weight, bias, algorithm=algorithm):
        record_torch("conv_transpose2d", reason, input, weight)
        return F.conv_transpose2d(input, weight, bias, stride, padding, output_padding, groups, dilation)
    x, w, b = autocast(input, weight, bias)
    x, unbatched = batched(x)
    size, *geometry = _transposed_geometry(
        "conv_transpose2d", x, w, b, stride, padding, output_padding, groups, dilation
    )
    channels_last = convolution_format(x, w) == torch.channels_last
    y = ops.conv_dgrad(x, w, b, size, channels_last, *geometry, algorithm)
    return y.squeeze(0) if unbatched else y


def _transposed_geometry(
    function: str,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Size,
    padding: Size,
    output_padding: Size,
    groups: int,
    dilation: Size,
) -> tuple[list[int], tuple[int, ...], tuple[int, ...], tuple[int, ...], int]:
    """The checked (size of the output, stride, (top, bottom, left, right), dilation, groups).

    They are those of the convolution that leads from the output to input: it ends where its last window does, hence
    output_padding is taken off the padding at the end.
    """
    groups = as_int(function, "groups", groups)
    _check_operands(function, 2, input, weight, bias, groups, transposed=True)
    step = axis_sizes(function, "stride", stride, 1)
    pads = axis_sizes(function, "padding", padding, 0)
    more = axis_sizes(function, "output_padding", output_padding, 0)
    dil = axis_sizes(function, "dilation", dilation, 1)
    if any(m >= max(s, d) for m, s, d in zip(more, step, dil, strict=True)):
        raise RuntimeError(
            f"{function}(): output_padding must be smaller than either stride or dilation, "
            f"but got output_padding={more}, stride={step}, dilation={dil}"
        )
    P, Q = ((n - 1) * s - 2 * p + d * (t - 1) + m + 1 for n, s, p, d, t, m in zip(
        input.shape[2:], step, pads, dil, weight.shape[2:], more, strict=True
    ))  # fmt: skip
    if min(P, Q) < 0:
        raise RuntimeError(
            f"{function}(): with padding={pads} the output of input size {list(input.shape)} would be "
            f"{P}x{Q}: too small"
        )
    ends = (pads[0], pads[0] - more[0], pads[1], pads[1] - more[1])
    return [input.shape[0], weight.shape[1] * groups, P, Q], step, ends, dil, groups


def conv_geometry(
    function: str,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Size,
    padding: Size | str,
    dilation: Size,
    groups: int,
    n: int = 2,
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int]:
    """The checked geometry over n axes: (stride, (top, bottom, left, right), dilation, groups)."""
    groups = as_int(function, "groups", groups)
    image, taps = _check_operands(function, n, input, weight, bias, groups)
    step = axis_sizes(function, "stride", stride, 1, n)
    dil = axis_sizes(function, "dilation", dilation, 1, n)
    pads = _conv_padding(function, padding, step, dil, taps)
    first, last = image[0] + pads[0] + pads[1], image[-1] + pads[-2] + pads[-1]  # the same, of one axis
    if first <= dil[0] * (taps[0] - 1) or last <= dil[-1] * (taps[-1] - 1):
        spans = [d * (t - 1) + 1 for d, t in zip(dil, taps, strict=True)]
        raise RuntimeError(
            f"{function}(): the padded input ({' x '.join(map(str, (first, last)[:n]))}) is smaller than the kernel"
            f" ({' x '.join(map(str, spans))} with dilation={dil})"
        )
    return step, pads, dil, groups


def padded_for_torch(input: Tensor, padding: Size | str) -> tuple[Tensor, Size | str]:
    """(input, padding) for PyTorch's convolution, which has one padding for both ends of an axis: where there are
    `Sides`, the input is padded.
    """
    if not isinstance(padding, Sides):
        return input, padding
    return F.pad(input, (padding.left, padding.right, padding.top, padding.bottom)), 0


def _conv_padding(
    function: str, padding: Size | str, stride: tuple[int, ...], dilation: tuple[int, ...], taps: Sequence[int]
) -> tuple[int, ...]:
    """(before, after) of each axis, one after the other."""
    if isinstance(padding, Sides):
        return tuple(padding)
    if not isinstance(padding, str):
        pads = axis_sizes(function, "padding", padding, 0, len(taps))
        return (pads[0], pads[0], pads[-1], pads[-1])[: 2 * len(pads)]
    if padding == "valid":
        return (0, 0) * len(taps)
    if padding == "same":
        if max(stride) > 1:
            raise RuntimeError(
                f"{function}(): padding='same' is not supported for strided convolutions, but got stride={stride}"
            )
        spans = [d * (n - 1) for d, n in zip(dilation, taps, strict=True)]
        # even filters: one more at the end
        return tuple(pad for span in spans for pad in (span // 2, span - span // 2))
    raise RuntimeError(
        f"{function}(): padding must be 'same', 'valid', an int or a pair of ints, but got padding={padding!r}"
    )


def _check_operands(
    function: str, n: int, input: Tensor, weight: Tensor, bias: Tensor | None, groups: int, transposed: bool = False
) -> tuple[list[int], list[int]]:
    """What a convolution over n axes asks of its (batched) tensors: the extents of the image, and the taps."""
    if weight.dim() != n + 2:
        axes = ("S", "R, S")[n - 1]
        sizes = f"[C, K / groups, {axes}]" if transposed else f"[K, C / groups, {axes}]"
        raise RuntimeError(f"{function}(): weight must be of size {sizes}, but got {list(weight.shape)}")
    if input.dim() != n + 2:
        raise RuntimeError(
            f"{function}(): expected {n + 1}D (unbatched) or {n + 2}D (batched) input [N, C, {_image_size(n)}], "
            f"but got input of size {list(input.shape)}"
        )
    if groups < 1:
        raise RuntimeError(f"{function}(): groups must be positive, but got groups={groups}")
    N, given, *image = input.shape
    first, second, *taps = weight.shape
    if first < 1 or first % groups:
        rows = "channels" if transposed else "filters"
        raise RuntimeError(
            f"{function}(): groups={groups} must divide the {rows}, but weight has size {list(weight.shape)}"
        )
    channels, filters = (first, second * groups) if transposed else (second * groups, first)
    if given != channels:
        raise RuntimeError(
            f"{function}(): with groups={groups} and weight of size {list(weight.shape)}, input must have "
            f"{channels} channels, but input has size {list(input.shape)}"
        )
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != filters):
        raise RuntimeError(
            f"{function}(): bias must have size [{filters}], one value a filter, but got {list(bias.shape)}"
        )
    dtype = input.dtype
    if weight.dtype != dtype:
        raise RuntimeError(f"{function}(): weight must have input's dtype {dtype}, but got {weight.dtype}")
    if bias is not None and bias.dtype != dtype:
        raise RuntimeError(f"{function}(): bias must have input's dtype {dtype}, but got {bias.dtype}")
    if (0 in taps or filters < 1) and channels > 0:
        # as PyTorch, which takes the first weight of an empty batch's filters
        error = IndexError if N == 0 else RuntimeError
        raise error(
            f"{function}(): weight must have at least one filter and one tap, but got size {list(weight.shape)}"
        )
    if 0 in image and N > 0 and channels > 0:
        raise RuntimeError(
            f"{function}(): only batch and channels of input may be empty, but got size {list(input.shape)}"
        )
    return image, taps


def _image_size(n: int) -> str:
    return ("L", "H, W")[n - 1]


def conv_output_size(x: Laid, w: Tensor, geometry) -> tuple[int, ...]:
    stride, pads, dilation, _ = geometry
    N, _, H, W = x.shape
    K, _, R, S = w.shape
    P = output_extent(H, R, stride[0], pads[0], pads[1], dilation[0])
    Q = output_extent(W, S, stride[1], pads[2], pads[3], dilation[1])
    return N, K, P, Q
