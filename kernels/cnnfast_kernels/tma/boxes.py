"""What the tensor-map kernels share: which box of pixels a program has, which taps reach into the image, loads and
stores of boxes.

A box is TILE_N images x TILE_H rows x TILE_W columns of an [N, H, W, C] tensor, times a block of channels. The copy
engine fetches it with one instruction, puts zeros where it lies outside the tensor, and drops what would be stored
there: there are no masks.

A box has no steps. Where a convolution strides over its image, the image is seen as [N, H / PHASE_H, PHASE_H, W /
PHASE_W, PHASE_W * C]: rows and columns a stride apart lie next to each other then. A box of one row needs no such view
to move by any step, nor does a column.

As the first operand of a product, the matrix unit reads a box in shared memory only if its pixels lie along the axis
next to the channels: a row does, and images do where the tensor is seen as [H, W, N, C]. Any other box passes through
registers. As the second operand, all do.
"""

from __future__ import annotations

from typing import NamedTuple, no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check
def locate_box(tile, extent_h, extent_w, TILE_N: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr):
    """The first image, row and column of box `tile`; columns vary fastest, then rows."""
    tiles_w = tl.cdiv(extent_w, TILE_W)
    tiles_h = tl.cdiv(extent_h, TILE_H)
    t = tile // tiles_w
    return t // tiles_h * TILE_N, t % tiles_h * TILE_H, tile % tiles_w * TILE_W


@triton.jit
@no_type_check
def rows_of_box(n0, h0, w0, N, extent_h, extent_w, TILE_N: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr):
    """Whether each of a box's pixels [TILE_N * TILE_H * TILE_W] is one of the tensor's."""
    m = tl.arange(0, TILE_N * TILE_H * TILE_W)
    n = n0 + m // (TILE_H * TILE_W)
    return (n < N) & (h0 + m // TILE_W % TILE_H < extent_h) & (w0 + m % TILE_W < extent_w)


@triton.jit
@no_type_check
def pixels_inside(m, h0, w0, H, W, TILE_H: tl.constexpr, TILE_W: tl.constexpr):
    """Whether pixels m of the box at row h0 and column w0 lie in an image of H x W."""
    h = h0 + m // TILE_W % TILE_H
    w = w0 + m % TILE_W
    return (h >= 0) & (h < H) & (w >= 0) & (w < W)


@triton.jit
@no_type_check
def take_part(box, i, PARTS: tl.constexpr):
    """Part i of the pixels of a box [pixels, channels] cut into PARTS, a power of two: by halves, which keep the dtype,
    as no sum would.
    """
    if PARTS == 1:
        return box
    else:
        first, second = tl.split(tl.permute(box.reshape(2, box.shape[0] // 2, box.shape[1]), (1, 2, 0)))
        return take_part(tl.where(i < PARTS // 2, first, second), (PARTS // 2 - 1) & i, PARTS // 2)


@triton.jit
@no_type_check
def taps_inside(first, extent, taps, STEP: tl.constexpr, TILE: tl.constexpr):
    """The first of `taps` taps that see an axis of `extent` pixels, and the number of them: tap t of a box sees pixel
    first + t * STEP.

    Boxes of several pixels, which seldom lie in the padding as a whole, meet all taps.
    """
    if TILE > 1:
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
def load_box(x_map, n, h, w, c):
    """Pixels of the box at (n, h, w), channels from c on: [pixels, channels], zero outside the tensor."""
    box = x_map.load([n, h, w, c])
    return box.reshape(box.numel // box.shape[-1], box.shape[-1])


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


@triton.jit
@no_type_check
def load_column(x_map, n, h, w, c):
    """`load_box` of one pixel of several images, from a map of [H, W, N, C]."""
    box = x_map.load([h, w, n, c])
    return box.reshape(box.numel // box.shape[-1], box.shape[-1])


@triton.jit
@no_type_check
def load_phases(x_map, n, h, w, c, PIXEL: tl.constexpr, PHASE_H: tl.constexpr, PHASE_W: tl.constexpr):
    """`load_box` from an image seen in phases. PIXEL: elements from one pixel to the next."""
    if PHASE_H * PHASE_W == 1:
        return load_box(x_map, n, h, w, c)
    else:
        # Added before a division that rounds toward zero, so that it rounds down: more phases than any padding is wide.
        FAR: tl.constexpr = 1 << 20
        h += FAR * PHASE_H
        w += FAR * PHASE_W
        box = x_map.load([n, h // PHASE_H - FAR, h % PHASE_H, w // PHASE_W - FAR, w % PHASE_W * PIXEL + c])
        return box.reshape(box.numel // box.shape[-1], box.shape[-1])


@triton.jit
@no_type_check
def store_box(y_map, n, h, w, c, y):
    """Writes y [pixels, channels] to the box at (n, h, w), as far as it lies in the tensor."""
    y_map.store([n, h, w, c], y.reshape(y_map.block_shape))


@triton.jit
@no_type_check
def store_phases(y_map, n, h, w, c, y, PIXEL: tl.constexpr, PHASE_H: tl.constexpr, PHASE_W: tl.constexpr):
    """`store_box` to an image seen in phases; h and w are not negative."""
    if PHASE_H * PHASE_W == 1:
        store_box(y_map, n, h, w, c, y)
    else:
        y_map.store([n, h // PHASE_H, h % PHASE_H, w // PHASE_W, w % PHASE_W * PIXEL + c], y.reshape(y_map.block_shape))
