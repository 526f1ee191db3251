"""Convolution forward as an implicit GEMM whose operands all come by tensor maps.

    y[n, p, q, k] = sum over r, s, c of x[n, h, w, c] * w[k, r, s, c]
    where h = p * stride_h - pad_h + r * dil_h and w = q * stride_w - pad_w + s * dil_w

What one tap of the filter reads for a box of output pixels is a box of input pixels, shifted. So the patches need
neither addresses nor masks, and the padding is what lies outside the tensor. Taps that reach only into the padding are
skipped. A 1x1 convolution is a plain GEMM, see `views.flattened`.

The accumulator is [filters, pixels] = w [filters, C] times the transposed box [pixels, C], not the other way round: the
box is then the second operand, which the matrix unit reads in shared memory just as the copy engine left it.

Written for sm_90 and later. Not yet run on a GPU.
"""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl

from .. import launch
from ..epilogue import PLAIN, Channels, Epilogue, Finish, finish, finish_of, load_channels
from ..layout import Laid
from ..moments import TileRows
from ..operands import FpropOperands
from ..problem import ConvProblem
from ..tile_moments import store_moments
from ..tiling import cdiv
from ..words import WORD, store_bits
from .boxes import (
    BoxPixels,
    ResidualBox,
    load_phases,
    load_residual_box,
    locate_box,
    masks_of_box,
    store_box,
    taps_inside,
    unravel_step,
)
from .tiles import BoxTile, box_count, box_programs
from .views import flattened, map_filters, map_image, phases_of

EXTENTS = ["N", "H", "W", "P", "Q"]


@triton.jit(do_not_specialize=EXTENTS)
@no_type_check
def tma_fprop_kernel(
    x_map, w_map, y_map, bias_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr, residual_map, beside_ptr,
    slopes_ptr, N, H, W, P, Q, K,
    g: tl.constexpr, e: tl.constexpr, box: tl.constexpr, phases: tl.constexpr,
):  # fmt: skip
    """One box of y, TILE_K filters of it, and what it leaves beside y, if anything: moments [boxes, 2, K], or, if
    e.words, words [ceil(Q / 32), K] of bits, where the image is one row and so is a box.

    g: ConvGeometry, with the channels; e: Finish; box: Box; phases: those of x, Phases.
    """
    TILE_K: tl.constexpr = box.TILE_K
    TILE_C: tl.constexpr = box.TILE_C
    PIXELS: tl.constexpr = box.TILE_N * box.TILE_H * box.TILE_W
    STEPS_C: tl.constexpr = (g.C + TILE_C - 1) // TILE_C

    # Filters vary fastest: programs that run together share their pixels.
    tiles_k = tl.cdiv(K, TILE_K)
    k0 = tl.program_id(0) % tiles_k * TILE_K
    tile = tl.program_id(0) // tiles_k
    n0, p0, q0 = locate_box(tile, P, Q, box)
    h0 = p0 * g.stride_h - g.pad_h
    w0 = q0 * g.stride_w - g.pad_w
    r0, taps_r = taps_inside(h0, H, g.R, g.dil_h, box.TILE_H, g.pad_h)
    s0, taps_s = taps_inside(w0, W, g.S, g.dil_w, box.TILE_W, g.pad_w)

    acc = tl.zeros((TILE_K, PIXELS), tl.float32)
    for step in range(taps_r * taps_s * STEPS_C):
        r, s, c = unravel_step(step, r0, s0, taps_s, STEPS_C, TILE_C)
        x = load_phases(x_map, n0, h0 + r * g.dil_h, w0 + s * g.dil_w, c, phases)  # [pixels, TILE_C]
        w = w_map.load([r, s, k0, c]).reshape(TILE_K, TILE_C)
        acc = tl.dot(w, x.T, acc)

    k = k0 + tl.arange(0, TILE_K)
    k_ok = k < K
    residual = ResidualBox(residual_map, n0, p0, q0, k0)
    of_channels = Channels(bias_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr, slopes_ptr)
    channels = load_channels(of_channels, k, k_ok, e)
    z = finish(acc.T, channels, residual, of_channels, e, load_residual_box)  # [pixels, TILE_K]
    y = z.to(y_map.dtype)
    store_box(y_map, n0, p0, q0, k0, y)
    if beside_ptr is not None:
        if e.words:
            store_bits(beside_ptr, q0, Q, k, k_ok, K, z, y.dtype)
        else:
            n, p, q = N - n0, P - p0, Q - q0
            whole = (n >= box.TILE_N) & (p >= box.TILE_H) & (q >= box.TILE_W)
            store_moments(beside_ptr, tile, (y,), BoxPixels(whole, n, p, q, box), k, k_ok, K, masks_of_box)


def plan_tma_fprop(
    problem: ConvProblem,
    tile: BoxTile,
    x: Laid,
    w: Laid,
    y: Laid,
    residual: Laid | None = None,
    e: Finish | None = None,
) -> launch.Launch[FpropOperands]:
    """The launch of `tma_fprop` but for its tensors."""
    residuals = [] if residual is None else [residual]
    g, (x, y, *residuals) = flattened(problem, x, y, *residuals)
    box, phases = tile.box, phases_of(g, "fprop", tile, x)
    pixels = box[:3]
    maps = {
        0: map_image(x, pixels, tile.TILE_C, phases),
        1: map_filters(w, tile.TILE_K, tile.TILE_C),
        2: map_image(y, pixels, tile.TILE_K),
    }
    if residuals:
        maps[8] = map_image(residuals[0], pixels, tile.TILE_K)
    return launch.Launch(
        tma_fprop_kernel, (box_programs(g, "fprop", tile),), g.N, g.H, g.W, g.P, g.Q, g.K,
        tile=tile, maps=maps, g=g.geometry(C=g.C), e=e or finish_of(x.dtype), box=box, phases=phases,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip


def tma_fprop(
    problem: ConvProblem,
    tile: BoxTile,
    x: torch.Tensor,
    w: torch.Tensor,
    y: torch.Tensor,
    epilogue: Epilogue = PLAIN,
    beside: torch.Tensor | None = None,
    words: bool = False,
) -> None:
    """Writes y, which is what `epilogue` makes of conv(x, w), and, if asked, beside it: the mean and biased variance of
    each box of y, of which `box_rows` tells the pixels; or its words of bits (words.py), where boxes have them whole.

    Shapes: x [N, C, H, W], w [K, C, R, S], y and the residual [N, K, P, Q], all of one dtype, float16 or bfloat16, and
    laid out as `views.why_not` demands; bias and what the batch norm reads [K]; beside: moments [boxes, 2, K] in
    float32, or words [ceil(N * P * Q / 32), K] in int32. Raises ValueError where the tile's boxes cannot step with the
    problem's stride.
    """
    e = epilogue
    prepared = plan_tma_fprop(problem, tile, x, w, y, e.residual, e.compiled(x.dtype)._replace(words=words))
    prepared(FpropOperands(x, w, y, e.bias, *e.norm[:4], e.residual, beside, e.slopes))


def has_whole_words(problem: ConvProblem, tile: BoxTile) -> bool:
    """Whether each box has all pixels of the words of bits that it has any of: those of its row, in an image of one.

    problem: as `views.flattened` makes it, for that is what the kernel sees.
    """
    return problem.N * problem.P == 1 and tile.TILE_W == tile.pixels and tile.pixels % WORD == 0


def box_rows(problem: ConvProblem, tile: BoxTile) -> TileRows:
    """Which pixels of y each box has, for whoever combines the boxes' moments.

    problem: as `views.flattened` makes it, for that is what the kernel sees.
    """
    g = problem
    return TileRows(
        cdiv(g.P, tile.TILE_H), g.P, tile.TILE_H, g.Q, 1, box_count(g, "fprop", tile), tile.TILE_W, g.N, tile.TILE_N
    )
