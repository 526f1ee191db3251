"""Augmentation of a batch in plain PyTorch, where no kernel serves: cnnfast::augment_plain, the same numbers and the
same order of steps as cnnfast::augment. It is an operator because torch.compile cannot trace what reads values.

Images are taken a few at a time, so that what is computed of them stays in the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..image_numbers import ARGUMENTS, GivenNumbers, check_numbers, fake, read_extents
from .plain_colours import erase, pixels_of, recolour
from .plain_warping import warp

AT_ONCE = 2**19  # so many elements of results are computed at once by each thread: they fit into its cache

LIBRARY = torch.library.Library("cnnfast", "FRAGMENT")


def _plain(
    images: Tensor, offsets, sizes, maps, colours, boxes, noise, partners, size, mean, std, fill, reflect, dtype
) -> Tensor:
    C, (P, Q) = len(mean), size
    read = (t if t is None else t.detach().cpu() for t in (maps, colours, boxes, noise, partners))
    numbers = GivenNumbers(*read)
    check_numbers(numbers, P, Q)
    source = images if offsets is None else _images_in(images, offsets, sizes, C)
    N = len(source)
    y = torch.empty((N, C, P, Q), dtype=dtype, device=images.device, memory_format=torch.channels_last)
    through = whole_maps(source, P, Q) if numbers.maps is None else numbers.maps
    unit = 255 if images.dtype == torch.uint8 else 1
    per_channel = (torch.tensor(v, dtype=torch.float32, device=images.device).view(-1, 1, 1) for v in (mean, std))
    mean_, std_ = per_channel
    beyond = torch.tensor([v * unit for v in fill], dtype=torch.float32, device=images.device).view(-1, 1, 1)
    step = max(1, AT_ONCE * torch.get_num_threads() // (C * P * Q))

    def view(begin: int, v: Tensor) -> None:
        """The images from `begin` on, but for their partners and the normalisation."""
        which = slice(begin, begin + len(v))
        warp(source[which], through[which], beyond, reflect, v)
        if unit != 1:
            v.div_(torch.full((), unit, dtype=torch.float32, device=v.device))
        if numbers.colours is not None:
            recolour(v, numbers.colours[which])
        if numbers.boxes is not None:
            erase(v, numbers.boxes[which], None if numbers.noise is None else numbers.noise[which], mean_, std_)

    def empty(n: int) -> Tensor:
        return torch.empty((n, C, P, Q), dtype=torch.float32, device=images.device)

    scratch = empty(min(step, N))
    views = None
    if numbers.partners is not None and N:
        views = empty(N)
        for begin in range(0, N, step):
            view(begin, views[begin : begin + step])
    for begin in range(0, N, step):
        v = scratch[: min(step, N - begin)]
        if views is None or numbers.partners is None:
            view(begin, v)
        else:
            _mix(views, begin, numbers.partners[begin : begin + step], v)
        y[begin : begin + step] = v.sub_(mean_).div_(std_)
    return y


def _images_in(flat: Tensor, offsets: Tensor, sizes: Tensor, C: int) -> list[Tensor]:
    """The images [C, H, W] of a buffer."""
    offsets, sizes = read_extents(len(flat), offsets, sizes, C)
    return [
        flat[offset : offset + H * W * C].view(H, W, C).permute(2, 0, 1)
        for offset, (H, W) in zip(offsets.tolist(), sizes.tolist(), strict=True)
    ]


def whole_maps(images: Tensor | Sequence[Tensor], P: int, Q: int) -> Tensor:
    """float32 [N, 2, 3]: each whole image is resized to P x Q."""
    extents = torch.tensor([image.shape[1:] for image in images], dtype=torch.float32).view(-1, 2)
    maps = torch.zeros(len(extents), 2, 3)
    maps[:, 0, 0], maps[:, 1, 1] = extents[:, 1] / Q, extents[:, 0] / P
    return maps


def _mix(views: Tensor, begin: int, partners: Tensor, out: Tensor) -> None:
    """out[n] = weight * view n + (1 - weight) * the partner's view, and the partner's alone in the box."""
    v = views[begin : begin + len(out)]
    weight = partners[:, 1].view(-1, 1, 1, 1).to(out.device)
    others = views[partners[:, 0].long().to(out.device)]
    torch.add(v * weight, others * (1 - weight), out=out)
    torch.where(weight == 1, v, out, out=out)  # at weight 1 the other adds nothing, not even what is no number
    for n, box in enumerate(partners[:, 2:].tolist()):
        rows, columns = pixels_of(box)
        out[n, :, rows, columns] = others[n, :, rows, columns]


LIBRARY.define(f"augment_plain({ARGUMENTS}) -> Tensor")
LIBRARY.impl("augment_plain", _plain, "CompositeExplicitAutograd")
torch.library.register_fake("cnnfast::augment_plain", fake, lib=LIBRARY)
augment_plain: Any = torch.ops.cnnfast.augment_plain.default
