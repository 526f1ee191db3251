"""What convolution and pooling share: sizes, and what each tap of a window sees."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

Size2 = int | Sequence[int]
Pair = tuple[int, int]


def pair(value: Size2) -> Pair:
    return (value, value) if isinstance(value, int) else (value[0], value[-1])


def batched(x: Tensor) -> Tensor:
    return x if x.dim() == 4 else x[None]


def taps_of(
    x: Tensor, window: Pair, extents: Pair, stride: Pair, padding: Pair, dilation: Pair, fill: float = 0.0
) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """For each tap (r, s) of a window: what it sees, [..., P, Q], `fill` outside the image, and where it is inside, [P,
    Q].

    x [..., H, W]; padding is that above and to the left; extents are (P, Q).
    """
    last = [
        (n - 1) * st + (taps - 1) * d - pad
        for n, st, taps, d, pad in zip(extents, stride, window, dilation, padding, strict=True)
    ]
    below, right = (max(0, end + 1 - size) for end, size in zip(last, x.shape[-2:], strict=True))
    padded = torch.nn.functional.pad(x, (padding[1], right, padding[0], below), value=fill)

    def along(axis: int, tap: int) -> tuple[slice, Tensor]:
        first = tap * dilation[axis]
        seen = slice(first, first + (extents[axis] - 1) * stride[axis] + 1, stride[axis])
        position = torch.arange(extents[axis], device=x.device) * stride[axis] + first - padding[axis]
        return seen, (position >= 0) & (position < x.shape[axis - 2])

    for r in range(window[0]):
        rows, row_inside = along(0, r)
        for s in range(window[1]):
            columns, column_inside = along(1, s)
            yield r, s, padded[..., rows, columns], row_inside[:, None] & column_inside[None, :]
