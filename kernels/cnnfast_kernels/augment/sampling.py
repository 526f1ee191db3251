"""An image seen through a map: where each pixel of the result lies in it, and its value there.

Between the centres of four pixels the value is bilinear:

    v = (1 - wy) ((1 - wx) v00 + wx v01) + wy ((1 - wx) v10 + wx v11)

as torch.nn.functional.grid_sample computes it with align_corners=False. Beyond the border a pixel has the value `fill`,
or the image goes on as its reflection at its edges (padding_mode="reflection").
"""

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl

from ..rounding import divide_again, round_quotient
from .sources import Colour, OneImage


@triton.jit
@no_type_check
def find_image(images, n, C: tl.constexpr, CHANNELS_FAST: tl.constexpr):
    """OneImage n of a batch."""
    if images.offsets is None:
        image_ptr = images.ptr + n.to(tl.int64) * images.stride_n
        if CHANNELS_FAST:
            return OneImage(image_ptr, images.H, images.W, images.stride_h, images.stride_w, 1)
        else:
            return OneImage(image_ptr, images.H, images.W, images.stride_h, images.stride_w, images.stride_c)
    else:
        H = tl.load(images.sizes + 2 * n)
        W = tl.load(images.sizes + 2 * n + 1)
        return OneImage(images.ptr + tl.load(images.offsets + n), H, W, W * C, C, 1)


@triton.jit
@no_type_check
def map_position(map_ptr, x, y):
    """Where position (x, y) of the result lies in the image."""
    m00, m01, m02 = tl.load(map_ptr), tl.load(map_ptr + 1), tl.load(map_ptr + 2)
    m10, m11, m12 = tl.load(map_ptr + 3), tl.load(map_ptr + 4), tl.load(map_ptr + 5)
    return tl.fma(x, m00, tl.fma(y, m01, m02)), tl.fma(x, m10, tl.fma(y, m11, m12))


@triton.jit
@no_type_check
def limit(v, low, high):
    """v within [low, high], and `low` for what is no number."""
    v = tl.where(v >= low, v, low)
    return tl.where(v <= high, v, high)


@triton.jit
@no_type_check
def reflect(u, extent):
    """Position u along an axis of `extent` pixels, folded back into [0, extent] at both ends as often as it takes.

    Where the number of folds is rounded to one too many or too few, the result lies up to an eighth of a pixel outside:
    nearest to the same pixel at the edge.
    """
    u = tl.abs(u)
    folds = tl.floor(u * round_quotient(1.0, extent))
    rest = u - folds * extent
    return tl.where(folds - 2 * tl.floor(folds * 0.5) == 0, rest, extent - rest)


@triton.jit
@no_type_check
def neighbours(u, extent, REFLECT: tl.constexpr):
    """The pixel whose centre lies at or before position u, and how far u is on the way to the next one's.

    No position is farther away than MAX_EXTENT + 1: what a map takes to infinity, or to no number at all, lies there.
    """
    FARTHEST: tl.constexpr = 1048576.0
    u = limit(u, -FARTHEST, FARTHEST)
    if REFLECT:
        u = reflect(u, extent.to(tl.float32))
        u = limit(u, 0.5, extent.to(tl.float32) - 0.5)  # as grid_sample does: the pixels at the edges go on to them
    u -= 0.5
    before = tl.floor(u)
    return before.to(tl.int32), u - before


@triton.jit
@no_type_check
def float_of_byte(value):
    """An uint8 as float32: the last bits of 2^23 + value are value. A GPU does more additions a clock than conversions
    (the CUDA C++ Programming Guide's table of throughputs), and a pixel of the result would need twelve of those.
    """
    return (value.to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0


@triton.jit
@no_type_check
def load_pixel(pixel_ptr, inside, fill):
    value = tl.load(pixel_ptr, mask=inside)
    value = float_of_byte(value) if value.dtype == tl.uint8 else value.to(tl.float32)
    return tl.where(inside, value, fill)


@triton.jit
@no_type_check
def sample(image, x, y, ok, fill, C: tl.constexpr, REFLECT: tl.constexpr):
    """The image's value at positions x, y: Colour of float32, uint8 as parts of 255. `fill` is in the image's own
    units.

    A neighbour whose weight is 0 is not loaded: where positions are centres of pixels, one is read for each, and its
    value comes out to the bit, whatever lies beside it.
    """
    h, wy = neighbours(y, image.H, REFLECT)
    w, wx = neighbours(x, image.W, REFLECT)
    red = tl.zeros_like(x)
    green = tl.zeros_like(x)
    blue = tl.zeros_like(x)
    for dy in tl.static_range(2):
        for dx in tl.static_range(2):
            row = h + dy
            column = w + dx
            inside = ok & (row >= 0) & (row < image.H) & (column >= 0) & (column < image.W)
            if dy == 1:
                inside = inside & (wy != 0)
            if dx == 1:
                inside = inside & (wx != 0)
            weight = (wy if dy == 1 else 1 - wy) * (wx if dx == 1 else 1 - wx)
            pixel_ptr = image.ptr + row * image.stride_h + column * image.stride_w
            red += weight * load_pixel(pixel_ptr, inside, fill.red)
            if C == 3:
                green += weight * load_pixel(pixel_ptr + image.stride_c, inside, fill.green)
                blue += weight * load_pixel(pixel_ptr + 2 * image.stride_c, inside, fill.blue)
    if image.ptr.dtype.element_ty == tl.uint8:
        red = divide_again(red, 255.0, 1 / 255)
        green = divide_again(green, 255.0, 1 / 255)
        blue = divide_again(blue, 255.0, 1 / 255)
    if C == 3:
        return Colour(red, green, blue)
    else:
        return Colour(red, red, red)


@triton.jit
@no_type_check
def look(images, maps_ptr, n, pixels, fill, a: tl.constexpr):
    """Image n at the places of some pixels of its result."""
    x, y = map_position(maps_ptr + 6 * n, pixels.q + 0.5, pixels.p + 0.5)
    return sample(find_image(images, n, a.C, a.channels_fast), x, y, pixels.ok, fill, a.C, a.reflect)
