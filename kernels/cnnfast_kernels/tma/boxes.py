"""What the tensor-map kernels share: which box of pixels a program has, which taps of the filter reach into the image,
loads and stores of boxes.

A box is TILE_N images x TILE_H rows x TILE_W columns of an [N, H, W, C] tensor, times a block of channels. The GPU's
copy engine fetches it with one instruction. It fills what lies outside the tensor with zeros, and drops what would be
stored there, so kernels need no masks.

The pixels of a box are neighbours; a box cannot step over every other one. Where a convolution has a stride, the image
is seen in phases, as [N, H / phases.h, phases.h, W / phases.w, phases.w * C]: in this view the rows and the columns
that are a stride apart are neighbours. A box of one row needs no phases along H, since it can start at any row, and a
box of one column needs none along W.

The matrix unit reads the first operand of a product from shared memory only if its pixels lie along the axis next to
the channels. Those of one row do, and so do those of one pixel of several images where the tensor is seen as
[H, W, N, C]. Any other box passes through registers on its way. The second operand may be any box.
"""

from __future__ import annotations

from typing import NamedTuple, no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check
def locate_box(tile, extent_h, extent_w, box: tl.constexpr):
    """The first image, row and column of box number `tile`; columns vary fastest, then rows."""
    tiles_w = tl.cdiv(extent_w, box.TILE_W)
    tiles_h = tl.cdiv(extent_h, box.TILE_H)
    t = tile // tiles_w
    return t // tiles_h * box.TILE_N, t % tiles_h * box.TILE_H, tile % tiles_w * box.TILE_W


class BoxPixels(NamedTuple):
    """Inside a kernel, which pixels of a box exist: those of its first n images, h rows and w columns. whole: whether
    those are all of them; box: Box.
    """

    whole: tl.tensor
    n: tl.tensor
    h: tl.tensor
    w: tl.tensor
    box: tuple


@triton.jit
@no_type_check
def masks_of_box(pixels, PIXELS: tl.constexpr):
    """Which of PIXELS pixels exist by BoxPixels: one mask. Along an axis of which a box has one pixel, it exists."""
    box: tl.constexpr = pixels.box
    m = tl.arange(0, PIXELS)
    exist = tl.full((PIXELS,), True, tl.int1)
    if box.TILE_N > 1:
        exist &= m // (box.TILE_H * box.TILE_W) < pixels.n
    if box.TILE_H > 1:
        exist &= m // box.TILE_W % box.TILE_H < pixels.h
    if box.TILE_W > 1:
        exist &= m % box.TILE_W < pixels.w
    return (exist,)


@triton.jit
@no_type_check
def pixels_inside(m, h0, w0, H, W, box: tl.constexpr):
    """Whether pixels number `m` of the box at row h0 and column w0 lie in an image of H x W."""
    h = h0 + m // box.TILE_W % box.TILE_H
    w = w0 + m % box.TILE_W
    return (h >= 0) & (h < H) & (w >= 0) & (w < W)


@triton.jit
@no_type_check
def take_part(loaded, i, PARTS: tl.constexpr):
    """Part number i of a loaded box [pixels, channels], whose pixels are cut into PARTS, a power of two.

    The box is halved again and again, which keeps its dtype; picking the part with a sum would not.
    """
    if PARTS == 1:
        return loaded
    else:
        first, second = tl.split(tl.permute(loaded.reshape(2, loaded.shape[0] // 2, loaded.shape[1]), (1, 2, 0)))
        return take_part(tl.where(i < PARTS // 2, first, second), (PARTS // 2 - 1) & i, PARTS // 2)


@triton.jit
@no_type_check
def taps_inside(first, extent, taps, STEP: tl.constexpr, TILE: tl.constexpr, PAD: tl.constexpr = 1):
    """Which of `taps` taps see an image of `extent` pixels along one axis: the first of them, and their number.

    Tap t of a box sees the pixel first + t * STEP. A box of several pixels along the axis seldom lies in the padding as
    a whole, so it meets all taps. So does a single tap without PAD pixels of padding before the image: the compiler
    then knows the number of steps, without which ptxas of triton 3.6.0 waits after every wgmma at 8 warps.
    """
    if TILE > 1 or (taps == 1 and PAD == 0):
        return 0, taps
    else:
        before = -first if STEP > 0 else first - extent + 1  # pixels to go until the image
        beyond = extent - first if STEP > 0 else first + 1  # until its end
        WIDTH: tl.constexpr = STEP if STEP > 0 else -STEP
        begin = tl.cdiv(tl.maximum(before, 0), WIDTH)
        end = tl.minimum(taps, tl.cdiv(tl.maximum(beyond, 0), WIDTH))
        return begin, tl.maximum(end - begin, 0)


@triton.jit
@no_type_check
def unravel_step(step, first_r, first_s, taps_s, STEPS: tl.constexpr, TILE: tl.constexpr):
    """Of one step of a sum: its tap (r, s), and the first of the TILE channels, or filters, that it adds.

    A tap takes STEPS steps. Taps begin at (first_r, first_s); a row of them has taps_s.
    """
    return first_r + step // STEPS // taps_s, first_s + step // STEPS % taps_s, step % STEPS * TILE


@triton.jit
@no_type_check
def load_box(x_map, n, h, w, c):
    """Pixels of the box at (n, h, w), channels from c on: [pixels, channels], zero outside the tensor."""
    loaded = x_map.load([n, h, w, c])
    return loaded.reshape(loaded.numel // loaded.shape[-1], loaded.shape[-1])


class ResidualBox(NamedTuple):
    """Inside a kernel, the box of a residual that begins at (n, h, w, c) of a tensor map: what load_residual_box loads.
    `source` is None where there is no residual.
    """

    source: tl.tensor
    n: tl.tensor
    h: tl.tensor
    w: tl.tensor
    c: tl.tensor


@triton.jit
@no_type_check
def load_residual_box(residual):
    """[pixels, channels] of a ResidualBox."""
    return load_box(residual.source, residual.n, residual.h, residual.w, residual.c)


class GradientBox(NamedTuple):
    """Inside a kernel, what `load_gradient_box` loads: of the box that begins at (n, h, w, c) of a tensor map, seen in
    PHASES_H x PHASES_W phases whose pixels are PIXEL elements apart, part number `part` of PARTS. `source` is None
    where there is no tensor.
    """

    source: tl.tensor
    n: tl.tensor
    h: tl.tensor
    w: tl.tensor
    c: tl.tensor
    part: tl.tensor
    PHASES_H: tl.constexpr
    PHASES_W: tl.constexpr
    PIXEL: tl.constexpr
    PARTS: tl.constexpr


@triton.jit
@no_type_check
def load_gradient_box(box):
    """[pixels, channels] of a GradientBox."""
    loaded = load_in_phases(box.source, box.n, box.h, box.w, box.c, box.PHASES_H, box.PHASES_W, box.PIXEL)
    return take_part(loaded, box.part, box.PARTS)


@triton.jit
@no_type_check
def locate_piece(
    n, h, w, piece, PIECES: tl.constexpr, box: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr
):
    """Where piece number `piece` of the box at (n, h, w) begins, of PIECES, a power of two, of as many pixels each: the
    box is cut along images, then rows, then columns. Its pixels are STRIDE_H rows and STRIDE_W columns apart.
    """
    OF_N: tl.constexpr = min(PIECES, box.TILE_N)
    OF_H: tl.constexpr = min(PIECES // OF_N, box.TILE_H)
    OF_W: tl.constexpr = PIECES // (OF_N * OF_H)
    n += piece // (OF_H * OF_W) * (box.TILE_N // OF_N)
    h += piece // OF_W % OF_H * (box.TILE_H // OF_H * STRIDE_H)
    w += piece % OF_W * (box.TILE_W // OF_W * STRIDE_W)
    return n, h, w


@triton.jit
@no_type_check
def load_column(x_map, n, h, w, c):
    """`load_box` of one pixel of several images, from a map of [H, W, N, C]."""
    loaded = x_map.load([h, w, n, c])
    return loaded.reshape(loaded.numel // loaded.shape[-1], loaded.shape[-1])


@triton.jit
@no_type_check
def load_phases(x_map, n, h, w, c, phases: tl.constexpr):
    """`load_box` from an image that is seen in phases (views.Phases)."""
    return load_in_phases(x_map, n, h, w, c, phases.h, phases.w, phases.pixel)


@triton.jit
@no_type_check
def load_in_phases(x_map, n, h, w, c, PHASES_H: tl.constexpr, PHASES_W: tl.constexpr, PIXEL: tl.constexpr):
    """`load_phases` of phases that are told one by one."""
    if PHASES_H * PHASES_W == 1:
        return load_box(x_map, n, h, w, c)
    else:
        # Pixels in the padding have negative coordinates, whose quotients must be rounded down, but `//` rounds toward
        # zero. LIFT phases more than any padding has make them positive for the division.
        LIFT: tl.constexpr = 1 << 20
        h += LIFT * PHASES_H
        w += LIFT * PHASES_W
        loaded = x_map.load([n, h // PHASES_H - LIFT, h % PHASES_H, w // PHASES_W - LIFT, w % PHASES_W * PIXEL + c])
        return loaded.reshape(loaded.numel // loaded.shape[-1], loaded.shape[-1])


@triton.jit
@no_type_check
def store_box(y_map, n, h, w, c, y):
    """Writes y [pixels, channels] to the box at (n, h, w), as far as the box lies in the tensor."""
    y_map.store([n, h, w, c], y.reshape(y_map.block_shape))


@triton.jit
@no_type_check
def store_phases(y_map, n, h, w, c, y, phases: tl.constexpr):
    """`store_box` to an image that is seen in phases (views.Phases); h and w are not negative."""
    if phases.h * phases.w == 1:
        store_box(y_map, n, h, w, c, y)
    else:
        y_map.store(
            [n, h // phases.h, h % phases.h, w // phases.w, w % phases.w * phases.pixel + c],
            y.reshape(y_map.block_shape),
        )
