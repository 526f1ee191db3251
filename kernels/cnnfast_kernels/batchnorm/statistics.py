"""A batch's statistics: mean and biased variance of each channel."""

from __future__ import annotations

from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl

from .. import launch, memory
from ..layout import Layout
from ..moments import TileRows, combine, moments_of
from ..planes import PlaneTensor, common_planes, load_tile, locate_tile, mergeable
from ..tile_moments import FirstRows, masks_of_first, store_moments
from ..tiling import cdiv


class MomentsOperands(NamedTuple):
    """y, and where the moments of its tiles go, [tiles, 2, C]."""

    y: torch.Tensor
    moments: torch.Tensor


@triton.jit(do_not_specialize=["L", *(f"y_stride_{d}" for d in "nlc")])
@no_type_check
def batch_moments_kernel(y_ptr, moments_ptr, L, y_stride_n, y_stride_l, y_stride_c, g: tl.constexpr):
    """Mean and biased variance of one tile: moments [tiles, 2, C]. g: PlaneGeometry."""
    at = locate_tile(L, g)
    y = load_tile(PlaneTensor(y_ptr, y_stride_n, y_stride_l, y_stride_c, g.ALIGN), at, y_ptr.dtype.element_ty)
    rows = FirstRows(at.rows >= g.BLOCK_L, at.rows)
    store_moments(moments_ptr, at.number, (y,), rows, at.c, at.c_ok, g.C, masks_of_first)


@launch.planned
def _plan_moments(
    shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype
) -> tuple[launch.Launch[MomentsOperands], Layout, TileRows]:
    planes = common_planes(shape, (strides,), dtype)
    run = launch.Launch(batch_moments_kernel, planes.grid, planes.units, *planes.strides[0], **planes.constants)
    return run, *moments_of(planes, dtype)


def batch_moments(y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and biased variance [C] over all other axes of y [N, C, *spatial]; float32, or float64 for float64. NaN if
    there are no rows.
    """
    y = mergeable(y)
    run, layout, rows = _plan_moments(y.shape, y.stride(), y.dtype)
    moments = memory.empty(layout, y)
    run(MomentsOperands(y, moments))
    return combine(moments, rows)


def combine_moments(moments: torch.Tensor, rows_per_tile: int, total_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and biased variance [C] from those of tiles, [T, 2, C], float32 or float64.

    Tile t stands for rows [t, t + 1) * rows_per_tile of `total_rows`; the last one may be shorter.
    """
    if moments.shape[0] != cdiv(total_rows, rows_per_tile):
        raise ValueError(f"{moments.shape[0]} tiles of {rows_per_tile} rows do not make {total_rows} rows")
    return combine(moments, TileRows(max(1, moments.shape[0]), total_rows, rows_per_tile))
