"""Boxes of an image that are filled: with a colour, or with noise."""

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl

from .sources import Colour


@triton.jit
@no_type_check
def lies_in_box(box_ptr, pixels):
    """Which pixels' centres lie in the box [left, top, right, bottom]."""
    left, top, right, bottom = tl.load(box_ptr), tl.load(box_ptr + 1), tl.load(box_ptr + 2), tl.load(box_ptr + 3)
    x = pixels.q + 0.5
    y = pixels.p + 0.5
    return (x >= left) & (x < right) & (y >= top) & (y < bottom)


@triton.jit
@no_type_check
def as_probability(bits):
    """32 random bits as a number within (0, 1]."""
    return (bits.to(tl.float32) + 0.5) * (1 / 4294967296)


@triton.jit
@no_type_check
def normal_noise(seed, pixel):
    """Three normal numbers for each pixel, by its index: Philox4x32-10 (Salmon et al., 2011) of counter (pixel, 0, 0,
    0) and key `seed`, then Box and Muller's transform.
    """
    a, b, c, d = tl.randint4x(seed, pixel)
    radius = tl.sqrt(-2 * tl.log(as_probability(a)))
    angle = as_probability(b) * 6.283185307179586
    radius_blue = tl.sqrt(-2 * tl.log(as_probability(c)))
    angle_blue = as_probability(d) * 6.283185307179586
    return Colour(radius * tl.cos(angle), radius * tl.sin(angle), radius_blue * tl.cos(angle_blue))


@triton.jit
@no_type_check
def erase(v, boxes_ptr, noise_ptr, n, pixels, mean, std, C: tl.constexpr, BOXES: tl.constexpr):
    """v, but in the boxes of image n what fills them. `noise_ptr` None: the values that follow a box's corners."""
    if noise_ptr is not None:
        noise = normal_noise(tl.load(noise_ptr + n), pixels.p * pixels.Q + pixels.q)
        noise = Colour(
            mean.red + std.red * noise.red, mean.green + std.green * noise.green, mean.blue + std.blue * noise.blue
        )
    COLUMNS: tl.constexpr = 4 if noise_ptr is not None else 4 + C
    for b in tl.static_range(BOXES):
        box_ptr = boxes_ptr + (n * BOXES + b) * COLUMNS
        inside = lies_in_box(box_ptr, pixels)
        if noise_ptr is not None:
            filling = noise
        elif C == 3:
            filling = Colour(tl.load(box_ptr + 4), tl.load(box_ptr + 5), tl.load(box_ptr + 6))
        else:
            filling = Colour(tl.load(box_ptr + 4), tl.load(box_ptr + 4), tl.load(box_ptr + 4))
        v = Colour(
            tl.where(inside, filling.red, v.red),
            tl.where(inside, filling.green, v.green),
            tl.where(inside, filling.blue, v.blue),
        )
    return v
