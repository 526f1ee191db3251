"""The second stage of sums and moments over rows: partials [T, quantities, C], one a tile of rows, combined into [C].

Groups of partials become one partial, level by level, until one is left: no channel waits for one program to walk
through all of its partials, and the order depends on shapes alone, so that the same inputs give the same bits.
"""

from __future__ import annotations

from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl

from . import launch, memory
from .dtypes import KERNEL_DTYPES
from .layout import Layout, dense
from .planes import PlaneTile
from .rounding import round_quotient
from .tiling import cdiv


@triton.jit
@no_type_check
def rows_before(tile, tiles, tiles_l, L, ROWS, columns, WIDTH, planes, DEPTH):
    """Elements of the first `tile` tiles, at most `tiles`, that are cut as TileRows says."""
    tile = tl.minimum(tile, tiles).to(tl.int32)
    tiles_c = tl.cdiv(columns, WIDTH)
    plane = tile // tiles_c // tiles_l * DEPTH
    row = tile // tiles_c % tiles_l * ROWS
    depth = tl.minimum(DEPTH, planes - plane)
    rows = tl.minimum(ROWS, L - row)
    in_plane = tl.minimum(row, L).to(tl.int64) * columns + rows.to(tl.int64) * (tile % tiles_c * WIDTH)
    return tl.minimum(plane, planes).to(tl.int64) * L * columns + depth * in_plane


@triton.jit(do_not_specialize=["T", "tiles", "group", "tiles_l", "L", "ROWS", "columns", "WIDTH", "planes", "DEPTH"])
@no_type_check
def combine_kernel(
    partials_ptr, var_ptr, first_ptr, second_ptr, T, tiles, group, tiles_l, L, ROWS, columns, WIDTH, planes, DEPTH,
    C: tl.constexpr, QUANTITIES: tl.constexpr, MOMENTS: tl.constexpr, EPS: tl.constexpr, ACC: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """BLOCK_T of T partials into one: sums, or MOMENTS by Chan's formula, where partial t stands for tiles [t, t + 1) *
    group.

    Where `var_ptr` is given, the second sum of a channel whose 1 / sqrt(var + EPS) is infinite becomes that many times
    as large.
    """
    TILES_C: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    out = tl.program_id(0) // TILES_C
    t = out * BLOCK_T + tl.arange(0, BLOCK_T)
    c = tl.program_id(0) % TILES_C * BLOCK_C + tl.arange(0, BLOCK_C)
    c_ok = c < C
    mask = (t < T)[:, None] & c_ok[None, :]
    stride: tl.constexpr = QUANTITIES * C
    rows = partials_ptr + (t.to(tl.int64) * stride)[:, None] + c[None, :]
    at = out.to(tl.int64) * stride + c
    first = tl.load(rows, mask=mask, other=0.0)  # [BLOCK_T, BLOCK_C]
    if MOMENTS:
        begin = t.to(tl.int64) * group
        count = rows_before(begin + group, tiles, tiles_l, L, ROWS, columns, WIDTH, planes, DEPTH)
        count = (count - rows_before(begin, tiles, tiles_l, L, ROWS, columns, WIDTH, planes, DEPTH)).to(ACC)
        weight = round_quotient(count, tl.sum(count, 0))[:, None]
        # Means relative to the first one: a large common mean costs no digits. By halves: no difference of two means
        # overflows.
        origin = tl.load(
            partials_ptr + (out * BLOCK_T).to(tl.int64) * stride + c, mask=c < C * tl.minimum(T, 1), other=0.0
        )
        origin = tl.where(tl.abs(origin) < float("inf"), origin * 0.5, 0.0)
        shifted = tl.where(mask, first * 0.5 - origin[None, :], 0.0)
        shift = tl.sum(shifted * weight, 0)
        deviation = tl.where(mask, shifted - shift[None, :], 0.0) * 2.0  # its square may overflow
        variance = tl.load(rows + C, mask=mask, other=0.0) + deviation * deviation
        tl.store(first_ptr + at, (origin + shift) * 2.0, mask=c_ok)
        tl.store(second_ptr + at, tl.sum(variance * weight, 0), mask=c_ok)
    else:
        tl.store(first_ptr + at, tl.sum(first, 0), mask=c_ok)
        if QUANTITIES == 2:
            second = tl.sum(tl.load(rows + C, mask=mask, other=0.0), 0)
            if var_ptr is not None:
                infinite = tl.load(var_ptr + c, mask=c_ok, other=1.0).to(ACC) + EPS == 0.0
                second = second * tl.where(infinite, float("inf"), 1.0)
            tl.store(second_ptr + at, second, mask=c_ok)


class TileRows(NamedTuple):
    """How many elements the partials stand for: `planes` planes of L rows and `columns` columns are cut into tiles of
    DEPTH planes, ROWS rows and WIDTH columns, tiles_l of them along the rows; the last along each axis are smaller.
    They are counted along columns, then rows, then planes, whose number matters only where DEPTH is not 1; a partial
    stands for `group` of all `tiles` (0: for one).
    """

    tiles_l: int
    L: int
    ROWS: int
    columns: int = 1
    group: int = 1
    tiles: int = 0
    WIDTH: int = 1
    planes: int = 2**31 - 1
    DEPTH: int = 1


@launch.planned
def plan_combine(
    T: int, quantities: int, C: int, dtype: torch.dtype, rows: TileRows | None, eps: float = 0.0
) -> list[tuple[launch.Launch, Layout]]:
    """For each level its launch, which takes (partials, var, first, second), of which `var` and `second` may be None,
    and the layout of what it leaves: at last [C]s.
    """
    BLOCK_C = min(32 if dtype == torch.float32 else 16, triton.next_power_of_2(C))
    tile = PlaneTile(128, BLOCK_C, 8)
    levels = []
    tiles_l, L, ROWS, columns, group, tiles, WIDTH, planes, DEPTH = rows or TileRows(1, 0, 0)
    tiles, groups = tiles or T, 0
    while groups != 1:
        groups = max(1, cdiv(T, tile.BLOCK_L))
        level = launch.Launch(
            combine_kernel, (groups * cdiv(C, BLOCK_C),), T, tiles, group, tiles_l, L, ROWS, columns, WIDTH, planes, DEPTH,
            tile=tile, C=C, QUANTITIES=quantities, MOMENTS=rows is not None, EPS=eps, ACC=KERNEL_DTYPES[dtype],
            BLOCK_T=tile.BLOCK_L, BLOCK_C=BLOCK_C, num_warps=tile.num_warps,
        )  # fmt: skip
        levels.append((level, dense((C,) if groups == 1 else (groups, quantities, C), dtype)))
        T, group = groups, group * tile.BLOCK_L
    return levels


def combine(
    partials: torch.Tensor, rows: TileRows | None = None, var: torch.Tensor | None = None, eps: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Partials [T, quantities, C] into one [C] a quantity: sums, or, where `rows` is given, mean and biased variance of
    partials of those.

    var [C], contiguous: the second sums of channels whose 1 / sqrt(var + eps) is infinite are multiplied by it, all
    others are left.
    """
    T, quantities, C = partials.shape
    *levels, (final, vector) = plan_combine(T, quantities, C, partials.dtype, rows, eps)
    for level, layout in levels:
        combined = memory.empty(layout, partials)
        level((partials, None, combined[:, 0], combined[:, 1] if quantities == 2 else None))
        partials = combined
    first, second = memory.empty(vector, partials), memory.empty(vector, partials) if quantities == 2 else None
    final((partials, var, first, second))
    return first, second
