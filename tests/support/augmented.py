"""F.augment in float64, by mathematics of its own, and how far a computation in float32 may be from it.

Nothing here is the kernel's: a pixel beyond the border is looked up in the image as it goes on without end, hues are
turned in HSV as the standard library's colorsys does it, and noise comes from whole numbers of Python's width.

Each step returns Known: the value, and a bound of the error of any reasonable computation in float32, which is carried
from step to step. A bound has two parts:

- what the step makes of the errors of its inputs: the error of a position times the steepest difference of neighbouring
  pixels around it, a factor times the error of what it multiplies, three times the largest error of a pixel's channels
  where its hue is turned, and never more than the interval [0, 1] leaves room for where it is clipped to it;
- what its own operations round: UNIT times the numbers that are rounded, once for each operation.

So a bound is as wide as the image is steep and its map is large, and no wider: about 1e-6 for most pixels.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

UNIT = 2.0**-24  # half the distance of 1 to the next larger float32
GREY = (0.2989, 0.587, 0.114)
# What a GPU's fast logarithm may miss of log2, and its sine and cosine of theirs (CUDA's Programming Guide).
OF_LOG, OF_COSINE = 2.0**-21, 2.0**-19


class Known(NamedTuple):
    """Numbers in float64, and by how much a computation in float32 may miss each of them."""

    value: Tensor
    error: Tensor

    def clipped(self) -> Known:
        """Within [0, 1]: of the error remains what fits into it."""
        value = self.value.clamp(0, 1)
        above, below = (self.value + self.error).clamp(0, 1), (self.value - self.error).clamp(0, 1)
        return Known(value, torch.maximum(above - value, value - below))

    def times(self, factor: float, roundings: int = 1) -> Known:
        value = self.value * factor
        return Known(value, self.error * abs(factor) + value.abs() * UNIT * roundings)

    def plus(self, other: Known) -> Known:
        value = self.value + other.value
        return Known(value, self.error + other.error + value.abs() * UNIT)

    def where(self, mask: Tensor, other: Known) -> Known:
        return Known(torch.where(mask, other.value, self.value), torch.where(mask, other.error, self.error))


class Given(NamedTuple):
    """The arguments of F.augment but for the images, with each image's numbers as tensors on the CPU or None."""

    maps: Tensor | None
    colours: Tensor | None
    boxes: Tensor | None
    partners: Tensor | None
    size: tuple[int, int]
    mean: Sequence[float]
    std: Sequence[float]
    dtype: torch.dtype = torch.float32
    border: str = "constant"
    fill: Sequence[float] = (0.0,)
    noise: Tensor | None = None


def augmented(images: Sequence[Tensor], given: Given) -> Known:
    """[N, C, P, Q] of `images`, which are [C, H, W] each: uint8, or floating within [0, 1]."""
    images = [(image.double() / 255 if image.dtype == torch.uint8 else image.double()) for image in images]
    seen = [look(image, n, given) for n, image in enumerate(images)]
    if given.partners is not None:
        seen = [mixed(one, seen, given.partners[n].double()) for n, one in enumerate(seen)]
    C = images[0].shape[0]
    mean, std = (column(numbers, C) for numbers in (given.mean, given.std))
    values, errors = (torch.stack(parts) for parts in zip(*seen, strict=True))
    y = (values - mean) / std
    error = (errors + 3 * UNIT * (values.abs() + mean.abs())) / std
    return rounded(Known(y, error), given.dtype)


def rounded(y: Known, dtype: torch.dtype) -> Known:
    """What storing in `dtype` adds: half the distance of its neighbours there."""
    one = torch.finfo(dtype)
    return Known(y.value, y.error + (y.value.abs() + y.error) * (one.eps / 2) + one.smallest_normal * one.eps)


def column(numbers: Sequence[float], C: int) -> Tensor:
    """A number for each channel as [C, 1, 1], as float32 holds them; one number is all channels'."""
    return torch.tensor(numbers, dtype=torch.float32).double().expand(C)[:, None, None]


def look(image: Tensor, n: int, given: Given) -> Known:
    """One image as its own numbers say, its partner and the normalisation left out."""
    C, H, W = image.shape
    P, Q = given.size
    one = torch.tensor([[W / Q, 0, 0], [0, H / P, 0]]).double() if given.maps is None else given.maps[n].double()
    v = warped(image, one, given.size, given.border, column(given.fill, C))
    if given.colours is not None:
        v = coloured(v, *given.colours[n].tolist())
    if given.boxes is not None:
        mean, std = column(given.mean, C), column(given.std, C)
        for box in given.boxes[n].double():
            if given.noise is None:
                filling = box[4:, None, None].expand_as(v.value)
                filling = Known(filling, torch.zeros_like(filling))
            else:
                noise = normal_noise(int(given.noise[n]), given.size)
                filling = Known(
                    mean + std * noise.value[:C], std * (noise.error[:C] + 4 * UNIT * noise.value[:C].abs())
                )
                filling = Known(filling.value, filling.error + 3 * UNIT * mean.abs())
            v = v.where(covered(box, given.size), filling)
    return v


# ----------------------------------------------------------------------------------------------------------------------
# The map


def centres(size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """x [Q] and y [P, 1] of the centres of a result's pixels."""
    P, Q = size
    return torch.arange(Q).double() + 0.5, (torch.arange(P).double() + 0.5)[:, None]


def warped(image: Tensor, one: Tensor, size: tuple[int, int], border: str, fill: Tensor) -> Known:
    """The image [C, H, W] through the map `one`, [2, 3], on a result of `size`."""
    x, y = centres(size)
    positions, errors = [], []
    for row, extent in zip(one, reversed(image.shape[1:]), strict=True):
        terms = row[0] * x, row[1] * y, row[2].expand(size)
        positions.append(sum(terms) - 0.5)
        errors.append(4 * UNIT * (sum(term.abs() for term in terms) + extent))
    (u, v), (u_error, v_error) = positions, errors
    assert max(u_error.max(), v_error.max()) < 1  # else more pixels than the sixteen below would count
    left, top = u.floor(), v.floor()
    wu, wv = u - left, v - top
    around = torch.stack(
        [
            torch.stack([without_end(image, top.long() + dy, left.long() + dx, border, fill) for dx in range(-1, 3)])
            for dy in range(-1, 3)
        ]
    )  # [4, 4, C, P, Q]
    upper, lower = (around[i, 1] * (1 - wu) + around[i, 2] * wu for i in (1, 2))
    value = upper * (1 - wv) + lower * wv
    steepness_u = around.diff(dim=1).abs().amax((0, 1))
    steepness_v = around.diff(dim=0).abs().amax((0, 1))
    return Known(value, steepness_u * u_error + steepness_v * v_error + 8 * UNIT * around.abs().amax((0, 1)))


def without_end(image: Tensor, rows: Tensor, columns: Tensor, border: str, fill: Tensor) -> Tensor:
    """The pixels [C, P, Q] in these rows and columns of an image that goes on beyond its border."""
    _, H, W = image.shape
    if border == "reflection":
        return image[:, mirrored(rows, H), mirrored(columns, W)]
    inside = (rows >= 0) & (rows < H) & (columns >= 0) & (columns < W)
    return torch.where(inside, image[:, rows.clamp(0, H - 1), columns.clamp(0, W - 1)], fill)


def mirrored(i: Tensor, extent: int) -> Tensor:
    """0 1 2 | 2 1 0 | 0 1 2 ...: the mirror stands at the outer edge of the last pixel."""
    i = i % (2 * extent)
    return torch.minimum(i, 2 * extent - 1 - i)


# ----------------------------------------------------------------------------------------------------------------------
# Colours


def coloured(v: Known, brightness: float, contrast: float, saturation: float, hue: float, grey: float) -> Known:
    v = v.times(brightness).clipped()
    mean = grey_of(v)
    v = blended(v, Known(mean.value.mean(), mean.error.mean() + 32 * UNIT * mean.value.mean()), contrast)
    if len(v.value) == 1:
        return v
    v = blended(v, grey_of(v), saturation)
    if hue:
        v = hue_turned(v, hue)
    return Known(*(part.expand_as(v.value) for part in grey_of(v))) if grey else v


def grey_of(v: Known) -> Known:
    """[1, P, Q]."""
    if len(v.value) == 1:
        return v
    weights = torch.tensor(GREY).double()[:, None, None]
    value = (v.value * weights).sum(0, keepdim=True)
    return Known(value, (v.error * weights).sum(0, keepdim=True) + 4 * UNIT * value.abs())


def blended(v: Known, other: Known, factor: float) -> Known:
    if factor == 1:
        return v.clipped()
    return v.times(factor).plus(other.times(1 - factor, 2)).clipped()


def hue_turned(v: Known, turns: float) -> Known:
    """Through HSV and back. As a function of the three channels this is continuous, linear in pieces, and moves by no
    more than three times what the channel that moves most does: in each piece a channel of the result is the largest
    or the smallest channel, or largest - a (largest - smallest) +- (one channel - another), where a lies in [-1, 1] for
    the upper sign and in [0, 2] for the lower.
    """
    error = 3 * v.error.amax(0)
    largest, smallest = v.value.amax(0), v.value.amin(0)
    # Sixths of a turn reach up to 9, are rounded up to six times, and count as parts of the range.
    rounding = (64 * (largest - smallest) + 2 * largest) * UNIT
    red, green, blue = (channel.flatten().tolist() for channel in v.value)
    turned = [turn_hue_of_colour(*colour, turns) for colour in zip(red, green, blue, strict=True)]
    value = torch.tensor(turned).double().T.reshape(v.value.shape)
    return Known(value, (error + rounding).expand_as(value)).clipped()


def turn_hue_of_colour(red: float, green: float, blue: float, turns: float) -> tuple[float, float, float]:
    """Of one pixel."""
    hue, saturation, value = colorsys.rgb_to_hsv(red, green, blue)
    return colorsys.hsv_to_rgb((hue + turns) % 1.0, saturation, value)


# ----------------------------------------------------------------------------------------------------------------------
# Boxes and partners


def covered(box: Tensor, size: tuple[int, int]) -> Tensor:
    """Which pixels' centres lie in a box (left, top, right, bottom)."""
    x, y = centres(size)
    left, top, right, bottom = box[:4]
    return (left <= x) & (x < right) & (top <= y) & (y < bottom)


def mixed(v: Known, seen: Sequence[Known], partner: Tensor) -> Known:
    other, weight = seen[int(partner[0])], float(partner[1])
    whole = v if weight == 1 else v.times(weight).plus(other.times(1 - weight, 2))
    return whole.where(covered(partner[2:], v.value.shape[1:]), other)


def philox(counter: np.ndarray, key: int) -> list[np.ndarray]:
    """Four numbers of 32 bits for each counter (counter, 0, 0, 0): Philox4x32-10, from J. Salmon et al., Parallel
    random numbers: as easy as 1, 2, 3, 2011.
    """
    low, high = np.uint64(0xFFFFFFFF), np.uint64(32)
    c = [counter.astype(np.uint64), *(np.zeros(counter.shape, np.uint64) for _ in range(3))]
    keys = [key & 0xFFFFFFFF, key >> 32 & 0xFFFFFFFF]
    for _ in range(10):
        a, b = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [b >> high ^ c[1] ^ np.uint64(keys[0]), b & low, a >> high ^ c[3] ^ np.uint64(keys[1]), a & low]
        keys = [(k + bump) & 0xFFFFFFFF for k, bump in zip(keys, (0x9E3779B9, 0xBB67AE85), strict=True)]
    return c


def normal_noise(seed: int, size: tuple[int, int]) -> Known:
    """[3, P, Q], normal: Box and Muller's transform of four numbers of Philox for each pixel, by its index."""
    bits = philox(np.arange(math.prod(size)), seed)
    a, b, c, d = ((torch.from_numpy(each.astype(np.float64)) + 0.5) * 2.0**-32 for each in bits)
    first, second = (radius(p) for p in (a, c))
    parts = [
        (first, torch.cos(2 * math.pi * b)),
        (first, torch.sin(2 * math.pi * b)),
        (second, torch.cos(2 * math.pi * d)),
    ]
    value = torch.stack([r.value * wave for r, wave in parts]).view(3, *size)
    error = torch.stack([r.error + r.value * OF_COSINE for r, _ in parts]).view(3, *size)
    return Known(value, error)


def radius(p: Tensor) -> Known:
    """sqrt(-2 log p). Near p = 1 the root is steep, and an error of its argument grows in it."""
    square = -2 * p.log()
    error = 2 * OF_LOG + 4 * UNIT * (1 + square)
    value = square.sqrt()
    above, below = (square + error).sqrt() - value, value - (square - error).clamp(min=0).sqrt()
    return Known(value, torch.maximum(above, below) + 2 * UNIT * value)
