"""Gradient of a convolution's input as an implicit GEMM whose operands all come by tensor maps.

    dx[n, h, w, c] = sum over r, s, k of dy[n, p, q, k] * w[k, r, s, c]
    where p * stride_h = h + pad_h - r * dil_h, and q alike

As in gather/dgrad.py, input pixels with the same h mod stride_h and the same w mod stride_w make up a class: they meet
the same taps, which are stride / gcd(stride, dilation) apart, and within a class the sum is a correlation of stride 1
over dy. The pixels of a box are of one class. So boxes of dy need no phases, and dx is stored through phases (boxes.py
explains them).

Where an epilogue follows, it takes the accumulator in pieces of the box's pixels (gradient_pieces.py).

The accumulator is [channels, pixels] = w transposed [C, filters] times the transposed box of dy [pixels, filters]. The
weights are read as they lie; no flipped copy of them is made. Where there is a second product (second_product.py), the
accumulator begins with it: own [C, channels] times the transposed box of x [pixels, channels], scaled and shifted.

Written for sm_90 and later. Not yet run on a GPU.
"""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl

from .. import launch
from ..epilogue import Channels, Finish
from ..gradient_epilogue import (
    NO_EPILOGUE,
    NOTHING_BELOW,
    GradientEpilogue,
    GradientLayouts,
    store_sums,
    take_columns,
)
from ..indexing import class_axis, has_nan
from ..layout import Laid, dense
from ..operands import BoxDgradOperands
from ..problem import ConvProblem, tap_step
from ..second_product import SecondProduct
from ..tiling import MAX_REGISTERS
from .boxes import (
    load_box,
    locate_box,
    locate_piece,
    pixels_inside,
    store_phases,
    take_part,
    taps_inside,
    unravel_step,
)
from .gradient_pieces import BoxPlace, GradientMaps, GradientViews, finish_part, piece_of, pieces_of
from .tiles import BoxTile, box_count, box_grid, box_programs
from .views import flattened, map_filters, map_image, phases_of

EXTENTS = ["H", "W", "P", "Q", "rows", "columns"]
# How many sums the careful loop holds at a time: each in two versions, beside a box of results. They may take all
# registers of a thread, for it is shared memory that bounds how many programs a multiprocessor runs.
CAREFUL_SUMS = tl.constexpr(2048)
LEAST_DEPTH = 16  # of a product


@triton.jit
@no_type_check
def add_bias(bias_ptr, dx, c0, C, TILE_C: tl.constexpr):
    """dx [pixels, TILE_C] plus the bias of channels from c0 on, if there is one."""
    if bias_ptr is not None:
        c = c0 + tl.arange(0, TILE_C)
        dx = dx + tl.load(bias_ptr + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    return dx


@triton.jit
@no_type_check
def scale_rows(acc, scale_ptr, shift_ptr, c0, C, TILE_C: tl.constexpr):
    """acc [TILE_C, pixels] times the scale of channels from c0 on, plus their shift."""
    c = c0 + tl.arange(0, TILE_C)
    scale = tl.load(scale_ptr + c, mask=c < C, other=0.0)
    shift = tl.load(shift_ptr + c, mask=c < C, other=0.0)
    return acc * scale[:, None] + shift[:, None]


@triton.jit(do_not_specialize=EXTENTS)
@no_type_check
def tma_dgrad_kernel(
    dy_map, w_map, dx_map, bias_ptr, residual_map, y_map, z_map, words_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr,
    slots_ptr, x_map, own_map, scale_ptr, shift_ptr, H, W, P, Q, rows, columns, C,
    g: tl.constexpr, e: tl.constexpr, box: tl.constexpr, phases: tl.constexpr, views: tl.constexpr,
    STEP_H: tl.constexpr, STEP_W: tl.constexpr, MISSES: tl.constexpr,
):  # fmt: skip
    """One box of one class of dx, TILE_C channels of it, plus the bias of a transposed convolution if there is one, or
    what an epilogue makes of it; `slots` [boxes of all classes, 1 or 2, C]. x, own, scale and shift: of a second
    product, if there is one.

    rows x columns: pixels of the largest class. g: ConvGeometry, with the filters, and beside a second product the
    channels; e: the epilogue's Finish, or None,
    and views: its GradientViews; box: Box; phases: those of dx, Phases. With an epilogue the maps but for those of dy
    and w are of a piece of a box. STEP_H, STEP_W: from one tap that a class meets to the next. MISSES: a tap that
    reaches one pixel of a box may lie outside dy for another.
    """
    TILE_K: tl.constexpr = box.TILE_K
    TILE_C: tl.constexpr = box.TILE_C
    PIXELS: tl.constexpr = box.TILE_N * box.TILE_H * box.TILE_W
    PIECES: tl.constexpr = 1 if e is None else views.pieces
    STEPS_K: tl.constexpr = (g.K + TILE_K - 1) // TILE_K
    P_STEP: tl.constexpr = -(g.dil_h * STEP_H // g.stride_h)
    Q_STEP: tl.constexpr = -(g.dil_w * STEP_W // g.stride_w)

    # Channels vary fastest, then classes: programs that run together share their part of dy.
    tiles_c = tl.cdiv(C, TILE_C)
    pid = tl.program_id(0)
    c0 = pid % tiles_c * TILE_C
    first_h = pid // tiles_c % g.stride_h
    first_w = pid // tiles_c // g.stride_h % g.stride_w
    n0, i0, j0 = locate_box(pid // tiles_c // (g.stride_h * g.stride_w), rows, columns, box)

    class_rows, r0, taps_r, p0 = class_axis(first_h, H, g.R, g.stride_h, g.pad_h, g.dil_h, STEP_H)
    class_columns, s0, taps_s, q0 = class_axis(first_w, W, g.S, g.stride_w, g.pad_w, g.dil_w, STEP_W)
    p0 += i0
    q0 += j0
    tap_r0, taps_r = taps_inside(p0, P, taps_r, P_STEP, box.TILE_H)
    tap_s0, taps_s = taps_inside(q0, Q, taps_s, Q_STEP, box.TILE_W)

    h = first_h + i0 * g.stride_h
    w_pixel = first_w + j0 * g.stride_w
    steps = taps_r * taps_s * STEPS_K
    acc = tl.zeros((TILE_C, PIXELS), tl.float32)
    if x_map is not None:
        tl.static_assert(not MISSES)
        STEP: tl.constexpr = own_map.block_shape[3]
        for step in range((g.C + STEP - 1) // STEP):
            x = load_box(x_map, n0, h, w_pixel, step * STEP)  # [pixels, STEP]
            own = own_map.load([0, 0, c0, step * STEP]).reshape(TILE_C, STEP)
            acc = tl.dot(own, x.T, acc)
        acc = scale_rows(acc, scale_ptr, shift_ptr, c0, C, TILE_C)
    for step in range(steps):
        tap_r, tap_s, k = unravel_step(step, tap_r0, tap_s0, taps_s, STEPS_K, TILE_K)
        dy = load_box(dy_map, n0, p0 + tap_r * P_STEP, q0 + tap_s * Q_STEP, k)  # [pixels, TILE_K]
        w = w_map.load([r0 + tap_r * STEP_H, s0 + tap_s * STEP_W, k, c0]).reshape(TILE_K, TILE_C)
        acc = tl.dot(w.T, dy.T, acc)

    if e is not None:
        of = GradientMaps(
            residual_map, y_map, z_map, words_ptr, Channels(None, mean_ptr, var_ptr, gamma_ptr, beta_ptr, None)
        )
        at = BoxPlace(n0, h, w_pixel, i0, j0, class_rows, class_columns, H, W, c0, C)
        N = dx_map.shape[0]
        c = c0 + tl.arange(0, TILE_C)

    # Where a tap misses dy, the box holds zeros that stand for nothing, and these must not meet a weight that is
    # infinite or NaN. If they did, some sum is NaN. That is rare, and then the box is summed again: pixels that the tap
    # of a step does not reach keep the sums that they had. The registers do not hold two versions of all sums, so this
    # is done for some of the pixels at a time.
    careful = False
    if MISSES:
        careful = has_nan(acc)
    if careful:
        PART: tl.constexpr = min(PIXELS // PIECES, CAREFUL_SUMS // TILE_C)
        part = tl.arange(0, PIXELS // PART)[:, None, None]
        parts = tl.zeros((PIXELS // PART, PART, TILE_C), dx_map.dtype)
        sum_g = tl.zeros((TILE_C,), tl.float32)
        sum_gy = tl.zeros((TILE_C,), tl.float32)
        for i in tl.range(PIXELS // PART, num_stages=1):
            m = i * PART + tl.arange(0, PART)
            sums = tl.zeros((TILE_C, PART), tl.float32)
            for step in tl.range(steps, num_stages=1):
                tap_r, tap_s, k = unravel_step(step, tap_r0, tap_s0, taps_s, STEPS_K, TILE_K)
                p = p0 + tap_r * P_STEP
                q = q0 + tap_s * Q_STEP
                dy = take_part(load_box(dy_map, n0, p, q, k), i, PIXELS // PART)
                w = w_map.load([r0 + tap_r * STEP_H, s0 + tap_s * STEP_W, k, c0]).reshape(TILE_K, TILE_C)
                reached = pixels_inside(m, p, q, P, Q, box)
                sums = tl.where(reached[None, :], tl.dot(w.T, dy.T, sums), sums)
            finished = add_bias(bias_ptr, sums.T, c0, C, TILE_C)
            if e is not None:
                finished, part_g, part_gy = finish_part(
                    finished, i, PIXELS // PART, of, at, N, g, e, box, phases, views, dx_map.dtype
                )
                sum_g += part_g
                sum_gy += part_gy
            parts = tl.where(part == i, finished.to(dx_map.dtype)[None], parts)
        if e is None:
            store_phases(dx_map, n0, h, w_pixel, c0, parts.reshape(PIXELS, TILE_C), phases)
        else:
            for piece in tl.static_range(PIECES):
                n, row, column = locate_piece(n0, h, w_pixel, piece, PIECES, box, g.stride_h, g.stride_w)
                stored = take_part(parts.reshape(PIXELS, TILE_C), piece, PIECES)
                store_phases(dx_map, n, row, column, c0, stored, phases)
            if slots_ptr is not None:
                store_sums(slots_ptr, pid // tiles_c, sum_g, sum_gy, c, c < C, C, y_map is not None)
    elif e is not None:
        total_g = tl.zeros((TILE_C,), tl.float32)
        total_gy = tl.zeros((TILE_C,), tl.float32)
        for piece in tl.static_range(PIECES):
            dz = add_bias(bias_ptr, take_columns(acc, piece, PIECES).T, c0, C, TILE_C)
            dx, piece_g, piece_gy = finish_part(dz, piece, PIECES, of, at, N, g, e, box, phases, views, dx_map.dtype)
            total_g += piece_g
            total_gy += piece_gy
            n, row, column = locate_piece(n0, h, w_pixel, piece, PIECES, box, g.stride_h, g.stride_w)
            store_phases(dx_map, n, row, column, c0, dx, phases)
        if slots_ptr is not None:
            store_sums(slots_ptr, pid // tiles_c, total_g, total_gy, c, c < C, C, y_map is not None)
    else:
        dx = add_bias(bias_ptr, acc.T, c0, C, TILE_C).to(dx_map.dtype)
        store_phases(dx_map, n0, h, w_pixel, c0, dx, phases)


def plan_tma_dgrad(
    problem: ConvProblem,
    tile: BoxTile,
    dy: Laid,
    w: Laid,
    dx: Laid,
    below: GradientLayouts = NOTHING_BELOW,
    e: Finish | None = None,
    second: Laid | None = None,
) -> launch.Launch[BoxDgradOperands]:
    """The launch of `tma_dgrad` but for its tensors; arguments as gather.dgrad.plan_dgrad has them. second: x of a
    second product.
    """
    given = [t for t in (second, *below) if t is not None]
    g, (dy, dx, *images) = flattened(problem, dy, dx, *given)
    box, phases = tile.box, phases_of(g, "dgrad", tile, dx)
    pixels = box[:3]
    pieces = 1 if e is None else pieces_of(tile)
    stored = pixels if e is None else piece_of(pixels, pieces)
    maps = {
        0: map_image(dy, pixels, tile.TILE_K),
        1: map_filters(w, tile.TILE_K, tile.TILE_C),
        2: map_image(dx, stored, tile.TILE_C, phases),
    }
    if second is not None:
        seen, *images = images
        own = dense((g.C, g.C, 1, 1), seen.dtype)
        step = second_step(g.C, tile)
        maps |= {13: map_image(seen, pixels, step), 14: map_filters(own, tile.TILE_C, step)}
    pixel = [phases.pixel] * 3
    for i, t in zip((i for i in range(3) if below[i] is not None), images, strict=True):
        seen = phases_of(g, "dgrad", tile, t)
        maps[4 + i] = map_image(t, stored, tile.TILE_C, seen)
        pixel[i] = seen.pixel
    one_row = g.N * g.H == 1 and g.parities == 1
    return launch.Launch(
        tma_dgrad_kernel, (box_programs(g, "dgrad", tile),), g.H, g.W, g.P, g.Q, *box_grid(g, "dgrad"), g.C,
        tile=tile, maps=maps, g=g.geometry(C=None if second is None else g.C, K=g.K), e=e, box=box, phases=phases,
        views=None if e is None else GradientViews(pixel[0], pixel[1], pixel[2], one_row, pieces),
        STEP_H=tap_step(g.stride_h, g.dil_h), STEP_W=tap_step(g.stride_w, g.dil_w),
        MISSES=(tile.TILE_H > 1 and g.taps_miss_h) or (tile.TILE_W > 1 and g.taps_miss_w),
        num_warps=tile.num_warps, num_stages=tile.num_stages, maxnreg=MAX_REGISTERS,
    )  # fmt: skip


def second_step(channels: int, tile: BoxTile) -> int:
    """The channels that a step of a second product adds: as many as the other steps add filters, but so few that it has
    two steps. Of a loop of one step the compiler keeps the boxes beside those of the next loop.
    """
    return min(tile.TILE_K, max(LEAST_DEPTH, triton.next_power_of_2(channels) // 2))


def slot_rows(problem: ConvProblem, tile: BoxTile) -> int:
    """Boxes of all classes: as many as slots have rows. problem: as `views.flattened` makes it."""
    return box_count(problem, "dgrad", tile) * problem.parities


def tma_dgrad(
    problem: ConvProblem,
    tile: BoxTile,
    dy: torch.Tensor,
    w: torch.Tensor,
    dx: torch.Tensor,
    bias: torch.Tensor | None = None,
    epilogue: GradientEpilogue = NO_EPILOGUE,
    slots: torch.Tensor | None = None,
    second: SecondProduct | None = None,
) -> None:
    """Writes every element of dx, the gradient of a convolution's input, or with `bias` the result of a transposed
    convolution, begun with `second`, and what `epilogue` makes of it; and the sums of each box to `slots`, if given.

    Shapes: dy [N, K, P, Q], w [K, C, R, S], dx [N, C, H, W], all of one dtype, float16 or bfloat16, and laid out as
    `views.why_not` demands, and so are the epilogue's images; bias [C]. slots [slot_rows, 2 if the epilogue has y else
    1, C] in float32: of g, and of g * (y - mean). Raises ValueError where the tile's boxes cannot step with the
    problem's stride.
    """
    e = epilogue
    finish = e.compiled(dx.dtype) if slots is not None or e is not NO_EPILOGUE else None
    prepared = plan_tma_dgrad(problem, tile, dy, w, dx, e.layouts, finish, second and second.x)
    prepared(BoxDgradOperands(dy, w, dx, bias, *e[:4], *e.norm[:4], slots, *(second or ())))
