"""What happens to the colours of a pixel, in this order: brightness, contrast, saturation, hue, grey.

Each step computes what torchvision's transform of that name does on floating images, and ends within [0, 1] as there
(torchvision.transforms.v2.functional: adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue,
rgb_to_grayscale).
"""

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl

from ..rounding import round_quotient
from .sources import Colour


@triton.jit
@no_type_check
def clip(v):
    """v within [0, 1]; what is no number stays none."""
    v = tl.where(v < 0, 0.0, v)
    return tl.where(v > 1, 1.0, v)


@triton.jit
@no_type_check
def grey_of(v, C: tl.constexpr):
    """The brightness that an eye sees in a colour, by the weights of ITU-R BT.601 as torchvision rounds them."""
    if C == 3:
        return v.red * 0.2989 + v.green * 0.587 + v.blue * 0.114
    else:
        return v.red


@triton.jit
@no_type_check
def blend(v, other, factor):
    """factor * v + (1 - factor) * other, each channel within [0, 1]. At factor 1 that is v to the bit."""
    rest = (1 - factor) * other
    return Colour(clip(v.red * factor + rest), clip(v.green * factor + rest), clip(v.blue * factor + rest))


@triton.jit
@no_type_check
def brighten(v, factor):
    return Colour(clip(v.red * factor), clip(v.green * factor), clip(v.blue * factor))


@triton.jit
@no_type_check
def hue_channel(sixths, value, range_, corner: tl.constexpr):
    """One channel of the colour whose hue is so many sixths of a turn: `corner` is 5, 3 and 1 for red, green and blue
    (HSV to RGB, as in https://en.wikipedia.org/wiki/HSL_and_HSV).
    """
    k = corner + sixths
    k = k - 6 * tl.floor(k * (1 / 6))
    distance = tl.where(k < 4 - k, k, 4 - k)
    return clip(value - range_ * clip(distance))


@triton.jit
@no_type_check
def turn_hue(v, turns):
    """The colour with its hue shifted by `turns`, its largest and its smallest channel kept."""
    value = tl.maximum(tl.maximum(v.red, v.green), v.blue)
    range_ = value - tl.minimum(tl.minimum(v.red, v.green), v.blue)
    is_red = value == v.red
    is_green = value == v.green
    lead = tl.where(is_red, v.green - v.blue, tl.where(is_green, v.blue - v.red, v.red - v.green))
    corner = tl.where(is_red, 0.0, tl.where(is_green, 2.0, 4.0))
    sixths = round_quotient(lead, tl.where(range_ == 0, 1.0, range_)) + corner + 6 * turns
    return Colour(
        hue_channel(sixths, value, range_, 5),
        hue_channel(sixths, value, range_, 3),
        hue_channel(sixths, value, range_, 1),
    )


@triton.jit
@no_type_check
def recolour(v, colours_ptr, mean, C: tl.constexpr):
    """Everything in its order, by the five numbers of an image. `mean` is that of the grey image after `brighten`."""
    v = brighten(v, tl.load(colours_ptr))
    if mean is not None:
        v = blend(v, mean, tl.load(colours_ptr + 1))
    if C == 3:
        v = blend(v, grey_of(v, C), tl.load(colours_ptr + 2))
        turns = tl.load(colours_ptr + 3)
        if turns != 0:
            v = turn_hue(v, turns)
        if tl.load(colours_ptr + 4) != 0:
            grey = grey_of(v, C)
            v = Colour(grey, grey, grey)
    return v
