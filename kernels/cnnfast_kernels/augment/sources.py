"""What a batch is augmented from: the images, and the numbers given for each of them.

Positions are in pixels, and continuous: pixel (p, q) of a result covers [q, q + 1) x [p, p + 1), and its centre is (q +
0.5, p + 0.5). So a map without rotation, scale or half a pixel is exact in float32.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch


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
    """The numbers, in a kernel; `sums` of the grey image as grey_mean_kernel leaves them."""

    maps: Any
    colours: Any
    sums: Any
    boxes: Any
    noise: Any


class Pixels(NamedTuple):
    """Some pixels of a result, in a kernel: their rows and columns, which of them there are, and the result's extents."""

    p: Any
    q: Any
    ok: Any
    P: Any
    Q: Any


class Colour(NamedTuple):
    """A number for each channel, in a kernel. An image of one channel has it three times."""

    red: Any
    green: Any
    blue: Any
