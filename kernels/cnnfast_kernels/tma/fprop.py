"""Convolution forward as an implicit GEMM whose operands all come by tensor maps.

    y[n, p, q, k] = sum over r, s, c of x[n, p * stride_h - pad_h + r * dil_h, q * stride_w - pad_w + s * dil_w, c] * w[k, r, s, c]

One tap of the filter sees a box of output pixels as a box of input pixels, shifted: the patches need neither addresses
nor masks, and padding is what lies outside the tensor. The GEMM is swapped, accumulator [filters, pixels] = w [filters,
C] times the transposed box [pixels, C]: as the second operand the matrix unit reads the box in shared memory as the
copy engine left it. Taps that reach only into the padding are skipped. 1x1 convolutions are plain GEMMs, see
`views.flattened`.

Written for sm_90 and later. Not yet run on a GPU.
"""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl

from .. import launch
from ..epilogue import PLAIN, Channels, Epilogue, Finish, finish, load_channels, store_moments
from ..layout import Laid
from ..operands import FpropOperands
from ..moments import TileRows
from ..problem import ConvProblem
from ..tiling import cdiv
from .boxes import ResidualBox, load_phases, load_residual_box, locate_box, rows_of_box, store_box, taps_inside
from .tiles import BoxTile, box_count, phases_of
from .views import flattened, map_filters, map_image, strides_of

EXTENTS = ["N", "H", "W", "P", "Q"]


@triton.jit(do_not_specialize=EXTENTS)
@no_type_check
def tma_fprop_kernel(
    x_map, w_map, y_map, bias_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr, residual_map, moments_ptr,
    slope: tl.float64, N, H, W, P, Q, K, g: tl.constexpr, e: tl.constexpr,
    PIXEL: tl.constexpr, PHASE_H: tl.constexpr, PHASE_W: tl.constexpr,
    TILE_N: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr, TILE_K: tl.constexpr, TILE_C: tl.constexpr,
):  # fmt: skip
    """One box of y, TILE_K filters of it; `moments` [boxes, 2, K].

    g: ConvGeometry, with the channels; e: Finish. PIXEL: elements from a pixel of x to the next.
    """
    STEPS_C: tl.constexpr = (g.C + TILE_C - 1) // TILE_C

    # Filters vary fastest: programs that run together share their pixels.
    tiles_k = tl.cdiv(K, TILE_K)
    k0 = tl.program_id(0) % tiles_k * TILE_K
    tile = tl.program_id(0) // tiles_k
    n0, p0, q0 = locate_box(tile, P, Q, TILE_N, TILE_H, TILE_W)
    h0 = p0 * g.stride_h - g.pad_h
    w0 = q0 * g.stride_w - g.pad_w
    r0, taps_r = taps_inside(h0, H, g.R, g.dil_h, TILE_H)
    s0, taps_s = taps_inside(w0, W, g.S, g.dil_w, TILE_W)

    acc = tl.zeros((TILE_K, TILE_N * TILE_H * TILE_W), e.acc)
    for step in range(taps_r * taps_s * STEPS_C):
        r = r0 + step // STEPS_C // taps_s
        s = s0 + step // STEPS_C % taps_s
        c = step % STEPS_C * TILE_C
        x = load_phases(x_map, n0, h0 + r * g.dil_h, w0 + s * g.dil_w, c, PIXEL, PHASE_H, PHASE_W)  # [pixels, TILE_C]
        w = w_map.load([r, s, k0, c]).reshape(TILE_K, TILE_C)
        acc = tl.dot(w, x.T, acc)

    k = k0 + tl.arange(0, TILE_K)
    k_ok = k < K
    residual = ResidualBox(residual_map, n0, p0, q0, k0)
    of_channels = Channels(bias_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr)
    channels = load_channels(of_channels, k, k_ok, e)
    y = finish(acc.T, channels, residual, slope, of_channels, e, load_residual_box).to(y_map.dtype)  # [pixels, TILE_K]
    store_box(y_map, n0, p0, q0, k0, y)
    if moments_ptr is not None:
        exist = rows_of_box(n0, p0, q0, N, P, Q, TILE_N, TILE_H, TILE_W)
        store_moments(moments_ptr, tile, (y.to(e.acc),), (exist,), k, k_ok, K)


def plan_tma_fprop(
    problem: ConvProblem,
    tile: BoxTile,
    x: Laid,
    w: Laid,
    y: Laid,
    residual: Laid | None = None,
    eps: float = 0.0,
    activation: str | None = None,
    slope: float = 0.0,
) -> launch.Launch[FpropOperands]:
    """See `tma_fprop`."""
    residuals = [] if residual is None else [residual]
    g, (x, y, *residuals) = flattened(problem, x, y, *residuals)
    phases = phases_of(g, "fprop", tile)
    box = tile.TILE_N, tile.TILE_H, tile.TILE_W
    maps = {
        0: map_image(x, box, tile.TILE_C, phases),
        1: map_filters(w, tile.TILE_K, tile.TILE_C),
        2: map_image(y, box, tile.TILE_K),
    }
    if residuals:
        maps[8] = map_image(residuals[0], box, tile.TILE_K)
    return launch.Launch(
        tma_fprop_kernel, (box_count(g, "fprop", tile) * cdiv(g.K, tile.TILE_K),), slope, g.N, g.H, g.W, g.P, g.Q, g.K,
        tile=tile, maps=maps, g=g.geometry(C=g.C), e=Finish(eps, activation, tl.float32),
        PIXEL=strides_of(x)[2], PHASE_H=phases[0], PHASE_W=phases[1],
        TILE_N=tile.TILE_N, TILE_H=tile.TILE_H, TILE_W=tile.TILE_W, TILE_K=tile.TILE_K, TILE_C=tile.TILE_C,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip


def tma_fprop(
    problem: ConvProblem,
    tile: BoxTile,
    x: torch.Tensor,
    w: torch.Tensor,
    y: torch.Tensor,
    epilogue: Epilogue = PLAIN,
    moments: torch.Tensor | None = None,
) -> None:
    """Writes y, what `epilogue` makes of conv(x, w), and, if asked, the (mean, M2) of each box of y; `box_rows` tells
    of which pixels.

    Shapes: x [N, C, H, W], w [K, C, R, S], y and the residual [N, K, P, Q], all of one dtype, float16 or bfloat16, and
    as `views.why_not` demands; bias and those of the batch norm [K]; moments [boxes, 2, K] in float32. Raises
    ValueError where the tile's boxes cannot step with the problem's stride.
    """
    e = epilogue
    plan = plan_tma_fprop(problem, tile, x, w, y, e.residual, e.norm.eps, e.activation, e.slope)
    plan(FpropOperands(x, w, y, e.bias, *e.norm[:4], e.residual, moments))


def box_rows(problem: ConvProblem, tile: BoxTile) -> TileRows:
    """The pixels that the moments of each box stand for. `problem`: flattened, where the kernel sees it so."""
    g = problem
    return TileRows(
        cdiv(g.P, tile.TILE_H), g.P, tile.TILE_H, g.Q, 1, box_count(g, "fprop", tile), tile.TILE_W, g.N, tile.TILE_N
    )
