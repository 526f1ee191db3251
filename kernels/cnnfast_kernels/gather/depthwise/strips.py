"""What the depthwise kernels share: how strips are counted, and the products of one column of a filter."""

from __future__ import annotations

from typing import NamedTuple, no_type_check

import triton
import triton.language as tl

from ...indexing import divide


class StripBlock(NamedTuple):
    """What a kernel is compiled for of its tile, its constexpr argument `block`: BLOCK_M strips of ROWS pixels and
    BLOCK_C channels, and how much of the filter is taken at once: TAPS taps of a column, and in wgrad COLUMNS columns.
    """

    BLOCK_M: int
    BLOCK_C: int
    ROWS: int
    TAPS: int
    COLUMNS: int = 1


class Strips(NamedTuple):
    """Inside a kernel, all strips there are: in each of N images `columns` columns, `per_column` strips in each.

    By a magic number and a shift `divide` divides by the number that stands before them.
    """

    N: tl.tensor
    per_column: tl.tensor
    per_column_magic: tl.tensor
    per_column_shift: tl.tensor
    columns: tl.tensor
    columns_magic: tl.tensor
    columns_shift: tl.tensor


class StripRows(NamedTuple):
    """Inside a kernel, the rows of an image that strips load one after the other.

    `pointers` [BLOCK_M, BLOCK_C] point at row `first` [BLOCK_M] of an image that has `extent` rows, `stride` elements
    apart.
    """

    pointers: tl.tensor
    first: tl.tensor
    extent: tl.tensor
    stride: tl.tensor


class StripPixels(NamedTuple):
    """Inside a kernel, which pixels exist of strips of ROWS: pixel t of a strip lies in row first [BLOCK_M] + t of an
    image of `extent` rows, if there is such a strip, ok [BLOCK_M]. whole: whether all pixels exist.
    """

    whole: tl.tensor
    ok: tl.tensor
    first: tl.tensor
    extent: tl.tensor
    ROWS: int


@triton.jit
@no_type_check
def masks_of_strips(pixels, BLOCK_M: tl.constexpr):
    """Which of the pixels of BLOCK_M strips exist by StripPixels: a mask for each of a strip's pixels."""
    exist = ()
    for t in tl.static_range(pixels.ROWS):
        exist = exist + (pixels.ok & (pixels.first + t < pixels.extent),)
    return exist


@triton.jit
@no_type_check
def locate_strips(tile, strips, BLOCK_M: tl.constexpr):
    """The strips of a tile, [BLOCK_M] each: image n, strip i of column j of it, and whether it exists. j varies
    fastest, then i.
    """
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    t = divide(m, strips.columns_magic, strips.columns_shift)
    n = divide(t, strips.per_column_magic, strips.per_column_shift)
    return n, t - n * strips.per_column, m - t * strips.columns, n < strips.N


@triton.jit
@no_type_check
def in_range(i, extent):
    """0 <= i < extent in one comparison."""
    return i.to(tl.uint32, bitcast=True) < extent.to(tl.uint32)


@triton.jit
@no_type_check
def mask_row(row, ok):
    """`row` where ok; elsewhere one so far above every image that loads of it, and of rows near it, return zeros."""
    FAR: tl.constexpr = -(1 << 30)
    return tl.where(ok, row, FAR)


@triton.jit
@no_type_check
def load_row(pointers, row, extent, channels_ok, ACC: tl.constexpr):
    """What `pointers` [BLOCK_M, BLOCK_C] point at, in the accumulator's dtype: zero where `row` [BLOCK_M] is outside an
    image of `extent` rows.

    channels_ok [BLOCK_C]: which channels exist, or None where all do.
    """
    mask = in_range(row, extent)[:, None]
    if channels_ok is not None:
        mask = mask & channels_ok[None, :]
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
    acc, rows, w_taps, tap_stride, channels_ok,
    TAPS: tl.constexpr, PIXEL_STEP: tl.constexpr, TAP_STEP: tl.constexpr, UNIT: tl.constexpr,
    MISSES: tl.constexpr = False,
):  # fmt: skip
    """Adds the products of one column of the filter to `acc`, which has one accumulator for each pixel of a strip.

    Pixel i and tap t of TAPS meet in row (i * PIXEL_STEP + t * TAP_STEP) / UNIT of the StripRows where that is a whole
    number. fprop: the steps are stride and dilation, UNIT is 1; dgrad: 1 and minus the dilation, UNIT is the stride.
    `w_taps` [BLOCK_M, BLOCK_C] point at the first tap. channels_ok: see `load_row`. MISSES: what lies outside the image
    is not a zero, but nothing at all: no weight is multiplied by it, for that may be infinite.
    """
    ROWS: tl.constexpr = len(acc)
    ACC: tl.constexpr = acc[0].dtype
    w = ()
    for t in tl.static_range(TAPS):
        mask = None if channels_ok is None else channels_ok[None, :]
        tap = tl.load(w_taps + t * tap_stride, mask=mask, other=None if channels_ok is None else 0.0)
        w = w + (tap.to(ACC),)
    FIRST: tl.constexpr = 0 if TAP_STEP > 0 else -((TAPS - 1) * -TAP_STEP // UNIT)
    LAST: tl.constexpr = ((ROWS - 1) * PIXEL_STEP + (TAPS - 1) * (TAP_STEP if TAP_STEP > 0 else 0)) // UNIT
    for j in tl.static_range(FIRST, LAST + 1):  # the compiler drops the load of a row in which nothing meets
        x = load_row(rows.pointers + j * rows.stride, rows.first + j, rows.extent, channels_ok, ACC)
        reached = in_range(rows.first + j, rows.extent)[:, None] if MISSES else None
        for i in tl.static_range(ROWS):
            for t in tl.static_range(TAPS):
                if i * PIXEL_STEP + t * TAP_STEP == j * UNIT:
                    acc = add_product(acc, i, x, w[t], reached)
    return acc
