"""How a tile of dgrad is stored, and what an epilogue makes of it before (gradient_epilogue.py)."""

from __future__ import annotations

from typing import NamedTuple, no_type_check

import triton
import triton.language as tl

from ..epilogue import Channels, Residual, load_channels, load_residual
from ..gradient_epilogue import Below, finish_gradient, store_sums, sum_existing
from ..indexing import channel_offset, pixel_offset
from ..words import BitWords


class GradientTile(NamedTuple):
    """Inside a kernel, what is stored of a tile's rows, pixels (n, h, w) as far as they exist, beside dx: all that an
    epilogue reads and leaves. images: pointers to residual, y and z, which lie as dx does; tile: its slot's number;
    first: the first of its pixels, of H x W in an image and so many `pixels` in all; C: channels of all groups.
    """

    images: tuple
    words: tl.tensor
    pointers: Channels
    slots: tl.tensor
    tile: tl.tensor
    first: tl.tensor
    H: tl.tensor
    W: tl.tensor
    pixels: tl.tensor
    C: tl.tensor


@triton.jit
@no_type_check
def store_dx(dx_ptr, bias_ptr, acc, pixel, row_ok, column, c_ok, strides, of, e: tl.constexpr, TOGETHER: tl.constexpr):
    """Stores rows of acc to the pixels (n, h, w) of `pixel`, columns of it to channels `column` of all groups.

    Adds the bias of these channels, if there is one. e: Finish of a gradient's epilogue, to which GradientTile `of`
    belongs, or None. TOGETHER: as BitWords has it.
    """
    n, h, w = pixel
    if bias_ptr is not None:
        acc = acc + tl.load(bias_ptr + column, mask=c_ok, other=0.0).to(acc.dtype)[None, :]
    if e is not None:
        residual, y, z = of.images
        m = (n * of.H + h) * of.W + w
        channels = load_channels(of.pointers, column, c_ok, e)
        ACC: tl.constexpr = acc.dtype
        # What a tuple holds for the compiler would become numbers of the program if the tuple were given a name here.
        acc, centred = finish_gradient(
            acc,
            Below(
                Residual(residual, pixel, column, row_ok, c_ok, strides),
                Residual(y, pixel, column, row_ok, c_ok, strides),
                Residual(z, pixel, column, row_ok, c_ok, strides),
                BitWords(of.words, m, row_ok, column, c_ok, of.C, of.first, of.pixels, TOGETHER),
            ),
            channels, of.pointers, e, load_residual,
        )  # fmt: skip
        if of.slots is not None:
            g, sum_g = sum_existing(acc.to(dx_ptr.dtype.element_ty).to(ACC), row_ok)
            sum_gy = sum_g
            if y is not None:
                sum_gy = tl.sum(g * centred, 0)
            store_sums(of.slots, of.tile, sum_g, sum_gy, column, c_ok, of.C, y is not None)
    dx = (dx_ptr + pixel_offset(n, h, w, strides))[:, None] + channel_offset(column, strides.c)[None, :]
    tl.store(dx, acc.to(dx_ptr.dtype.element_ty), mask=row_ok[:, None] & c_ok[None, :])
