"""Every operation in plain PyTorch, differentiable and in any dtype up to float64: the judge that checking and tests
ask.

Written from the definitions, tap by tap, and not with the functions of torch.nn.functional that it judges beside ours.
Names and arguments are those of cnnfast.functional; arguments are taken to be valid. As there, running statistics are
updated in place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

Size2 = int | Sequence[int]
Pair = tuple[int, int]


def _pair(value: Size2) -> Pair:
    return (value, value) if isinstance(value, int) else (value[0], value[-1])


def _batched(x: Tensor) -> Tensor:
    return x if x.dim() == 4 else x[None]


def _taps(
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


# ----------------------------------------------------------------------------------------------------------------------
# Convolution


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size2 = 1,
    padding: Size2 | str = 0,
    dilation: Size2 = 1,
    groups: int = 1,
) -> Tensor:
    """sum over r, s, c of input[n, c, p * stride - padding + r * dilation, ...] * weight[k, c, r, s], plus bias."""
    x = _batched(input).unflatten(1, (groups, -1))
    w = weight.unflatten(0, (groups, -1))  # [G, K / G, C / G, R, S]
    window, step, dil = (weight.shape[2], weight.shape[3]), _pair(stride), _pair(dilation)
    spans = [d * (taps - 1) for d, taps in zip(dil, window, strict=True)]
    if padding == "same":
        pads, total = (spans[0] // 2, spans[1] // 2), spans
    else:
        pads = _pair(0 if isinstance(padding, str) else padding)
        total = [2 * p for p in pads]
    P, Q = (
        (size + pad - span - 1) // st + 1
        for size, pad, span, st in zip(input.shape[-2:], total, spans, step, strict=True)
    )
    y = x.new_zeros(x.shape[0], groups, w.shape[1], P, Q)
    for r, s, tap, _ in _taps(x, window, (P, Q), step, pads, dil):
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
    along = padding if isinstance(padding, str) else (0, _pair(padding)[1])
    image, filters = input.unsqueeze(-2), weight.unsqueeze(-2)
    return conv2d(image, filters, bias, (1, _pair(stride)[1]), along, (1, _pair(dilation)[1]), groups).squeeze(-2)


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
    """Adds input[n, c, h, w] * weight[c, k, r, s] to output[n, k, h * stride - padding + r * dilation, ...], plus bias."""
    x = _batched(input).unflatten(1, (groups, -1))
    w = weight.unflatten(0, (groups, -1))  # [G, C / G, K / G, R, S]
    taps, step, pads, more, dil = (
        weight.shape[2:],
        _pair(stride),
        _pair(padding),
        _pair(output_padding),
        _pair(dilation),
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


# ----------------------------------------------------------------------------------------------------------------------
# Activations, with PyTorch's derivatives at the kinks; NaN passes


def _gelu_tanh(u: Tensor) -> Tensor:
    return 0.5 * u * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))


ACTIVATIONS: dict[str | None, Callable[[Tensor, float], Tensor]] = {
    None: lambda u, slope: u,
    "relu": lambda u, slope: torch.where(u <= 0, 0.0, u),
    "leaky_relu": lambda u, slope: torch.where(u > 0, u, u * slope),
    "relu6": lambda u, slope: torch.where(u <= 0, 0.0, torch.where(u >= 6, 6.0, u)),
    "gelu": lambda u, slope: 0.5 * u * (1 + torch.erf(u / math.sqrt(2))),
    "gelu_tanh": lambda u, slope: _gelu_tanh(u),
    "silu": lambda u, slope: u * torch.sigmoid(u),
    "hardswish": lambda u, slope: torch.where(u < -3, 0.0, torch.where(u > 3, u, u * (u + 3) / 6)),
}


# ----------------------------------------------------------------------------------------------------------------------
# Batch normalisation


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """(input - mean) * weight / sqrt(var + eps) + bias; in training the running variance takes the unbiased one."""
    per_channel = [1, -1, *[1] * (input.dim() - 2)]
    if training:
        others = [d for d in range(input.dim()) if d != 1]
        count = input.numel() // input.shape[1]
        mean = input.mean(others)
        var = (input - mean.view(per_channel)).square().mean(others)
        if running_mean is not None and running_var is not None:
            with torch.no_grad():
                running_mean.copy_((1 - momentum) * running_mean + momentum * mean)
                running_var.copy_((1 - momentum) * running_var + momentum * var * (count / (count - 1)))
    else:
        assert running_mean is not None
        assert running_var is not None
        mean, var = running_mean, running_var
    y = (input - mean.view(per_channel)) / torch.sqrt(var.view(per_channel) + eps)
    y = y if weight is None else y * weight.view(per_channel)
    return y if bias is None else y + bias.view(per_channel)


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
    stride: Size2 = 1,
    padding: Size2 | str = 0,
    dilation: Size2 = 1,
    groups: int = 1,
) -> Tensor:
    """act(batch_norm(conv2d(input)) + residual)."""
    y = conv2d(input, weight, bias, stride, padding, dilation, groups)
    u = batch_norm(y, running_mean, running_var, bn_weight, bn_bias, training, momentum, eps)
    slope = 0.01 if activation_arg is None else activation_arg
    return ACTIVATIONS[activation](u if residual is None else u + residual, slope)


# ----------------------------------------------------------------------------------------------------------------------
# Pooling


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
    x = _batched(input)
    window, pads, dil = _pair(kernel_size), _pair(padding), _pair(dilation)
    step = window if stride is None or stride == [] or stride == () else _pair(stride)
    H, W = x.shape[-2:]
    P, Q = (_pool_extent(*axis, ceil_mode) for axis in zip((H, W), window, step, pads, dil, strict=True))
    best = x.new_full((*x.shape[:2], P, Q), -math.inf)
    index = torch.full(best.shape, -1, device=x.device)
    row = (torch.arange(P, device=x.device) * step[0] - pads[0])[:, None]
    column = (torch.arange(Q, device=x.device) * step[1] - pads[1])[None, :]
    for r, s, tap, inside in _taps(x, window, (P, Q), step, pads, dil, -math.inf):
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
    x = _batched(input)
    window, pads = _pair(kernel_size), _pair(padding)
    step = window if stride is None or stride == [] or stride == () else _pair(stride)
    P, Q = (_pool_extent(*axis, 1, ceil_mode) for axis in zip(x.shape[-2:], window, step, pads, strict=True))
    geometry = window, (P, Q), step
    y = x.new_zeros(*x.shape[:2], P, Q)
    for _, _, tap, _ in _taps(x, *geometry, pads, (1, 1)):
        y = y + tap
    # the pixels of a window: those inside the image, or inside the image with its padding, where the window starts at 0
    counted = (
        x.new_zeros([size + 2 * pad for size, pad in zip(x.shape[-2:], pads, strict=True)])
        if count_include_pad
        else x[0, 0]
    )
    pixels = sum(
        inside.to(x.dtype) for *_, inside in _taps(counted, *geometry, (0, 0) if count_include_pad else pads, (1, 1))
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
