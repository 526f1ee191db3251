"""The mean of the grey image, which contrast is relative to: of the image as it is warped and brightened, where no tile
knows more than its own pixels.

A launch before the augmentation leaves the sums of parts of each image. How an image is cut into parts follows from the
size of a result alone, and the parts are added in one order, so an image has the same mean to the bit in every batch.
"""

from __future__ import annotations

from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl

from ..rounding import round_quotient
from ..tiling import cdiv
from .colours import brighten, grey_of
from .sampling import look
from .sources import POINTERS, SIZES, Colour, ImageBatch
from .tiles import tile_pixels

LEAST_SPAN = 8  # so many tiles of an image one program adds up, and more where there would be too many parts
MOST_PARTS = 64  # what one load of each program of the augmentation takes


class MeanOperands(NamedTuple):
    """The images, their numbers, and the result: [N, parts] sums of the grey image in float32."""

    images: torch.Tensor
    offsets: torch.Tensor | None
    sizes: torch.Tensor | None
    maps: torch.Tensor
    colours: torch.Tensor
    sums: torch.Tensor


def mean_parts(tiles: int) -> tuple[int, int]:
    """Into how many parts an image of so many tiles is cut, and of how many tiles each of them is, but for the last."""
    span = max(LEAST_SPAN, cdiv(tiles, MOST_PARTS))
    return cdiv(tiles, span), span


@triton.jit(do_not_specialize=[*SIZES, "span"], do_not_specialize_on_alignment=[*POINTERS, "sums_ptr"])
@no_type_check
def grey_mean_kernel(
    images_ptr, offsets_ptr, sizes_ptr, maps_ptr, colours_ptr, sums_ptr,
    H, W, stride_n, stride_h, stride_w, stride_c, P, Q, parts, span, fill_red, fill_green, fill_blue,
    a: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """sums[n, part] = the sum over `span` tiles of the grey image after brightness. Where contrast stays, 0."""
    pid = tl.program_id(0)
    n = pid // parts
    part = pid % parts
    images = ImageBatch(images_ptr, offsets_ptr, sizes_ptr, H, W, stride_n, stride_h, stride_w, stride_c)
    fill = Colour(fill_red, fill_green, fill_blue)
    acc = tl.zeros((BLOCK_P * BLOCK_Q,), tl.float32)
    if tl.load(colours_ptr + 5 * n + 1) != 1:
        factor = tl.load(colours_ptr + 5 * n)
        tiles = tl.cdiv(P, BLOCK_P) * tl.cdiv(Q, BLOCK_Q)
        for tile in range(part * span, tl.minimum(part * span + span, tiles)):
            pixels = tile_pixels(tile, P, Q, BLOCK_P, BLOCK_Q)
            v = brighten(look(images, maps_ptr, n, pixels, fill, a), factor)
            acc += tl.where(pixels.ok, grey_of(v, a.C), 0.0)
    tl.store(sums_ptr + pid, tl.sum(acc, 0))


@triton.jit
@no_type_check
def grey_mean(numbers, n, pixels):
    """The mean that grey_mean_kernel left in parts."""
    part = tl.arange(0, 64)  # MOST_PARTS
    total = tl.sum(tl.load(numbers.sums + n * numbers.parts + part, mask=part < numbers.parts, other=0.0), 0)
    return round_quotient(total, (pixels.P * pixels.Q).to(tl.float32))
