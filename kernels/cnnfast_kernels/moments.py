"""The second stage of sums over rows: what each tile of rows left, [T, quantities, C], is combined into [C].

A tile leaves its moments, mean and biased variance, or slots: addends of a gradient's sums, one quantity or two.
Groups of entries become one entry, level by level, until one is left: no channel waits for one program to walk through
all of its entries, and the order depends on shapes alone, so that the same inputs give the same bits.
"""

from __future__ import annotations

from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl

from . import launch, memory
from .dtypes import KERNEL_DTYPES, accumulator_dtype
from .layout import Layout, dense
from .planes import Planes, PlaneTile
from .rounding import round_quotient, round_root
from .tiling import cdiv


class TileRows(NamedTuple):
    """Which elements the moments of tiles stand for.

    `planes` planes of L rows and `columns` columns are cut into tiles of DEPTH planes, ROWS rows and WIDTH columns, of
    which the last along each axis may be smaller. Tiles are numbered along the columns first, then along the rows, of
    which a plane has tiles_l tiles, then along the planes, whose number matters only where DEPTH is not 1. One entry
    stands for `group` neighbouring tiles of `tiles` in all; 0 tiles: as many as there are entries.
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


NO_ROWS = TileRows(1, 0, 0)  # of slots, which stand for no number of elements


def moments_of(planes: Planes, dtype: torch.dtype) -> tuple[Layout, TileRows]:
    """The layout of the moments that a pass leaves of its tiles of a tensor of this dtype, and what they stand for."""
    rows = TileRows(max(1, planes.tiles_l), planes.L, planes.tile.BLOCK_L)
    return dense((planes.tiles, 2, planes.C), accumulator_dtype(dtype)), rows


class CombineOperands(NamedTuple):
    """entries [T, quantities, C] and what they are combined into: first and, of two quantities, second, each a vector
    [C] or one for each group of entries. var [C]: see `combine_slots`.
    """

    entries: torch.Tensor
    var: torch.Tensor | None
    first: torch.Tensor
    second: torch.Tensor | None


@triton.jit
@no_type_check
def rows_before(tile, rows):
    """Elements of the first `tile` tiles, or of all, if there are fewer; rows: TileRows."""
    tile = tl.minimum(tile, rows.tiles).to(tl.int32)
    tiles_c = tl.cdiv(rows.columns, rows.WIDTH)
    plane = tile // tiles_c // rows.tiles_l * rows.DEPTH
    row = tile // tiles_c % rows.tiles_l * rows.ROWS
    depth = tl.minimum(rows.DEPTH, rows.planes - plane)
    height = tl.minimum(rows.ROWS, rows.L - row)
    in_plane = tl.minimum(row, rows.L).to(tl.int64) * rows.columns
    in_plane += height.to(tl.int64) * (tile % tiles_c * rows.WIDTH)
    return tl.minimum(plane, rows.planes).to(tl.int64) * rows.L * rows.columns + depth * in_plane


@triton.jit
@no_type_check
def merge_moments(first, variance_ptr, count, origin, mask):
    """Mean and biased variance [BLOCK_C] of all elements together, by Chan's formula, where entry t stands for count[t]
    of them: of its means, first [BLOCK_T, BLOCK_C], and of its variances, which lie at variance_ptr and are loaded when
    the means need no registers any more. `mask` says which there are.

    Means are taken relative to `origin` [BLOCK_C], one of them: a large common mean costs no digits. They are halved,
    so that the difference of two means does not overflow.
    """
    share = round_quotient(count, tl.sum(count, 0))[:, None]
    origin = tl.where(tl.abs(origin) < float("inf"), origin * 0.5, 0.0)
    shifted = tl.where(mask, first * 0.5 - origin[None, :], 0.0)
    shift = tl.sum(shifted * share, 0)
    deviation = tl.where(mask, shifted - shift[None, :], 0.0) * 2.0  # its square may overflow
    variance = tl.load(variance_ptr, mask=mask, other=0.0) + deviation * deviation
    return (origin + shift) * 2.0, tl.sum(variance * share, 0)


@triton.jit(do_not_specialize=["T", *TileRows._fields])
@no_type_check
def combine_kernel(
    entries_ptr, var_ptr, first_ptr, second_ptr,
    T, tiles_l, L, ROWS, columns, group, tiles, WIDTH, planes, DEPTH,
    C: tl.constexpr, QUANTITIES: tl.constexpr, MOMENTS: tl.constexpr, EPS: tl.constexpr, CENTRED: tl.constexpr,
    ACC: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """BLOCK_T of T entries into one: sums, or MOMENTS, where entry t stands for tiles [t, t + 1) * group.

    Where `var_ptr` is given, the second sum of a channel becomes 1 / sqrt(var + EPS) times as large: of every channel
    if it is CENTRED, else of those where that is infinite.
    """
    TILES_C: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    out = tl.program_id(0) // TILES_C
    t = out * BLOCK_T + tl.arange(0, BLOCK_T)
    c = tl.program_id(0) % TILES_C * BLOCK_C + tl.arange(0, BLOCK_C)
    c_ok = c < C
    mask = (t < T)[:, None] & c_ok[None, :]
    stride: tl.constexpr = QUANTITIES * C
    entries = entries_ptr + (t.to(tl.int64) * stride)[:, None] + c[None, :]
    at = out.to(tl.int64) * stride + c
    first = tl.load(entries, mask=mask, other=0.0)  # [BLOCK_T, BLOCK_C]
    if MOMENTS:
        rows = TileRows(tiles_l, L, ROWS, columns, group, tiles, WIDTH, planes, DEPTH)
        begin = t.to(tl.int64) * group
        count = (rows_before(begin + group, rows) - rows_before(begin, rows)).to(ACC)
        origin_ptr = entries_ptr + (out * BLOCK_T).to(tl.int64) * stride + c
        origin = tl.load(origin_ptr, mask=c < C * tl.minimum(T, 1), other=0.0)
        mean, variance = merge_moments(first, entries + C, count, origin, mask)
        tl.store(first_ptr + at, mean, mask=c_ok)
        tl.store(second_ptr + at, variance, mask=c_ok)
    else:
        tl.store(first_ptr + at, tl.sum(first, 0), mask=c_ok)
        if QUANTITIES == 2:
            second = tl.sum(tl.load(entries + C, mask=mask, other=0.0), 0)
            if var_ptr is not None:
                var = tl.load(var_ptr + c, mask=c_ok, other=1.0).to(ACC) + EPS
                if CENTRED:
                    second = second * round_quotient(1.0, round_root(var))
                else:
                    second = second * tl.where(var == 0.0, float("inf"), 1.0)
            tl.store(second_ptr + at, second, mask=c_ok)


@launch.planned
def plan_combine(
    T: int, quantities: int, C: int, dtype: torch.dtype, rows: TileRows | None, eps: float = 0.0, centred: bool = False
) -> list[tuple[launch.Launch[CombineOperands], Layout]]:
    """The launch of each level, and the layout of what it leaves: at last that of a vector [C]. rows: those of moments;
    None for slots.
    """
    BLOCK_C = min(32 if dtype == torch.float32 else 16, triton.next_power_of_2(C))
    tile = PlaneTile(128, BLOCK_C, 8)
    levels: list[tuple[launch.Launch[CombineOperands], Layout]] = []
    cut = rows or NO_ROWS
    cut = cut._replace(tiles=cut.tiles or T)
    groups = 0
    while groups != 1:
        groups = max(1, cdiv(T, tile.BLOCK_L))
        level = launch.Launch(
            combine_kernel, (groups * cdiv(C, BLOCK_C),), T, *cut,
            tile=tile, C=C, QUANTITIES=quantities, MOMENTS=rows is not None, EPS=eps, CENTRED=centred,
            ACC=KERNEL_DTYPES[dtype], BLOCK_T=tile.BLOCK_L, BLOCK_C=BLOCK_C, num_warps=tile.num_warps,
        )  # fmt: skip
        levels.append((level, dense((C,) if groups == 1 else (groups, quantities, C), dtype)))
        T, cut = groups, cut._replace(group=cut.group * tile.BLOCK_L)
    return levels


def combine(moments: torch.Tensor, rows: TileRows) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and biased variance [C] from the moments [T, 2, C] of tiles that stand for these rows."""
    mean, var = _combined(moments, rows)
    assert var is not None
    return mean, var


def combine_slots(
    slots: torch.Tensor,
    var: torch.Tensor | None = None,
    eps: float = 0.0,
    out: torch.Tensor | None = None,
    centred: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The sums [C] of slots [T, 1 or 2, C], one a quantity. They are written into `out` [2, C], if it is given.

    var [C], contiguous: the second sums are multiplied by 1 / sqrt(var + eps), which makes sums of g * xhat of those of
    g * (y - mean): all of them if they are `centred`, else those for which that is infinite.
    """
    return _combined(slots, None, var, eps, out, centred)


def _combined(
    entries: torch.Tensor,
    rows: TileRows | None,
    var: torch.Tensor | None = None,
    eps: float = 0.0,
    out: torch.Tensor | None = None,
    centred: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    T, quantities, C = entries.shape
    *levels, (last, vector) = plan_combine(T, quantities, C, entries.dtype, rows, eps, centred)
    for level, layout in levels:
        combined = memory.empty(layout, entries)
        level(CombineOperands(entries, None, combined[:, 0], combined[:, 1] if quantities == 2 else None))
        entries = combined
    if out is not None:
        first, second = out[0], out[1]
    else:
        first, second = memory.empty(vector, entries), memory.empty(vector, entries) if quantities == 2 else None
    last(CombineOperands(entries, var, first, second))
    return first, second
