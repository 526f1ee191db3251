"""Max, average, adaptive and global average pooling."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .windows import Size2, batched, pair, taps_of


def _pool_extent(size: int, window: int, stride: int, padding: int, dilation: int, ceil_mode: bool) -> int:
    """ceil_mode also takes the last, partial window, if it starts inside the image or the padding before it."""
    span = size + 2 * padding - dilation * (window - 1) - 1
    starts = range(0, size + padding, stride)
    return sum(1 for start in starts if start <= (span + stride - 1 if ceil_mode else span))


def max_pool2d(
    input: Tensor,
    kernel_size: Size2,
    stride: Size2 | None = None,
    padding: Size2 = 0,
    dilation: Size2 = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The first of equal maxima wins, the last NaN wins, padding never does."""
    x = batched(input)
    window, pads, dil = pair(kernel_size), pair(padding), pair(dilation)
    step = window if stride is None or stride == [] or stride == () else pair(stride)
    H, W = x.shape[-2:]
    P, Q = (_pool_extent(*axis, ceil_mode) for axis in zip((H, W), window, step, pads, dil, strict=True))
    best = x.new_full((*x.shape[:2], P, Q), -math.inf)
    index = torch.full(best.shape, -1, device=x.device)
    row = (torch.arange(P, device=x.device) * step[0] - pads[0])[:, None]
    column = (torch.arange(Q, device=x.device) * step[1] - pads[1])[None, :]
    for r, s, tap, inside in taps_of(x, window, (P, Q), step, pads, dil, -math.inf):
        take = inside & ((tap > best) | tap.isnan() | (index < 0))
        best = torch.where(take, tap, best)
        index = torch.where(take, (row + r * dil[0]) * W + column + s * dil[1], index)
    y, index = (best, index) if input.dim() == 4 else (best[0], index[0])
    return (y, index) if return_indices else y


def avg_pool2d(
    input: Tensor,
    kernel_size: Size2,
    stride: Size2 | None = None,
    padding: Size2 = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """Sum over a window / the pixels in it; the padding counts or not, what ceil_mode lets hang out beyond it never
    does.
    """
    x = batched(input)
    window, pads = pair(kernel_size), pair(padding)
    step = window if stride is None or stride == [] or stride == () else pair(stride)
    P, Q = (_pool_extent(*axis, 1, ceil_mode) for axis in zip(x.shape[-2:], window, step, pads, strict=True))
    geometry = window, (P, Q), step
    y = x.new_zeros(*x.shape[:2], P, Q)
    for _, _, tap, _ in taps_of(x, *geometry, pads, (1, 1)):
        y = y + tap
    # the pixels of a window: those inside the image, or inside the image with its padding, where the window starts at 0
    counted = (
        x.new_zeros([size + 2 * pad for size, pad in zip(x.shape[-2:], pads, strict=True)])
        if count_include_pad
        else x[0, 0]
    )
    pixels = sum(
        inside.to(x.dtype) for *_, inside in taps_of(counted, *geometry, (0, 0) if count_include_pad else pads, (1, 1))
    )
    y = y / (pixels if divisor_override is None else divisor_override)
    return y if input.dim() == 4 else y[0]


def adaptive_avg_pool2d(input: Tensor, output_size: int | Sequence[int | None]) -> Tensor:
    """Each output pixel is the mean of the rows floor(p * H / P) to ceil((p + 1) * H / P), and columns likewise."""
    wanted = (output_size, output_size) if isinstance(output_size, int) else output_size
    H, W = input.shape[-2:]
    P, Q = (own if size is None else size for size, own in zip(wanted, (H, W), strict=True))
    rows, columns = ([(i * n // m, -(-(i + 1) * n // m)) for i in range(m)] for n, m in ((H, P), (W, Q)))
    y = [input[..., h0:h1, w0:w1].sum((-2, -1)) / ((h1 - h0) * (w1 - w0)) for h0, h1 in rows for w0, w1 in columns]
    return torch.stack(y, -1).unflatten(-1, (P, Q)) if y else input.new_zeros(*input.shape[:-2], P, Q)


def global_avg_pool2d(input: Tensor, keepdim: bool = True) -> Tensor:
    y = input.flatten(-2).sum(-1) / (input.shape[-2] * input.shape[-1])
    return y[..., None, None] if keepdim else y
