"""What a batch is augmented from: the images, and the numbers given for each of them.

Positions are in pixels, and continuous: pixel (p, q) of a result covers [q, q + 1) x [p, p + 1), and its centre is (q +
0.5, p + 0.5). So a map without rotation, scale or half a pixel is exact in float32.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

MAX_EXTENT = 2**20 - 1  # of images and results, in pixels: positions among them are exact to an eighth of a pixel
MAX_ELEMENTS = 2**31 - 1  # from the first to the last of one image, or of one result: they are counted in 32 bits
# Parameters of both kernels. Nothing is compiled for a value of the one or an address of the other: numbers of several
# kinds may share one copy to the GPU, in which they lie as they come, and images a buffer. No load is wider than one.
SIZES = ("H", "W", "stride_n", "stride_h", "stride_w", "stride_c", "P", "Q", "parts")
POINTERS = ("images_ptr", "offsets_ptr", "sizes_ptr", "maps_ptr", "colours_ptr")


class ImageSource(NamedTuple):
    """The images: [N, C, H, W] with any strides, of uint8 or a floating dtype; or, of different sizes, a flat buffer of
    uint8 in which image n, [H, W, C], starts at `offsets`[n] (int64) with `sizes`[n] = (H, W) (int32, [N, 2]).
    """

    images: torch.Tensor
    offsets: torch.Tensor | None = None
    sizes: torch.Tensor | None = None


class ImageNumbers(NamedTuple):
    """The numbers of each image, on the device of the images, contiguous; what is None is not done.

    maps: float32 [N, 2, 3], from a position (x, y) in the result to that in the image: x' = m00 x + m01 y + m02, y' =
        m10 x + m11 y + m12.
    colours: float32 [N, 5]: factors of brightness, contrast and saturation, the shift of hue in turns, and whether the
        image becomes grey (0: it does not).
    boxes: float32 [N, B, 4 + C] or, with noise, [N, B, 4]: left, top, right, bottom in pixels of the result, and the
        value of each channel that the box is filled with. Of boxes that overlap the last one is seen.
    noise: int64 [N], seeds of what boxes are filled with in the place of values: normal noise of the normalised image.
    partners: float32 [N, 6]: index of another image in the batch, the weight of this one (the other's is 1 - weight),
        and left, top, right, bottom of a box in which only the other is seen.
    """

    maps: torch.Tensor
    colours: torch.Tensor | None = None
    boxes: torch.Tensor | None = None
    noise: torch.Tensor | None = None
    partners: torch.Tensor | None = None


class AugmentVariant(NamedTuple):
    """What the kernels are compiled for: their constexpr argument `a`. channels_fast: the channels of a pixel are
    adjacent.
    """

    C: int
    channels_fast: bool
    reflect: bool


class ImageBatch(NamedTuple):
    """The images, in a kernel: pointers, and what all of them have in common where they are of one size."""

    ptr: Any
    offsets: Any
    sizes: Any
    H: Any
    W: Any
    stride_n: Any
    stride_h: Any
    stride_w: Any
    stride_c: Any


class OneImage(NamedTuple):
    """One image, in a kernel."""

    ptr: Any
    H: Any
    W: Any
    stride_h: Any
    stride_w: Any
    stride_c: Any


class NumberPointers(NamedTuple):
    """The numbers, in a kernel; `sums` of the grey image as grey_mean_kernel leaves them, in so many `parts`, and
    `box_count` boxes of each image.
    """

    maps: Any
    colours: Any
    sums: Any
    parts: Any
    boxes: Any
    box_count: Any
    noise: Any


class PixelBox(NamedTuple):
    """A part of a result, in a kernel. Its borders are float32, in pixels."""

    left: Any
    top: Any
    right: Any
    bottom: Any


class Pixels(NamedTuple):
    """The pixels of a tile of a result, in a kernel: their rows and columns, which of them there are, the result's
    extents, and the tile's borders.
    """

    p: Any
    q: Any
    ok: Any
    P: Any
    Q: Any
    tile: Any


class Colour(NamedTuple):
    """A number for each channel, in a kernel. An image of one channel has it three times."""

    red: Any
    green: Any
    blue: Any
