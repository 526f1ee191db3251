"""What happens to an accumulator before it is stored, as @triton.jit helpers."""

from __future__ import annotations

from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl

from .activations import activate
from .indexing import channel_offset, pixel_offset
from .layout import Strides
from .rounding import round_quotient, round_root


class BatchNorm(NamedTuple):
    """Batch normalisation with given statistics: (y - mean) * gamma / sqrt(var + eps) + beta, each of shape [K]."""

    mean: torch.Tensor | None
    var: torch.Tensor | None
    gamma: torch.Tensor | None
    beta: torch.Tensor | None
    eps: float = 1e-5


NO_NORM = BatchNorm(None, None, None, None, 0.0)


class Epilogue(NamedTuple):
    """What a convolution's kernel makes of its sums: act(batch_norm(sum + bias) + residual). residual is of the
    output's size. Without a norm it is act(sum + bias + residual).
    """

    bias: torch.Tensor | None = None
    norm: BatchNorm = NO_NORM
    residual: torch.Tensor | None = None
    activation: str | None = None
    slope: float = 0.0  # leaky_relu's
    slopes: torch.Tensor | None = None  # prelu's: [1], for all channels, or [K]

    def compiled(self, dtype: torch.dtype) -> Finish:
        """What of it a kernel for tensors of `dtype` is compiled for."""
        one_slope = self.slopes is not None and self.slopes.numel() == 1
        return finish_of(dtype, self.norm.eps, self.activation, self.slope, one_slope)


PLAIN = Epilogue()


class Finish(NamedTuple):
    """What a kernel is compiled for of its epilogue: batch norm's eps, the activation's name, whether sums are float64,
    leaky_relu's slope, whether prelu has one slope for all channels, and whether a forward kernel leaves words of bits
    beside its result (words.py), and not the moments of its tiles.

    No dtype stands in it: Triton hands constants to whoever hooks into its compiler as JSON, which has none.
    """

    eps: float
    activation: str | None
    double: bool
    slope: float = 0.0
    one_slope: bool = False
    words: bool = False


def finish_of(
    dtype: torch.dtype,
    eps: float = 0.0,
    activation: str | None = None,
    slope: float = 0.0,
    one_slope: bool = False,
) -> Finish:
    """What tensors of `dtype` are finished by. A slope that the activation does not have compiles nothing anew."""
    return Finish(eps, activation, dtype == torch.float64, slope if activation == "leaky_relu" else 0.0, one_slope)


class Channels(NamedTuple):
    """Inside a kernel, the pointers to what an epilogue reads of each channel, [K]: None for what is absent."""

    bias: tl.tensor
    mean: tl.tensor
    var: tl.tensor
    gamma: tl.tensor
    beta: tl.tensor
    slopes: tl.tensor  # prelu's: [1] or [K]


class Residual(NamedTuple):
    """Inside a kernel, where the residual of a tile lies: pixels (n, p, q) and channels `column`, as far as they exist,
    of a tensor of these layout.Strides that begins at `source`, which is None where there is no residual.
    """

    source: tl.tensor
    pixel: tuple
    column: tl.tensor
    row_ok: tl.tensor
    column_ok: tl.tensor
    strides: Strides


@triton.jit
@no_type_check
def load_residual(residual):
    """[rows, columns] of a Residual."""
    n, p, q = residual.pixel
    rows = residual.source + pixel_offset(n, p, q, residual.strides)
    pointers = rows[:, None] + channel_offset(residual.column, residual.strides.c)[None, :]
    return tl.load(pointers, mask=residual.row_ok[:, None] & residual.column_ok[None, :], other=0.0)


@triton.jit
@no_type_check
def load_slopes(slopes_ptr, column, column_ok, e: tl.constexpr):
    """prelu's slopes of some columns."""
    ACC: tl.constexpr = tl.float64 if e.double else tl.float32
    of = tl.zeros_like(column) if e.one_slope else column
    return tl.load(slopes_ptr + of, mask=column_ok, other=0.0).to(ACC)


@triton.jit
@no_type_check
def load_channels(pointers, column, column_ok, e: tl.constexpr):
    """What `finish` needs of some columns: (bias, mean, scale, beta, slopes), of these what there is.

    Not None for what is absent: the interpreter lets a helper return that, the compiler refuses it.
    """
    ACC: tl.constexpr = tl.float64 if e.double else tl.float32
    channels = ()
    if pointers.bias is not None:
        channels = channels + (tl.load(pointers.bias + column, mask=column_ok, other=0.0).to(ACC),)
    if pointers.mean is not None:
        mean = tl.load(pointers.mean + column, mask=column_ok, other=0.0).to(ACC)
        var = tl.load(pointers.var + column, mask=column_ok, other=1.0).to(ACC)
        scale = round_quotient(1.0, round_root(var + e.eps))
        if pointers.gamma is not None:
            scale = scale * tl.load(pointers.gamma + column, mask=column_ok, other=0.0).to(ACC)
        channels = channels + (mean, scale)
        if pointers.beta is not None:
            channels = channels + (tl.load(pointers.beta + column, mask=column_ok, other=0.0).to(ACC),)
    if pointers.slopes is not None:
        channels = channels + (load_slopes(pointers.slopes, column, column_ok, e),)
    return channels


@triton.jit
@no_type_check
def finish(acc, channels, residual, pointers, e: tl.constexpr, LOAD: tl.constexpr):
    """act(batch_norm(acc + bias) + residual) of acc [rows, columns], in the accumulator's dtype.

    channels: what load_channels(pointers, ...) returned. residual: if its `source` is not None, LOAD(residual) loads a
    tile of it; here and no sooner, because a tile that waits in registers takes them from the main loop. The mean is
    subtracted first: y * scale + shift would cancel where |mean| is much larger than the standard deviation.
    """
    ACC: tl.constexpr = tl.float64 if e.double else tl.float32
    NORM: tl.constexpr = 0 if pointers.bias is None else 1  # where the norm's begin
    ACTIVATION: tl.constexpr = e.activation
    if pointers.bias is not None:
        acc = acc + channels[0][None, :]
    if pointers.mean is not None:
        acc = (acc - channels[NORM][None, :]) * channels[NORM + 1][None, :]
        if pointers.beta is not None:
            acc = acc + channels[NORM + 2][None, :]
    if residual.source is not None:
        acc = acc + LOAD(residual).to(ACC)
    if pointers.slopes is not None:
        return activate(acc, channels[len(channels) - 1][None, :], ACTIVATION)
    else:
        return activate(acc, tl.full((), e.slope, ACC), ACTIVATION)
