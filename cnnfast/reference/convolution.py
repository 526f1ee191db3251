"""Convolutions over one and two axes, and transposed."""

from __future__ import annotations

import torch
from torch import Tensor

from .windows import Size2, batched, pair, taps_of


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size2 = 1,
    padding: Size2 | str = 0,
    dilation: Size2 = 1,
    groups: int = 1,
) -> Tensor:
    """sum over r, s, c of input[n, c, p * stride - padding + r * dilation, ...] * weight[k, c, r, s], plus bias.

    padding of four numbers is (top, bottom, left, right).
    """
    x = batched(input).unflatten(1, (groups, -1))
    w = weight.unflatten(0, (groups, -1))  # [G, K / G, C / G, R, S]
    window, step, dil = (weight.shape[2], weight.shape[3]), pair(stride), pair(dilation)
    spans = [d * (taps - 1) for d, taps in zip(dil, window, strict=True)]
    if padding == "same":
        pads, total = (spans[0] // 2, spans[1] // 2), spans
    elif isinstance(padding, tuple) and len(padding) == 4:
        pads, total = (padding[0], padding[2]), [padding[0] + padding[1], padding[2] + padding[3]]
    else:
        pads = pair(0 if isinstance(padding, str) else padding)
        total = [2 * p for p in pads]
    P, Q = (
        (size + pad - span - 1) // st + 1
        for size, pad, span, st in zip(input.shape[-2:], total, spans, step, strict=True)
    )
    y = x.new_zeros(x.shape[0], groups, w.shape[1], P, Q)
    for r, s, tap, _ in taps_of(x, window, (P, Q), step, pads, dil):
        y = y + torch.einsum("ngchw,gkc->ngkhw", tap, w[..., r, s])
    y = y.flatten(1, 2)
    y = y if bias is None else y + bias.view(-1, 1, 1)
    return y if input.dim() == 4 else y[0]


def conv1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size2 = 1,
    padding: Size2 | str = 0,
    dilation: Size2 = 1,
    groups: int = 1,
) -> Tensor:
    """conv2d of images one row high."""
    along = padding if isinstance(padding, str) else (0, pair(padding)[1])
    image, filters = input.unsqueeze(-2), weight.unsqueeze(-2)
    return conv2d(image, filters, bias, (1, pair(stride)[1]), along, (1, pair(dilation)[1]), groups).squeeze(-2)


def conv_transpose2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size2 = 1,
    padding: Size2 = 0,
    output_padding: Size2 = 0,
    groups: int = 1,
    dilation: Size2 = 1,
) -> Tensor:
    """The sum of all input[n, c, h, w] * weight[c, k, r, s] that meet at an output pixel, plus bias.

    They meet at output[n, k, h * stride - padding + r * dilation, ...].
    """
    x = batched(input).unflatten(1, (groups, -1))
    w = weight.unflatten(0, (groups, -1))  # [G, C / G, K / G, R, S]
    taps, step, pads, more, dil = (
        weight.shape[2:],
        pair(stride),
        pair(padding),
        pair(output_padding),
        pair(dilation),
    )
    # rows from the first to the last that one tap meets
    reach = [(n - 1) * s + 1 for n, s in zip(x.shape[-2:], step, strict=True)]
    extents = [n + d * (t - 1) + m for n, d, t, m in zip(reach, dil, taps, more, strict=True)]
    y = x.new_zeros(x.shape[0], groups, w.shape[2], *extents)
    for r in range(taps[0]):
        for s in range(taps[1]):
            seen = torch.zeros_like(y)
            rows, columns = (
                slice(tap * d, tap * d + n, st) for tap, d, n, st in zip((r, s), dil, reach, step, strict=True)
            )
            seen[..., rows, columns] = torch.einsum("ngchw,gck->ngkhw", x, w[..., r, s])
            y = y + seen
    y = y[..., pads[0] : extents[0] - pads[0], pads[1] : extents[1] - pads[1]].flatten(1, 2)
    y = y if bias is None else y + bias.view(-1, 1, 1)
    return y if input.dim() == 4 else y[0]
