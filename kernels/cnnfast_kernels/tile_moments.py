"""The first stage of a batch's statistics: mean and variance of one tile of rows, as @triton.jit helpers.

moments.py combines those of all tiles. Most tiles have all of their rows: each program tells that by a comparison, and
then makes no mask.
"""

from __future__ import annotations

from typing import NamedTuple, no_type_check

import triton
import triton.language as tl

from .rounding import divide_again, round_quotient


class FirstRows(NamedTuple):
    """Inside a kernel, which rows of a tile exist: the first `extent`. whole: whether those are all rows."""

    whole: tl.tensor
    extent: tl.tensor


@triton.jit
@no_type_check
def masks_of_first(rows, BLOCK: tl.constexpr):
    """Which of BLOCK rows exist by FirstRows: one mask, for a tile of one part."""
    return (tl.arange(0, BLOCK) < rows.extent,)


@triton.jit
@no_type_check
def store_moments(moments_ptr, tile, parts, rows, column, column_ok, K, MASKS: tl.constexpr):
    """Mean and biased variance of each column of a tile, to moments [tiles, 2, K]; see `tile_moments`."""
    mean, variance = tile_moments(parts, rows, MASKS)
    row = moments_ptr + tile.to(tl.int64) * 2 * K + column
    tl.store(row, mean, mask=column_ok)
    tl.store(row + K, variance, mask=column_ok)


@triton.jit
@no_type_check
def count_rows(parts, rows, MASKS: tl.constexpr):
    """How many rows of all parts exist."""
    BLOCK: tl.constexpr = parts[0].shape[0]
    count = tl.full((), len(parts) * BLOCK, tl.int32)
    if not rows.whole:
        exist = MASKS(rows, BLOCK)
        existing = exist[0].to(tl.int32)
        for i in tl.static_range(1, len(parts)):
            existing += exist[i].to(tl.int32)
        count = tl.sum(existing, 0)
    return count


@triton.jit
@no_type_check
def mask_rows(parts, rows, MASKS: tl.constexpr):
    """The parts, with zeros for the rows that do not exist."""
    if not rows.whole:
        exist = MASKS(rows, parts[0].shape[0])
        masked = ()
        for i in tl.static_range(len(parts)):
            masked = masked + (tl.where(exist[i][:, None], parts[i], 0.0),)
        parts = masked
    return parts


@triton.jit
@no_type_check
def subtract(parts, mean, rows, MASKS: tl.constexpr):
    """Deviations of the rows that exist from a number of each column, and zeros for the others."""
    return mask_rows([part - mean[None, :] for part in parts], rows, MASKS)


@triton.jit
@no_type_check
def sum_rows(parts):
    """The sum of each column over the rows of all parts."""
    total = parts[0]
    for i in tl.static_range(1, len(parts)):
        total += parts[i]
    return tl.sum(total, 0)


@triton.jit
@no_type_check
def tile_moments(parts, rows, MASKS: tl.constexpr):
    """Mean and biased variance of each column of a tile, over the rows that exist: float64 of float64, else float32.

    The tile is a tuple of parts [BLOCK_M, BLOCK_N], as they are stored: batch norm normalises exactly what backward
    will read. Unless rows.whole, MASKS(rows, BLOCK_M) tells which rows of each part exist, a tuple of masks [BLOCK_M].
    To make them where they are used, and not before, keeps them out of the registers of whole tiles.

    A first mean is off by its sum's rounding, which is many deviations wide where |mean| >> std. So deviations d from
    it are taken, and the two passes are corrected by the mean of d: they give mean + sum(d) / n and
    (sum(d^2) - sum(d)^2 / n) / n (Chan, Golub and LeVeque, 1983, "Algorithms for computing the sample variance"). In
    half precision the first mean is rounded to the dtype of the rows: where they are nearly alike, deviations from it
    are small multiples of one number, and their sums exact. So rows that are alike have a variance of 0, and none has
    less. In float32 and float64 the rounding of the largest numbers' first mean would overflow when it is squared:
    there sum(d) / n is subtracted from each d before.

    A sum of the largest numbers would overflow where their mean does not: each counts by a share that is a power of
    two, which rounds nothing but the smallest, and the mean of d makes up for these.
    """
    DTYPE: tl.constexpr = parts[0].dtype
    ACC: tl.constexpr = tl.float64 if DTYPE == tl.float64 else tl.float32
    MOST_ROWS: tl.constexpr = 4096.0  # that a tile has
    SHARE: tl.constexpr = 1.0 / 4096.0

    count = count_rows(parts, rows, MASKS).to(ACC)
    inverse = round_quotient(1.0, count)
    parts = [part.to(ACC) for part in mask_rows(parts, rows, MASKS)]
    mean = sum_rows([part * SHARE for part in parts]) * (inverse * MOST_ROWS)
    mean = mean.to(DTYPE).to(ACC)
    parts = subtract(parts, mean, rows, MASKS)
    total = sum_rows(parts)
    lack = divide_again(total, count, inverse)
    # deviations of the largest numbers overflow, and so do those of infinity
    lack = tl.where(tl.abs(lack) < float("inf"), lack, 0.0)
    if DTYPE.primitive_bitwidth > 16:
        parts = subtract(parts, lack, rows, MASKS)
    squares = sum_rows([part * part for part in parts])
    if DTYPE.primitive_bitwidth == 16:
        squares = tl.where(squares < float("inf"), squares - lack * total, squares)
    return mean + lack, squares * inverse
