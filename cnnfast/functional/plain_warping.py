"""Images seen through their maps, by PyTorch's operators: what kernels/cnnfast_kernels/augment/sampling.py computes.

A map that only shifts, mirrors and turns by quarters takes pixels to pixels: a slice of the image, to the bit. Every
other is torch.nn.functional.grid_sample's. What an image gives depends on nothing but itself and its map, to the bit:
neither on the images beside it nor on the number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

FARTHEST = 2.0**20  # in pixels, as in the kernel: no position is farther away
# An image is converted to float32 whole if it has no more than so many times the pixels of its result; of a larger one,
# what its map sees is cut out first.
WHOLE = 4


def warp(images: Tensor | Sequence[Tensor], maps: Tensor, fill: Tensor, reflect: bool, out: Tensor) -> None:
    """out[n] = images[n] through maps[n]; out is float32 [N, C, P, Q], contiguous, in the units of the images.

    images: [N, C, H, W], or [C, H, W] each, of any strides and of different sizes. maps: float32 [N, 2, 3] on the CPU,
    finite. fill: float32 [C, 1, 1], what lies beyond the border unless `reflect`.
    """
    P, Q = out.shape[2:]
    exact = _take_pixels_to_pixels(maps)
    for n in exact.nonzero().flatten().tolist():
        _slice(images[n], maps[n].tolist(), fill, reflect, out[n])
    sampled = exact.logical_not().nonzero().flatten().tolist()
    if not sampled:
        return
    maps = maps.double()
    low, high = _reach(maps, P, Q)
    extents = torch.tensor([image.shape[:0:-1] for image in images])  # W, H
    contained = ((low >= 0) & (high <= extents)).all(1).tolist()
    far = ((low < -FARTHEST) | (high > FARTHEST)).any(1).tolist()
    alike: dict[Sampling, list[int]] = {}
    for n in sampled:
        # A map that stays within the image reflects nothing. This mode of grid_sample gives the same then, and is fast.
        mode = "zeros" if not reflect else "border" if contained[n] else "reflection"
        alike.setdefault(Sampling(mode, far[n]), []).append(n)
    for how, which in alike.items():
        if isinstance(images, Tensor) and _is_small(images[0], P, Q):
            every = len(which) == len(images)
            chosen, through = (images, maps) if every else (images[which], maps[which])
            out[slice(None) if every else which] = _sample(chosen, through, (0, 0), fill, how, P, Q)
            continue
        for n in which:
            image, corner = images[n], (0, 0)
            if not _is_small(image, P, Q) and how.mode != "reflection":
                image, corner = _cut(image, low[n].tolist(), high[n].tolist())
            out[n : n + 1] = _sample(image[None], maps[n : n + 1], corner, fill, how, P, Q)


class Sampling(NamedTuple):
    """How an image is sampled. mode: grid_sample's padding_mode; far: positions may have to be limited."""

    mode: str
    far: bool


def _take_pixels_to_pixels(maps: Tensor) -> Tensor:
    linear, shifts = maps[:, :, :2].abs(), maps[:, :, 2]
    straight = (linear == torch.eye(2)).flatten(1).all(1)
    turned = (linear == torch.eye(2).flip(0)).flatten(1).all(1)
    return (straight | turned) & ((shifts == shifts.floor()) & (shifts.abs() < FARTHEST)).all(1)


def _is_small(image: Tensor, P: int, Q: int) -> bool:
    return image.shape[1] * image.shape[2] <= WHOLE * P * Q


def _slice(image: Tensor, m: list[list[float]], fill: Tensor, reflect: bool, out: Tensor) -> None:
    """The same for one image whose map takes pixels to pixels."""
    if m[0][0] == 0:  # columns of the image are rows of the result
        image, m = image.transpose(1, 2), [m[1], m[0]]
    steps, shifts = (m[1][1], m[0][0]), (m[1][2], m[0][2])
    shown, seen, mirrored = [slice(None)], [slice(None)], []
    for axis, (step, shift) in enumerate(zip(steps, map(int, shifts), strict=True), 1):
        count, extent = out.shape[axis], image.shape[axis]
        low, high = (-shift, extent - shift) if step > 0 else (shift - extent, shift)
        if reflect and (low > 0 or high < count):
            image = image.index_select(axis, _reflected(step, shift, count, extent).to(image.device))
            low, high, step, shift = 0, count, 1, 0
        low, high = max(low, 0), min(high, count)
        if low >= high:
            out.copy_(fill.expand_as(out))
            return
        shown.append(slice(low, high))
        seen.append(slice(low + shift, high + shift) if step > 0 else slice(shift - high, shift - low))
        mirrored += [axis] if step < 0 else []
    part = image[tuple(seen)]
    if part.shape != out.shape:
        out.copy_(fill.expand_as(out))
    out[tuple(shown)] = part.flip(mirrored) if mirrored else part


def _reflected(step: float, shift: int, count: int, extent: int) -> Tensor:
    """Which pixels of an axis of the image are seen by the pixels of a result."""
    p = torch.arange(count)
    pixel = (p + shift if step > 0 else shift - 1 - p) % (2 * extent)
    return torch.minimum(pixel, 2 * extent - 1 - pixel)


def _reach(maps: Tensor, P: int, Q: int) -> tuple[Tensor, Tensor]:
    """The least and the largest x and y, [N, 2] each, of the centres of all pixels in the images."""
    x, y = torch.tensor([0.5, Q - 0.5, 0.5, Q - 0.5]), torch.tensor([0.5, 0.5, P - 0.5, P - 0.5])
    positions = maps[:, :, 0, None] * x + maps[:, :, 1, None] * y + maps[:, :, 2, None]
    return positions.amin(2), positions.amax(2)


def _cut(image: Tensor, low: list[float], high: list[float]) -> tuple[Tensor, tuple[int, int]]:
    """The part of an image that is seen at positions (x, y) from low to high, and the (x, y) at which it begins."""
    begins, ends = [], []
    for least, largest, extent in zip(low, high, image.shape[:0:-1], strict=True):
        # A pixel more at each side than bilinear samples need: positions are rounded to float32.
        begins.append(math.floor(min(max(least - 1.5, 0), extent - 1)))
        ends.append(math.ceil(min(max(largest + 1.5, 1), extent)))
    return image[:, begins[1] : ends[1], begins[0] : ends[0]], (begins[0], begins[1])


def _sample(
    images: Tensor, maps: Tensor, corner: tuple[int, int], fill: Tensor, how: Sampling, P: int, Q: int
) -> Tensor:
    """Bilinear samples of images [N, C, H, W] through maps, float64 [N, 2, 3] on the CPU. The images were cut out of
    larger ones, at `corner` (x, y).
    """
    source = torch.empty(images.shape, dtype=torch.float32, device=images.device).copy_(images)
    filled = how.mode == "zeros" and bool(fill.any())
    if filled:  # grid_sample has zeros beyond the border
        source.sub_(fill)
    grid = _grid(maps, corner, images.shape[:1:-1], how.far, P, Q).to(images.device)
    N, C = images.shape[:2]
    bands = _bands(P) if N == 1 else 1  # threads share images among them, and then parts of one
    grid = grid.view(N * bands, 2, P // bands, Q) if bands == 1 else grid.view(2, bands, P // bands, Q).transpose(0, 1)
    source = source if bands == 1 else source.expand(bands, -1, -1, -1)
    seen = F.grid_sample(source, grid.permute(0, 2, 3, 1), padding_mode=how.mode, align_corners=False)
    seen = seen.add_(fill) if filled else seen
    return seen if bands == 1 else seen.transpose(0, 1).reshape(1, C, P, Q)


def _bands(P: int) -> int:
    """Into how many parts of equally many rows P rows are cut, at most one for each thread."""
    return next(bands for bands in range(min(torch.get_num_threads(), P), 0, -1) if P % bands == 0)


def _grid(maps: Tensor, corner: tuple[int, int], extents: Sequence[int], far: bool, P: int, Q: int) -> Tensor:
    """float32 [N, 2, P, Q]: positions (x, y) in images of extents (W, H), counted as grid_sample wants it: -1 and 1 are
    the edges.
    """
    scale = 2 / torch.tensor(extents, dtype=torch.float64)[:, None]
    q, p = torch.arange(Q, dtype=torch.float64) + 0.5, torch.arange(P, dtype=torch.float64) + 0.5
    across = maps[:, :, 0, None] * q + (maps[:, :, 2, None] - torch.tensor(corner)[:, None])
    down = maps[:, :, 1, None] * p
    if far:
        positions = (down[..., None] + across[:, :, None]).clamp(-FARTHEST, FARTHEST)
        return positions.mul_(scale[..., None]).sub_(1).float()
    return (down * scale).float()[..., None] + (across * scale - 1).float()[:, :, None]
