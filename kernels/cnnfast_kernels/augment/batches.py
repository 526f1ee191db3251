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
from ..layout import Layout, dense
from ..rounding import divide_again
from .boxes import erase, lies_in_box, load_box, meets_tile
from .colours import recolour
from .means import MeanOperands, grey_mean, grey_mean_kernel, mean_parts
from .sampling import look
from .sources import (
    MAX_ELEMENTS,
    MAX_EXTENT,
    POINTERS,
    SIZES,
    AugmentVariant,
    Colour,
    ImageBatch,
    ImageNumbers,
    ImageSource,
    NumberPointers,
)
from .tiles import NUM_WARPS, TILE, PixelTile, tile_pixels


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


@triton.jit
@no_type_check
def view(images, numbers, n, pixels, fill, mean, std, a: tl.constexpr):
    """Some pixels of result n, but for its partner and the normalisation."""
    v = look(images, numbers.maps, n, pixels, fill, a)
    if numbers.colours is not None:
        if numbers.sums is None:
            v = recolour(v, numbers.colours + 5 * n, None, a.C)
        else:
            v = recolour(v, numbers.colours + 5 * n, grey_mean(numbers, n, pixels), a.C)
    if numbers.boxes is not None:
        v = erase(v, numbers, n, pixels, mean, std, a.C)
    return v


@triton.jit
@no_type_check
def mix(v, other, weight, in_box):
    """weight * v + (1 - weight) * other, and `other` alone in the box. At weight 1 `other` adds nothing, not even what
    is no number.
    """
    mixed = tl.where(weight == 1, v, weight * v + (1 - weight) * other)
    return tl.where(in_box, other, mixed)


@triton.jit
@no_type_check
def view_both(images, numbers, partner_ptr, n, N, pixels, fill, mean, std, a: tl.constexpr):
    """Some pixels of result n and of its partner, mixed. The partner is looked at only where something of it is seen.

    A view is a step of a loop, so that its code is there once: the first goes into nothing with all its weight.
    """
    weight = tl.load(partner_ptr + 1)
    box = load_box(partner_ptr + 2)
    in_box = lies_in_box(box, pixels)
    # An index that is none of an image, or no number, becomes that of one.
    partner = tl.minimum(tl.minimum(tl.maximum(tl.load(partner_ptr), 0.0), 1e9).to(tl.int32), N - 1)
    views = tl.where((weight != 1) | meets_tile(box, pixels), 2, 1)
    nothing = tl.zeros_like(pixels.p + 0.5)
    v = Colour(nothing, nothing, nothing)
    for i in range(views):
        other = view(images, numbers, tl.where(i == 0, n, partner), pixels, fill, mean, std, a)
        share = tl.where(i == 0, 0.0, weight)
        v = Colour(
            mix(v.red, other.red, share, in_box),
            mix(v.green, other.green, share, in_box),
            mix(v.blue, other.blue, share, in_box),
        )
    return v


@triton.jit
@no_type_check
def store_normalised(y_ptr, v, mean, std, ok):
    y = divide_again(v - mean, std, tl.div_rn(1.0, std))
    tl.store(y_ptr, y.to(y_ptr.dtype.element_ty), mask=ok)


@triton.jit(
    do_not_specialize=[*SIZES, "N", "box_count"],
    do_not_specialize_on_alignment=[*POINTERS, "sums_ptr", "boxes_ptr", "noise_ptr", "partners_ptr", "y_ptr"],
)
@no_type_check
def augment_kernel(
    images_ptr, offsets_ptr, sizes_ptr, maps_ptr, colours_ptr, sums_ptr, boxes_ptr, noise_ptr, partners_ptr, y_ptr,
    H, W, stride_n, stride_h, stride_w, stride_c, P, Q, parts, N, box_count, fill_red, fill_green, fill_blue,
    mean_red, mean_green, mean_blue, std_red, std_green, std_blue,
    a: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """y[n] = image n as its numbers say."""
    tiles = tl.cdiv(P, BLOCK_P) * tl.cdiv(Q, BLOCK_Q)
    pid = tl.program_id(0)
    n = pid // tiles
    pixels = tile_pixels(pid % tiles, P, Q, BLOCK_P, BLOCK_Q)
    images = ImageBatch(images_ptr, offsets_ptr, sizes_ptr, H, W, stride_n, stride_h, stride_w, stride_c)
    numbers = NumberPointers(maps_ptr, colours_ptr, sums_ptr, parts, boxes_ptr, box_count, noise_ptr)
    fill = Colour(fill_red, fill_green, fill_blue)
    mean = Colour(mean_red, mean_green, mean_blue)
    std = Colour(std_red, std_green, std_blue)

    if partners_ptr is None:
        v = view(images, numbers, n, pixels, fill, mean, std, a)
    else:
        v = view_both(images, numbers, partners_ptr + 6 * n, n, N, pixels, fill, mean, std, a)

    pixel_ptr = y_ptr + n.to(tl.int64) * P * Q * a.C + (pixels.p * Q + pixels.q) * a.C
    store_normalised(pixel_ptr, v.red, mean.red, std.red, pixels.ok)
    if a.C == 3:
        store_normalised(pixel_ptr + 1, v.green, mean.green, std.green, pixels.ok)
        store_normalised(pixel_ptr + 2, v.blue, mean.blue, std.blue, pixels.ok)


class ImagePlacement(NamedTuple):
    """How the images of a batch lie in memory, as far as a launch depends on it."""

    dtype: torch.dtype
    N: int
    H: int = 0
    W: int = 0
    stride_n: int = 0
    stride_h: int = 0
    stride_w: int = 0
    stride_c: int = 1


def placement_of(source: ImageSource) -> ImagePlacement:
    """Of images of different sizes that is how many there are: what else there is to know lies in tensors, and the
    length of their buffer, which is another one in each batch, is nothing to a kernel.
    """
    images = source.images
    if source.offsets is not None:
        return ImagePlacement(images.dtype, len(source.offsets))
    N, C, H, W = images.shape
    stride_n, stride_c, stride_h, stride_w = images.stride()
    return ImagePlacement(images.dtype, N, H, W, stride_n if N > 1 else 0, stride_h, stride_w, stride_c if C > 1 else 1)


class AugmentPlan(NamedTuple):
    """The launches of a batch, and the layouts of their results. `first` is there where contrast changes."""

    y: Layout
    launch: launch.Launch[AugmentOperands]
    sums: Layout | None = None
    first: launch.Launch[MeanOperands] | None = None


def _channels(values: tuple[float, ...]) -> tuple[float, float, float]:
    return (values[0], values[-2 % len(values)], values[-1])


def _check(images: ImagePlacement, augmenting: Augmenting, programs: int) -> None:
    """Raises ValueError for what 32 bits do not count."""
    N, H, W, P, Q, C = images.N, images.H, images.W, augmenting.P, augmenting.Q, len(augmenting.mean)
    if max(H, W, P, Q) > MAX_EXTENT:
        raise ValueError(f"images of {H} x {W} pixels to {P} x {Q}: no extent may be above {MAX_EXTENT}")
    reach = (H - 1) * images.stride_h + (W - 1) * images.stride_w + (C - 1) * images.stride_c + 1
    if max(reach, P * Q * C) > MAX_ELEMENTS:
        raise ValueError(
            f"images of {H} x {W} pixels to {P} x {Q}, {C} channels: from its first element to its last an image and a "
            f"result may have {MAX_ELEMENTS}, not {max(reach, P * Q * C)}"
        )
    if programs > MAX_ELEMENTS:
        raise ValueError(f"N={N} results of {P} x {Q} pixels: a launch of {programs} programs is too large")


@launch.planned
def _plan(
    images: ImagePlacement, augmenting: Augmenting, contrast: bool, box_count: int, tile: PixelTile
) -> AugmentPlan:
    a, C, N = augmenting, len(augmenting.mean), images.N
    tiles = tile.count(a.P, a.Q)
    _check(images, a, N * tiles)
    unit = 255 if images.dtype == torch.uint8 else 1
    fill = _channels(tuple(v * unit for v in a.fill))
    parts, span = mean_parts(tiles)
    common = {
        "tile": tile, "a": AugmentVariant(C, images.stride_c == 1, a.reflect),
        "BLOCK_P": tile.BLOCK_P, "BLOCK_Q": tile.BLOCK_Q, "num_warps": NUM_WARPS,
    }  # fmt: skip
    sizes = *images[2:], a.P, a.Q, parts
    y = dense((N, C, a.P, a.Q), a.dtype, torch.channels_last)
    whole = launch.Launch[AugmentOperands](
        augment_kernel, (N * tiles,), *sizes, N, box_count, *fill, *_channels(a.mean), *_channels(a.std), **common
    )
    if not contrast:
        return AugmentPlan(y, whole)
    first = launch.Launch[MeanOperands](grey_mean_kernel, (N * parts,), *sizes, span, *fill, **common)
    return AugmentPlan(y, whole, dense((N, parts), torch.float32), first)


def augment_batch(
    source: ImageSource, numbers: ImageNumbers, augmenting: Augmenting, contrast: bool = True, tile: PixelTile = TILE
) -> torch.Tensor:
    """The batch [N, C, P, Q] in channels_last. Not contrast: the factors of contrast in `colours` are all 1.

    Whatever the numbers are, no memory is read but that of `source`. Raises ValueError where an extent of an image or a
    result is above MAX_EXTENT, where one of them reaches over more than MAX_ELEMENTS, and where a batch has too many
    tiles. The caller checks `offsets` and `sizes` by value, by these limits too.
    """
    contrast = contrast and numbers.colours is not None
    box_count = 0 if numbers.boxes is None else numbers.boxes.shape[1]
    plan = _plan(placement_of(source), augmenting, contrast, box_count, tile)
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
