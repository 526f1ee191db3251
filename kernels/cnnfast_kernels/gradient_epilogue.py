"""What happens to the sums of a gradient of an image before they are stored, as @triton.jit helpers.

With dz such a sum, and u the argument of the activation whose result the image is:

    g = (dz + residual) * act'(u)

which is the gradient of what stands below the activation. u follows from y, the raw result of the convolution below, as
u = (y - mean) * gamma / sqrt(var + eps) + beta, to the bits that epilogue.finish made of it. Or act'(u) follows from z,
the activation's result, or from words, one bit of which says of each element whether z > 0. A kernel may also leave, of
its tile, the sums over pixels of g and of g * (y - mean), from which the gradients of beta and gamma follow.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl

from .activations import ACTIVATIONS, FROM_OUTPUT, activate_backward
from .epilogue import NO_NORM, BatchNorm, Finish, finish_of
from .layout import Layout, layout_of

WORD = 32  # pixels whose bits are in one word
# Activations whose derivative follows from z > 0.
FROM_SIGN = ("relu", "leaky_relu")


class GradientLayouts(NamedTuple):
    """How the images lie that a gradient's epilogue reads; None for what is absent."""

    residual: Layout | None = None
    y: Layout | None = None
    z: Layout | None = None


NOTHING_BELOW = GradientLayouts()


class GradientEpilogue(NamedTuple):
    """What a kernel makes of the gradient dz of an image [N, C, H, W]: (dz + residual) * act'(u).

    residual, y, z: of the image's shape and dtype, in any layout. words [ceil(N * H * W / 32), C], int32 and
    contiguous: bit i of a row says of pixel m = (n * H + h) * W + w, which is pixel i of that row's 32, whether z > 0.
    norm: how u follows from y, its vectors [C]. Of words, z and y the first that is given tells act'(u); beside words
    or z, y is there for the sums alone. slope: leaky_relu's.
    """

    residual: torch.Tensor | None = None
    y: torch.Tensor | None = None
    z: torch.Tensor | None = None
    words: torch.Tensor | None = None
    norm: BatchNorm = NO_NORM
    activation: str | None = None
    slope: float = 0.0

    @property
    def layouts(self) -> GradientLayouts:
        residual, y, z = (None if t is None else layout_of(t) for t in (self.residual, self.y, self.z))
        return GradientLayouts(residual, y, z)

    def compiled(self, dtype: torch.dtype) -> Finish:
        """What of it a kernel for tensors of `dtype` is compiled for."""
        return finish_of(dtype, self.norm.eps, self.activation, self.slope)


NO_EPILOGUE = GradientEpilogue()


def check_gradient_epilogue(
    e: GradientEpilogue, shape: Sequence[int], dtype: torch.dtype, sums: bool, name: str = "epilogue"
) -> None:
    """Raises ValueError where an epilogue does not fit a gradient of this shape [N, C, H, W] and dtype. sums: whether
    sums are asked for.
    """
    N, C, H, W = shape
    for field in ("residual", "y", "z"):
        t = getattr(e, field)
        if t is not None and (t.shape != (N, C, H, W) or t.dtype != dtype):
            raise ValueError(
                f"{name}.{field} must have the gradient's shape {(N, C, H, W)} and dtype {dtype}, but has "
                f"{tuple(t.shape)} and {t.dtype}"
            )
    if (words := e.words) is not None:
        rows = -(-N * H * W // WORD)
        if words.shape != (rows, C) or words.dtype != torch.int32 or not words.is_contiguous():
            raise ValueError(
                f"{name}.words must be a contiguous tensor {(rows, C)} of int32, a row for 32 pixels, but is "
                f"{tuple(words.shape)} of {words.dtype} with strides {words.stride()}"
            )
    for field in ("mean", "var", "gamma", "beta"):
        t = getattr(e.norm, field)
        if t is not None and t.shape != (C,):
            raise ValueError(f"{name}.norm.{field} must have a value a channel, {(C,)}, but has shape {tuple(t.shape)}")
    given = [t is not None for t in e.norm[:4]]
    if given[0] != given[1] or (any(given) and not given[0]):
        raise ValueError(f"{name}.norm must have both mean and var, or no vector at all")
    if e.activation not in ACTIVATIONS or e.activation == "prelu":
        known = ", ".join(repr(a) for a in ACTIVATIONS if a != "prelu")
        raise ValueError(f"{name}.activation={e.activation!r} has no gradient here: use one of {known}")
    positive = e.activation != "leaky_relu" or e.slope > 0
    if e.activation is None:
        source, unused = True, e.words is not None or e.z is not None
    elif e.words is not None:
        source, unused = e.activation in FROM_SIGN and positive, e.z is not None
    elif e.z is not None:
        source, unused = e.activation in FROM_OUTPUT and positive, False
    else:
        source, unused = e.y is not None, False
    if not source:
        raise ValueError(
            f"{name}.activation={e.activation!r} with slope={e.slope} needs y to tell its derivative: z tells that of "
            "relu, relu6 and leaky_relu of a positive slope, words that of relu and such a leaky_relu"
        )
    of_sums = e.words is not None or e.z is not None or e.activation is None
    if unused or (of_sums and e.y is not None and not sums) or (any(given) and e.y is None):
        raise ValueError(
            f"{name} has a tensor that nothing follows from: z beside words, z or words without an activation, norm "
            "without y, or y where another tensor tells the derivative and no sums are asked for"
        )


# ----------------------------------------------------------------------------------------------------------------------
# Inside kernels


class BitWords(NamedTuple):
    """Inside a kernel, where the bits of a tile lie: of pixels `pixel` [rows], which are numbered through all images,
    and channels `column` of C in all, as far as they exist. source: of words, or None.

    first: the first pixel; pixels: how many there are. TOGETHER: whether the pixels are those from `first` on, a
    multiple of 32, so that 32 rows share a word.
    """

    source: tl.tensor
    pixel: tl.tensor
    row_ok: tl.tensor
    column: tl.tensor
    column_ok: tl.tensor
    C: tl.tensor
    first: tl.tensor
    pixels: tl.tensor
    TOGETHER: tl.constexpr


class Below(NamedTuple):
    """Inside a kernel, what a gradient's epilogue reads of a tile. residual, y and z are what LOAD of `finish_gradient`
    takes, with a `source` that is None where the tensor is absent; words: BitWords.
    """

    residual: tuple
    y: tuple
    z: tuple
    words: BitWords


@triton.jit
@no_type_check
def take_half(sums, HALF: tl.constexpr):
    """The first half of the columns of sums [rows, columns], number 0, or the second."""
    return tl.split(sums.reshape(sums.shape[0], 2, sums.shape[1] // 2).permute(0, 2, 1))[HALF]


@triton.jit
@no_type_check
def take_columns(sums, PIECE: tl.constexpr, PIECES: tl.constexpr):
    """Piece number PIECE of sums [rows, columns], whose columns are cut into PIECES: 1, 2, 4 or 8."""
    tl.static_assert(PIECES == 1 or PIECES == 2 or PIECES == 4 or PIECES == 8)
    if PIECES == 1:
        return sums
    elif PIECES == 2:
        return take_half(sums, PIECE)
    elif PIECES == 4:
        return take_half(take_half(sums, PIECE // 2), PIECE % 2)
    else:
        return take_half(take_half(take_half(sums, PIECE // 4), PIECE // 2 % 2), PIECE % 2)


@triton.jit
@no_type_check
def load_bits(words):
    """Whether the bit of each element is set: [rows, columns] of BitWords."""
    TOGETHER: tl.constexpr = words.TOGETHER
    if TOGETHER:
        ROWS: tl.constexpr = words.pixel.shape[0]
        i = words.first // 32 + tl.arange(0, ROWS // 32)
        exist = (i < tl.cdiv(words.pixels, 32))[:, None] & words.column_ok[None, :]
        pointers = words.source + (i.to(tl.int64) * words.C)[:, None] + words.column[None, :]
        loaded = tl.load(pointers, mask=exist, other=0)
        bits = loaded[:, None, :] >> tl.arange(0, 32)[None, :, None]
        return (bits.reshape(ROWS, words.column.shape[0]) & 1) != 0
    else:
        exist = words.row_ok[:, None] & words.column_ok[None, :]
        rows = (words.pixel // 32).to(tl.int64) * words.C
        loaded = tl.load(words.source + rows[:, None] + words.column[None, :], mask=exist, other=0)
        return ((loaded >> (words.pixel % 32)[:, None]) & 1) != 0


@triton.jit
@no_type_check
def finish_gradient(dz, below, channels, pointers, e: tl.constexpr, LOAD: tl.constexpr):
    """(g, y - mean) of dz [rows, columns], in the accumulator's dtype. Without y nobody needs the second, and dz stands
    in its place.

    channels: what epilogue.load_channels(pointers, ...) returned. LOAD(t) loads a tile of a tensor of `below`: here and
    no sooner, because a tile that waits in registers takes them from the main loop.
    """
    ACC: tl.constexpr = tl.float64 if e.double else tl.float32
    ACTIVATION: tl.constexpr = e.activation
    if below.residual.source is not None:
        dz = dz + LOAD(below.residual).to(ACC)
    centred = dz
    if below.y.source is not None:
        y = LOAD(below.y)
        centred = y.to(ACC)
        if pointers.mean is not None:
            centred = centred - channels[0][None, :]
    if ACTIVATION is not None:
        slope = tl.full((), e.slope, ACC)
        if below.words.source is not None:
            positive = load_bits(below.words)
            dz = tl.where(positive, dz, dz * slope if ACTIVATION == "leaky_relu" else 0.0)
        elif below.z.source is not None:
            dz = activate_backward(dz, LOAD(below.z).to(ACC), slope, ACTIVATION)
        else:
            u = centred
            if pointers.mean is not None:
                u = u * channels[1][None, :]
            if pointers.beta is not None:
                u = u + channels[2][None, :]
            dz = activate_backward(dz, u, slope, ACTIVATION, y.dtype)
    return dz, centred


@triton.jit
@no_type_check
def sum_existing(g, row_ok):
    """g [rows, columns] with zeros in rows that do not exist, and its sums over rows [columns]."""
    g = tl.where(row_ok[:, None], g, 0.0)
    return g, tl.sum(g, 0)


@triton.jit
@no_type_check
def store_sums(slots_ptr, tile, sum_g, sum_gy, column, column_ok, C, TWO: tl.constexpr):
    """A tile's slot in slots [tiles, 2 if TWO else 1, C]."""
    slot = slots_ptr + tile.to(tl.int64) * (2 if TWO else 1) * C + column
    tl.store(slot, sum_g, mask=column_ok)
    if TWO:
        tl.store(slot + C, sum_gy, mask=column_ok)
