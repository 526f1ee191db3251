"""Boxes of dgrad in pieces of their pixels, which an epilogue finishes one after the other (gradient_epilogue.py).

Each piece is loaded and stored as a box of its own: of all pixels at once, what an epilogue reads would take as many
registers again as the sums.
"""

from __future__ import annotations

from typing import NamedTuple, no_type_check

import triton
import triton.language as tl

from ..epilogue import Channels, load_channels
from ..gradient_epilogue import Below, finish_gradient, sum_existing
from ..words import BitWords
from .boxes import GradientBox, load_gradient_box, locate_piece, pixels_inside
from .tiles import BoxTile


class GradientViews(NamedTuple):
    """What a kernel is compiled for of what its epilogue reads: elements from one pixel to the next of residual, y and
    z, of what is absent those of dx; whether the image is one long row, in which neighbours share a word of bits; and
    into how many pieces the pixels of a box are cut.
    """

    residual: int
    y: int
    z: int
    one_row: bool
    pieces: int


class GradientMaps(NamedTuple):
    """Inside a kernel, what its epilogue reads and leaves: maps of residual, y and z, and pointers."""

    residual: tl.tensor
    y: tl.tensor
    z: tl.tensor
    words: tl.tensor
    pointers: Channels


class BoxPlace(NamedTuple):
    """Inside a kernel, where its box lies: it begins at pixel (n, h, w), which is row i and column j of a class of
    rows x columns pixels, of an image of H x W, and at channel c of C.
    """

    n: tl.tensor
    h: tl.tensor
    w: tl.tensor
    i: tl.tensor
    j: tl.tensor
    rows: tl.tensor
    columns: tl.tensor
    H: tl.tensor
    W: tl.tensor
    c: tl.tensor
    C: tl.tensor


@triton.jit
@no_type_check
def finish_part(
    dz, number, PARTS: tl.constexpr, of, at, N,
    g: tl.constexpr, e: tl.constexpr, box: tl.constexpr, phases: tl.constexpr, views: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """What the epilogue makes of part `number` of PARTS of a box, dz [pixels, TILE_C]: (g in DTYPE, the sums over its
    pixels of g and of g * (y - mean)). of: GradientMaps; at: BoxPlace; views: GradientViews.
    """
    PIXELS: tl.constexpr = dz.shape[0]
    IN_PIECE: tl.constexpr = PARTS // views.pieces
    n, h, w = locate_piece(at.n, at.h, at.w, number // IN_PIECE, views.pieces, box, g.stride_h, g.stride_w)
    part = (IN_PIECE - 1) & number  # a power of two
    m = number * PIXELS + tl.arange(0, PIXELS)
    image = at.n + m // (box.TILE_H * box.TILE_W)
    exist = pixels_inside(m, at.i, at.j, at.rows, at.columns, box) & (image < N)
    row = at.h + m // box.TILE_W % box.TILE_H * g.stride_h
    column = at.w + m % box.TILE_W * g.stride_w
    c = at.c + tl.arange(0, box.TILE_C)
    c_ok = c < at.C
    TOGETHER: tl.constexpr = views.one_row and box.TILE_W == PARTS * PIXELS and PIXELS % 32 == 0
    channels = load_channels(of.pointers, c, c_ok, e)
    # What a tuple holds for the compiler would become numbers of the program if the tuple were given a name here.
    dz, centred = finish_gradient(
        dz,
        Below(
            GradientBox(of.residual, n, h, w, at.c, part, phases.h, phases.w, views.residual, IN_PIECE),
            GradientBox(of.y, n, h, w, at.c, part, phases.h, phases.w, views.y, IN_PIECE),
            GradientBox(of.z, n, h, w, at.c, part, phases.h, phases.w, views.z, IN_PIECE),
            BitWords(
                of.words, (image * at.H + row) * at.W + column, exist, c, c_ok, at.C, at.w + number * PIXELS,
                N * at.H * at.W, TOGETHER,
            ),
        ),
        channels, of.pointers, e, load_gradient_box,
    )  # fmt: skip
    dx = dz.to(DTYPE)
    rounded, sum_g = sum_existing(dx.to(tl.float32), exist)
    return dx, sum_g, tl.sum(rounded * centred, 0)


def pieces_of(tile: BoxTile) -> int:
    """Into how many pieces an epilogue cuts the pixels of a box: so many that a thread has 32 sums of each or fewer."""
    sums = tile.pixels * tile.TILE_C // (32 * tile.num_warps)
    return max(2, sums // 32)


def piece_of(pixels: tuple[int, int, int], pieces: int) -> tuple[int, int, int]:
    """The extents of each of `pieces` pieces of a box of pixels (images, rows, columns), as boxes.locate_piece cuts."""
    images, rows, columns = pixels
    of_n = min(pieces, images)
    of_h = min(pieces // of_n, rows)
    return images // of_n, rows // of_h, columns // (pieces // (of_n * of_h))
