"""A batch of images augmented in one launch, or in two where contrast changes.

Each program computes a tile of BLOCK_P x BLOCK_Q pixels of one result: where they lie in the image, the image's value
there, its colours, the boxes over it; then the same of the image's partner, where it has one, which is mixed in; and
the sum is normalised and stored. Nothing is written in between. Contrast needs the mean of the warped and brightened
image, which no tile knows: grey_mean_kernel goes before, and leaves sums of parts of each image.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl

from .. import launch, memory
from ..layout import Layout, dense, layout_of
from ..rounding import round_quotient
from ..tiling import cdiv
from .boxes import erase, lies_in_box
from .colours import brighten, grey_of, recolour
from .sampling import find_image, map_position, sample
from .sources import Colour, ImageBatch, ImageNumbers, ImageSource, NumberPointers, Pixels

NUM_WARPS = 4
MEAN_TILES = 4  # so many tiles of an image one program of grey_mean_kernel adds up, and more where parts would be many
MOST_PARTS = 64
RUNTIME = ["N", "H", "W", "stride_n", "stride_h", "stride_w", "stride_c", "P", "Q", "parts", "span"]


@dataclass(frozen=True, slots=True)
class PixelTile:
    """The pixels of a result that one program computes."""

    BLOCK_P: int
    BLOCK_Q: int

    def __str__(self) -> str:
        return f"{self.BLOCK_P}x{self.BLOCK_Q}"


# Higher than one row: the pixels that a turned tile needs lie close together then.
TILE = PixelTile(16, 32)


@dataclass(frozen=True, slots=True)
class Augmenting:
    """What all images of a batch have in common: the extents of a result, its dtype, and the numbers of each channel.

    fill: what lies beyond the border, in the unit of results before they are normalised (1 is white); mean and std: a
    result is (v - mean) / std. Each has one number a channel. reflect: the image's reflection lies beyond the border.
    """

    P: int
    Q: int
    dtype: torch.dtype
    fill: tuple[float, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    reflect: bool = False


class MeanOperands(NamedTuple):
    """The images, their numbers, and the result: [N, parts] sums of the grey image in float32."""

    images: torch.Tensor
    offsets: torch.Tensor | None
    sizes: torch.Tensor | None
    maps: torch.Tensor
    colours: torch.Tensor
    sums: torch.Tensor


class AugmentOperands(NamedTuple):
    """The images, their numbers, and the result y [N, C, P, Q], channels_last."""

    images: torch.Tensor
    offsets: torch.Tensor | None
    sizes: torch.Tensor | None
    maps: torch.Tensor
    colours: torch.Tensor | None
    sums: torch.Tensor | None
    boxes: torch.Tensor | None
    noise: torch.Tensor | None
    partners: torch.Tensor | None
    y: torch.Tensor


class AugmentVariant(NamedTuple):
    """What the kernels are compiled for: their constexpr argument `a`.

    channels_fast: the channels of a pixel are adjacent. boxes: how many an image has. parts: a power of two that is at
    least the number of parts of a grey image.
    """

    C: int
    channels_fast: bool
    reflect: bool
    boxes: int
    parts: int


@triton.jit
@no_type_check
def tile_pixels(tile, P, Q, BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr):
    """The pixels of a tile of a result, the tiles counted row by row."""
    lane = tl.arange(0, BLOCK_P * BLOCK_Q)
    tiles_q = tl.cdiv(Q, BLOCK_Q)
    p = tile // tiles_q * BLOCK_P + lane // BLOCK_Q
    q = tile % tiles_q * BLOCK_Q + lane % BLOCK_Q
    return Pixels(p, q, (p < P) & (q < Q), P, Q)


@triton.jit
@no_type_check
def look(images, maps_ptr, n, pixels, fill, a: tl.constexpr):
    """Image n at the places of some pixels of its result."""
    x, y = map_position(maps_ptr + 6 * n, pixels.q + 0.5, pixels.p + 0.5)
    return sample(find_image(images, n, a.C, a.channels_fast), x, y, pixels.ok, fill, a.C, a.reflect)


@triton.jit(do_not_specialize=RUNTIME)
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
def grey_mean(sums_ptr, n, parts, pixels, PARTS: tl.constexpr):
    """The mean that grey_mean_kernel left in parts."""
    part = tl.arange(0, PARTS)
    total = tl.sum(tl.load(sums_ptr + n * parts + part, mask=part < parts, other=0.0), 0)
    return round_quotient(total, (pixels.P * pixels.Q).to(tl.float32))


@triton.jit
@no_type_check
def view(images, numbers, n, pixels, parts, fill, mean, std, a: tl.constexpr):
    """Some pixels of result n, but for its partner and the normalisation."""
    v = look(images, numbers.maps, n, pixels, fill, a)
    if numbers.colours is not None:
        if numbers.sums is None:
            v = recolour(v, numbers.colours + 5 * n, None, a.C)
        else:
            v = recolour(v, numbers.colours + 5 * n, grey_mean(numbers.sums, n, parts, pixels, a.parts), a.C)
    if numbers.boxes is not None:
        v = erase(v, numbers.boxes, numbers.noise, n, pixels, mean, std, a.C, a.boxes)
    return v


@triton.jit
@no_type_check
def mix(v, other, weight, in_box):
    """weight * v + (1 - weight) * other, and `other` alone in the box."""
    v = weight * v + (1 - weight) * other
    return tl.where(in_box, other, v)


@triton.jit
@no_type_check
def store_normalised(y_ptr, v, mean, std, ok):
    y = round_quotient(v - mean, tl.zeros_like(v) + std)
    tl.store(y_ptr, y.to(y_ptr.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=RUNTIME)
@no_type_check
def augment_kernel(
    images_ptr, offsets_ptr, sizes_ptr, maps_ptr, colours_ptr, sums_ptr, boxes_ptr, noise_ptr, partners_ptr, y_ptr,
    N, H, W, stride_n, stride_h, stride_w, stride_c, P, Q, parts, fill_red, fill_green, fill_blue,
    mean_red, mean_green, mean_blue, std_red, std_green, std_blue,
    a: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """y[n] = image n as its numbers say."""
    tiles = tl.cdiv(P, BLOCK_P) * tl.cdiv(Q, BLOCK_Q)
    pid = tl.program_id(0)
    n = pid // tiles
    pixels = tile_pixels(pid % tiles, P, Q, BLOCK_P, BLOCK_Q)
    images = ImageBatch(images_ptr, offsets_ptr, sizes_ptr, H, W, stride_n, stride_h, stride_w, stride_c)
    numbers = NumberPointers(maps_ptr, colours_ptr, sums_ptr, boxes_ptr, noise_ptr)
    fill = Colour(fill_red, fill_green, fill_blue)
    mean = Colour(mean_red, mean_green, mean_blue)
    std = Colour(std_red, std_green, std_blue)

    v = view(images, numbers, n, pixels, parts, fill, mean, std, a)
    if partners_ptr is not None:
        partner_ptr = partners_ptr + 6 * n
        weight = tl.load(partner_ptr + 1)
        in_box = lies_in_box(partner_ptr + 2, pixels)
        if (weight != 1) | (tl.max(in_box.to(tl.int32), 0) != 0):
            partner = tl.minimum(tl.maximum(tl.load(partner_ptr), 0.0), (N - 1).to(tl.float32)).to(tl.int32)
            other = view(images, numbers, partner, pixels, parts, fill, mean, std, a)
            v = Colour(
                mix(v.red, other.red, weight, in_box),
                mix(v.green, other.green, weight, in_box),
                mix(v.blue, other.blue, weight, in_box),
            )

    pixel_ptr = y_ptr + n.to(tl.int64) * P * Q * a.C + (pixels.p * Q + pixels.q) * a.C
    store_normalised(pixel_ptr, v.red, mean.red, std.red, pixels.ok)
    if a.C == 3:
        store_normalised(pixel_ptr + 1, v.green, mean.green, std.green, pixels.ok)
        store_normalised(pixel_ptr + 2, v.blue, mean.blue, std.blue, pixels.ok)


class AugmentPlan(NamedTuple):
    """The launches of a batch, and the layouts of their results. `first` is there where contrast changes."""

    y: Layout
    launch: launch.Launch[AugmentOperands]
    sums: Layout | None = None
    first: launch.Launch[MeanOperands] | None = None


def _channels(values: tuple[float, ...]) -> tuple[float, float, float]:
    return (values[0], values[-2 % len(values)], values[-1])


def _parts(augmenting: Augmenting, tile: PixelTile) -> tuple[int, int]:
    """Into how many parts grey_mean_kernel cuts an image, and of how many tiles each is: by the size of a result alone,
    so that an image has the same mean to the bit in every batch.
    """
    tiles = cdiv(augmenting.P, tile.BLOCK_P) * cdiv(augmenting.Q, tile.BLOCK_Q)
    span = max(MEAN_TILES, cdiv(tiles, MOST_PARTS))
    return cdiv(tiles, span), span


@launch.planned
def _plan(
    source: Layout, ragged: int | None, augmenting: Augmenting, contrast: bool, boxes: int, tile: PixelTile
) -> AugmentPlan:
    """`ragged`: how many images of different sizes; None: `source` is [N, C, H, W]. boxes: how many an image has."""
    a, C = augmenting, len(augmenting.mean)
    if ragged is None:
        (N, _, H, W), (stride_n, stride_c, stride_h, stride_w) = source.shape, source.strides
    else:
        N, H, W, stride_n, stride_c, stride_h, stride_w = ragged, 0, 0, 0, 1, 0, 0
    unit = 255 if source.dtype == torch.uint8 else 1
    fill = _channels(tuple(v * unit for v in a.fill))
    parts, span = _parts(a, tile)
    variant = AugmentVariant(C, stride_c == 1, a.reflect, boxes, triton.next_power_of_2(parts) if contrast else 1)
    common = {
        "tile": tile, "a": variant, "BLOCK_P": tile.BLOCK_P, "BLOCK_Q": tile.BLOCK_Q, "num_warps": NUM_WARPS,
    }  # fmt: skip
    tiles = cdiv(a.P, tile.BLOCK_P) * cdiv(a.Q, tile.BLOCK_Q)
    y = dense((N, C, a.P, a.Q), a.dtype, torch.channels_last)
    whole = launch.Launch[AugmentOperands](
        augment_kernel, (N * tiles,), N, H, W, stride_n, stride_h, stride_w, stride_c, a.P, a.Q, parts, *fill,
        *_channels(a.mean), *_channels(a.std), **common,
    )  # fmt: skip
    if not contrast:
        return AugmentPlan(y, whole)
    first = launch.Launch[MeanOperands](
        grey_mean_kernel, (N * parts,), H, W, stride_n, stride_h, stride_w, stride_c, a.P, a.Q, parts, span, *fill,
        **common,
    )  # fmt: skip
    return AugmentPlan(y, whole, dense((N, parts), torch.float32), first)


def augment_batch(
    source: ImageSource, numbers: ImageNumbers, augmenting: Augmenting, contrast: bool = True, tile: PixelTile = TILE
) -> torch.Tensor:
    """The batch [N, C, P, Q] in channels_last. Not contrast: the factors of contrast in `colours` are all 1."""
    contrast = contrast and numbers.colours is not None
    ragged = None if source.offsets is None else len(source.offsets)
    boxes = 0 if numbers.boxes is None else numbers.boxes.shape[1]
    plan = _plan(layout_of(source.images), ragged, augmenting, contrast, boxes, tile)
    sums = None
    if plan.first is not None:
        assert plan.sums is not None
        assert numbers.colours is not None
        sums = memory.empty(plan.sums, source.images)
        plan.first(MeanOperands(*source, numbers.maps, numbers.colours, sums))
    y = memory.empty(plan.y, source.images)
    plan.launch(
        AugmentOperands(*source, numbers.maps, numbers.colours, sums, numbers.boxes, numbers.noise, numbers.partners, y)
    )
    return y
