"""Images seen through their maps, by PyTorch's operators: what kernels/cnnfast_kernels/augment/sampling.py computes.

A map that only shifts, mirrors and turns by quarters takes pixels to pixels: a slice of the image, to the bit. Every
other is torch.nn.functional.grid_sample's. What an image gives depends on nothing but itself and its map, to the bit:
neither on the images beside it nor on the number of threads.
"""

from __future__ import annotations

from collections.abc import Sequence

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
    linear, shifts = maps[:, :, :2].abs(), maps[:, :, 2]
    straight = (linear == torch.eye(2)).flatten(1).all(1)
    turned = (linear == torch.eye(2).flip(0)).flatten(1).all(1)
    whole_pixels = ((shifts == shifts.floor()) & (shifts.abs() < FARTHEST)).all(1)
    sampled = []
    for n, exact in enumerate(((straight | turned) & whole_pixels).tolist()):
        if exact:
            _slice(images[n], maps[n].tolist(), fill, reflect, out[n])
        else:
            sampled.append(n)
    if not sampled:
        return
    if isinstance(images, Tensor) and _is_small(images[0], P, Q):
        every = len(sampled) == len(images)
        chosen, through = (images, maps) if every else (images[sampled], maps[sampled])
        seen = _sample(chosen, through.double(), (0, 0), fill, reflect, P, Q)
        out.copy_(seen) if every else out.index_copy_(0, torch.tensor(sampled, device=out.device), seen)
        return
    for n in sampled:
        image, m = images[n], maps[n : n + 1].double()
        corner = (0, 0)
        if not _is_small(image, P, Q):
            image, corner = _cut(image, m[0], P, Q, reflect)
        out[n] = _sample(image[None], m, corner, fill, reflect, P, Q)[0]


def _is_small(image: Tensor, P: int, Q: int) -> bool:
    return image.shape[1] * image.shape[2] <= WHOLE * P * Q


def _slice(image: Tensor, m: list[list[float]], fill: Tensor, reflect: bool, out: Tensor) -> None:
    """The same for one image whose map takes pixels to pixels."""
    if m[0][0] == 0:  # columns of the image are rows of the result
        image, m = image.transpose(1, 2), [m[1], m[0]]
        steps, shifts = (m[1][1], m[0][0]), (m[1][2], m[0][2])
    else:
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


def _cut(image: Tensor, m: Tensor, P: int, Q: int, reflect: bool) -> tuple[Tensor, tuple[int, int]]:
    """The part of an image that a map, float64 [2, 3], sees, and the (x, y) at which it begins."""
    corners = torch.tensor([[0.5, 0.5, 1], [Q - 0.5, 0.5, 1], [0.5, P - 0.5, 1], [Q - 0.5, P - 0.5, 1]]).double()
    positions = (corners @ m.T).clamp(-FARTHEST, FARTHEST)
    # A pixel more at each side than bilinear samples need: positions are rounded to float32.
    (left, top), (right, bottom) = (
        (positions.amin(0) - 1.5).floor().int().tolist(),
        (positions.amax(0) + 2.5).ceil().int().tolist(),
    )
    _, H, W = image.shape
    if reflect and (left < 0 or top < 0 or right > W or bottom > H):
        return image, (0, 0)
    left, right = min(max(left, 0), W - 1), max(min(right, W), 1)
    top, bottom = min(max(top, 0), H - 1), max(min(bottom, H), 1)
    return image[:, top:bottom, left:right], (left, top)


def _sample(
    images: Tensor, maps: Tensor, corner: tuple[int, int], fill: Tensor, reflect: bool, P: int, Q: int
) -> Tensor:
    """Bilinear samples of images [N, C, H, W] through maps, float64 [N, 2, 3] on the CPU. The images were cut out of
    larger ones, at `corner` (x, y).
    """
    H, W = images.shape[2:]
    source = torch.empty(images.shape, dtype=torch.float32, device=images.device).copy_(images)
    beyond = None if reflect or not bool(fill.any()) else fill
    if beyond is not None:  # grid_sample has zeros beyond the border
        source.sub_(beyond)
    grid = _grid(maps, corner, (W, H), P, Q).to(images.device)
    padding_mode = "reflection" if reflect else "zeros"
    seen = F.grid_sample(source, grid.permute(0, 2, 3, 1), padding_mode=padding_mode, align_corners=False)
    return seen if beyond is None else seen.add_(beyond)


def _grid(maps: Tensor, corner: tuple[int, int], extents: tuple[int, int], P: int, Q: int) -> Tensor:
    """float32 [N, 2, P, Q]: positions as grid_sample wants them, -1 and 1 being the edges of an image."""
    scale = 2 / torch.tensor(extents, dtype=torch.float64)[:, None]
    m = torch.cat([maps[:, :, :2], maps[:, :, 2:] - torch.tensor(corner)[:, None]], 2) * scale
    q, p = torch.arange(Q, dtype=torch.float64) + 0.5, torch.arange(P, dtype=torch.float64) + 0.5
    across = m[:, :, 0, None] * q + (m[:, :, 2, None] - 1)
    down = m[:, :, 1, None] * p
    farthest = scale * FARTHEST
    if bool((across.abs().amax(2) + down.abs().amax(2) > farthest[:, 0]).any()):
        # as no floating-point number may overflow
        positions = down[..., None] + across[:, :, None]
        return torch.minimum(torch.maximum(positions, -farthest[:, None]), farthest[:, None]).float()
    return down.float()[..., None] + across.float()[:, :, None]
