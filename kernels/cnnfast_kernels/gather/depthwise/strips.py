"""What the depthwise kernels share: strips, and the products of one column of a filter."""

from __future__ import annotations

from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl

from ... import launch
from ...indexing import divide
from ...layout import Laid, Layout, Strides, dense, strides_nhwc
from ...operands import DgradOperands, FpropOperands
from ...tiling import VECTOR_BYTES
from .tiles import StripTile

# A strip whose first row this is has no row in any image: its loads return zero.
FAR = tl.constexpr(-(1 << 30))


@triton.jit
@no_type_check
def locate_strips(
    tile, N, strips, columns, strips_magic, strips_shift, columns_magic, columns_shift, BLOCK_M: tl.constexpr
):
    """Strips of a tile, [BLOCK_M] each: image n, strip i of `strips` in column j of `columns`, and whether it exists. j
    varies fastest.
    """
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    t = divide(m, columns_magic, columns_shift)
    n = divide(t, strips_magic, strips_shift)
    return n, t - n * strips, m - t * columns, n < N


@triton.jit
@no_type_check
def in_range(i, extent):
    """0 <= i < extent in one comparison."""
    return i.to(tl.uint32, bitcast=True) < extent.to(tl.uint32)


@triton.jit
@no_type_check
def load_row(pointers, row, rows, c_ok, EVEN: tl.constexpr, ACC: tl.constexpr):
    """[BLOCK_M, BLOCK_C] in the accumulator's dtype, zero where `row` [BLOCK_M] is outside an image of `rows`. EVEN:
    all channels exist.
    """
    mask = in_range(row, rows)[:, None]
    if not EVEN:
        mask = mask & c_ok[None, :]
    return tl.load(pointers, mask=mask, other=0.0).to(ACC)


@triton.jit
@no_type_check
def zeros(COUNT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr):
    """A tuple of COUNT accumulators."""
    acc = ()
    for _ in tl.static_range(COUNT):
        acc = acc + (tl.zeros((BLOCK_M, BLOCK_C), ACC),)
    return acc


@triton.jit
@no_type_check
def add_product(acc, INDEX: tl.constexpr, a, b, reached=None):
    """The tuple with a * b added to one of its members: where `reached`, or everywhere if that is None."""
    total = acc[INDEX] + a * b
    return acc[:INDEX] + (total if reached is None else tl.where(reached, total, acc[INDEX]),) + acc[INDEX + 1 :]


@triton.jit
@no_type_check
def accumulate_column(
    acc, x_rows, row, rows, row_stride, w_taps, tap_stride, c_ok,
    ROWS: tl.constexpr, TAPS: tl.constexpr, PIXEL_STEP: tl.constexpr, TAP_STEP: tl.constexpr, UNIT: tl.constexpr,
    EVEN: tl.constexpr, ACC: tl.constexpr, MISSES: tl.constexpr = False,
):  # fmt: skip
    """Adds x * w for one column of the filter to acc, one accumulator for each of ROWS pixels of a strip.

    Pixel i meets tap t of TAPS in row `row` + (i * PIXEL_STEP + t * TAP_STEP) / UNIT of x where that is a whole number.
    fprop: the steps are stride and dilation, UNIT is 1; dgrad: 1, minus the dilation, the stride. `x_rows`, at `row`,
    and `w_taps`, at the first tap, point at [BLOCK_M, BLOCK_C] elements. MISSES: x outside the image is no zero, but
    nothing: it is not multiplied by a weight that may be infinite.
    """
    w = ()
    for t in tl.static_range(TAPS):
        w = w + (
            tl.load(w_taps + t * tap_stride, mask=None if EVEN else c_ok[None, :], other=None if EVEN else 0.0).to(ACC),
        )
    FIRST: tl.constexpr = 0 if TAP_STEP > 0 else -((TAPS - 1) * -TAP_STEP // UNIT)
    LAST: tl.constexpr = ((ROWS - 1) * PIXEL_STEP + (TAPS - 1) * (TAP_STEP if TAP_STEP > 0 else 0)) // UNIT
    for j in tl.static_range(FIRST, LAST + 1):  # a row that no pixel meets is not used, hence not loaded
        x = load_row(x_rows + j * row_stride, row + j, rows, c_ok, EVEN, ACC)
        reached = in_range(row + j, rows)[:, None] if MISSES else None
        for i in tl.static_range(ROWS):
            for t in tl.static_range(TAPS):
                if i * PIXEL_STEP + t * TAP_STEP == j * UNIT:
                    acc = add_product(acc, i, x, w[t], reached)
    return acc


def vector_length(*images: Laid) -> int:
    """Adjacent channels that one thread can load at once from each of `images`: 1, 2, 4 or 8; 0 where channels are
    apart.
    """
    length = VECTOR_BYTES // images[0].dtype.itemsize
    for t in images:
        s = strides_nhwc(t)
        if s.c is not None:
            return 0
        length = min(length, s.align)
    return length


def filters_as_channels(w: Laid) -> Layout:
    """Weights [K, 1, R, S] as one image [1, K, R, S]."""
    K, _, R, S = w.shape
    return Layout((1, K, R, S), (0, w.stride(0), w.stride(2), w.stride(3)), w.dtype)


class StripPlan(NamedTuple):
    """Takes (image, w, ...) as `run` does. w, small as it is, is copied taps_major first, unless it lies in memory that
    way.
    """

    run: launch.Launch
    copies: bool

    def __call__(self, operands: FpropOperands | DgradOperands) -> None:
        self.run(operands._replace(w=taps_major(operands.w)) if self.copies else operands)


def taps_major(w: torch.Tensor) -> torch.Tensor:
    """A copy of w [K, 1, R, S] with adjacent filters, so that a thread loads a tap of a vector of them at once."""
    return w.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1)


def filters_layout(w: Laid, tile: StripTile) -> tuple[Strides, bool]:
    """Strides of w [K, 1, R, S] as the kernels take it, with filters as channels, and whether that is a copy,
    taps_major.
    """
    K, _, R, S = w.shape
    copies = tile.BLOCK_C > 1 and w.stride(0) != 1
    layout = dense((1, K, R, S), w.dtype, torch.channels_last) if copies else filters_as_channels(w)
    return strides_nhwc(layout), copies
