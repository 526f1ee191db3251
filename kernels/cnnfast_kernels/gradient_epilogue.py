"""What happens to the sums of a gradient of an image before they are stored, as @triton.jit helpers.

With dz such a sum, and u the argument of the activation whose result the image is:

    g = (dz + residual) * act'(u)

which is the gradient of what stands below the activation. u follows from y, the raw result of the convolution below, as
u = (y - mean) * gamma / sqrt(var + eps) + beta, to the bits that epilogue.finish made of it. Or act'(u) follows from z,
the activation's result, or from words, one bit of which says of each element whether not z <= 0 (words.py). A kernel
may also leave, of its tile, the sums over pixels of g and of g * (y - mean), from which the gradients of beta and gamma
follow.
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
from .words import BitWords, check_words, mask_gradient, tells_derivative


class GradientLayouts(NamedTuple):
    """How the images lie that a gradient's epilogue reads; None for what is absent."""

    residual: Layout | None = None
    y: Layout | None = None
    z: Layout | None = None


NOTHING_BELOW = GradientLayouts()


class GradientEpilogue(NamedTuple):
    """What a kernel makes of the gradient dz of an image [N, C, H, W]: (dz + residual) * act'(u).

    residual, y, z: of the image's shape and dtype, in any layout. words [ceil(N * H * W / 32), C], int32 and
    contiguous: bit i of a row says of pixel m = (n * H + h) * W + w, which is pixel i of that row's 32, whether not
    z <= 0 (words.py). norm: how u follows from y, its vectors [C]. Of words, z and y the first that is given tells
    act'(u); beside words or z, y is there for the sums alone. slope: leaky_relu's.
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
    if e.words is not None:
        check_words(e.words, shape, f"{name}.words")
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
        source, unused = tells_derivative(e.activation, e.slope), e.z is not None
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
            dz = mask_gradient(dz, below.words, slope, ACTIVATION)
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
