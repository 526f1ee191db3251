"""Boxes of an image that are filled: with a colour, or with noise."""

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl

from ..rounding import round_root
from .sources import Colour, PixelBox


@triton.jit
@no_type_check
def load_box(box_ptr):
    return PixelBox(tl.load(box_ptr), tl.load(box_ptr + 1), tl.load(box_ptr + 2), tl.load(box_ptr + 3))


@triton.jit
@no_type_check
def lies_in_box(box, pixels):
    """Which pixels' centres lie in the box."""
    x = pixels.q + 0.5
    y = pixels.p + 0.5
    return (x >= box.left) & (x < box.right) & (y >= box.top) & (y < box.bottom)


@triton.jit
@no_type_check
def meets_tile(box, pixels):
    """Whether the tile of these pixels and the box overlap. If not, no pixel lies in the box."""
    tile = pixels.tile
    return (box.left < tile.right) & (box.right > tile.left) & (box.top < tile.bottom) & (box.bottom > tile.top)


@triton.jit
@no_type_check
def as_probability(bits):
    """32 random bits as a number within (0, 1]."""
    return (bits.to(tl.float32) + 0.5) * (1 / 4294967296)


@triton.jit
@no_type_check
def cos_and_sin(turns):
    """Cosine and sine of an angle in turns, 0 to 1, to about 1e-7: by the polynomials of Cephes (sinf.c), within an
    eighth of a turn of a multiple of a quarter.

    tl.cos would be a call that reads local memory for angles that are large; these never are.
    """
    quarter = tl.floor(4 * turns + 0.5)
    u = (turns - 0.25 * quarter) * 6.283185307179586
    uu = u * u
    sine = u + u * uu * ((-1.9515295891e-4 * uu + 8.3321608736e-3) * uu - 1.6666654611e-1)
    cosine = 1 - 0.5 * uu + uu * uu * ((2.443315711809948e-5 * uu - 1.388731625493765e-3) * uu + 4.166664568298827e-2)
    odd = (quarter == 1) | (quarter == 3)
    along = tl.where(odd, sine, cosine)
    across = tl.where(odd, cosine, sine)
    return (
        tl.where((quarter == 1) | (quarter == 2), -along, along),
        tl.where((quarter == 2) | (quarter == 3), -across, across),
    )


@triton.jit
@no_type_check
def normal_noise(seed, pixel):
    """Three normal numbers for each pixel, by its index: Philox4x32-10 (Salmon et al., 2011) of counter (pixel, 0, 0,
    0) and key `seed`, then Box and Muller's transform.
    """
    a, b, c, d = tl.randint4x(seed, pixel)
    radius = round_root(-2 * tl.log(as_probability(a)))
    cosine, sine = cos_and_sin(as_probability(b))
    radius_blue = round_root(-2 * tl.log(as_probability(c)))
    cosine_blue, _ = cos_and_sin(as_probability(d))
    return Colour(radius * cosine, radius * sine, radius_blue * cosine_blue)


@triton.jit
@no_type_check
def fill_box(box_ptr, noise_ptr, n, pixels, mean, std, C: tl.constexpr):
    """What a box of image n is filled with: the values that follow its corners, or noise where there are seeds."""
    if noise_ptr is not None:
        noise = normal_noise(tl.load(noise_ptr + n), pixels.p * pixels.Q + pixels.q)
        return Colour(
            mean.red + std.red * noise.red, mean.green + std.green * noise.green, mean.blue + std.blue * noise.blue
        )
    elif C == 3:
        return Colour(tl.load(box_ptr + 4), tl.load(box_ptr + 5), tl.load(box_ptr + 6))
    else:
        value = tl.load(box_ptr + 4)
        return Colour(value, value, value)


@triton.jit
@no_type_check
def erase(v, numbers, n, pixels, mean, std, C: tl.constexpr):
    """v, but in the boxes of image n what fills them. Tiles that no box meets pay for no noise."""
    COLUMNS: tl.constexpr = 4 if numbers.noise is not None else 4 + C
    for b in range(numbers.box_count):
        box_ptr = numbers.boxes + (n.to(tl.int64) * numbers.box_count + b) * COLUMNS
        box = load_box(box_ptr)
        if meets_tile(box, pixels):
            filling = fill_box(box_ptr, numbers.noise, n, pixels, mean, std, C)
            inside = lies_in_box(box, pixels)
            v = Colour(
                tl.where(inside, filling.red, v.red),
                tl.where(inside, filling.green, v.green),
                tl.where(inside, filling.blue, v.blue),
            )
    return v
