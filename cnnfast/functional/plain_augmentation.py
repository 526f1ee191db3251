"""Augmentation of a batch in plain PyTorch, where no kernel serves: cnnfast::augment_plain, the same numbers and the
same order of steps as cnnfast::augment. It is an operator because torch.compile cannot trace what reads values.

Images are taken a few at a time, so that what is computed of them stays in the cache. Numbers are read, wherever they
lie.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..image_numbers import ARGUMENTS, GivenNumbers, check_numbers, fake, read_extents, whole_maps
from .plain_colours import erase, pixels_of, recolour
from .plain_warping import warp

AT_ONCE = 2**19  # so many elements of results are computed at once by each thread: they fit into its cache

LIBRARY = torch.library.Library("cnnfast", "FRAGMENT")


def _plain(
    images: Tensor, offsets, sizes, maps, colours, boxes, noise, partners, size, mean, std, fill, reflect, dtype
) -> Tensor:
    C, (P, Q) = len(mean), size
    numbers = GivenNumbers(*(t if t is None else t.detach().cpu() for t in (maps, colours, boxes, noise, partners)))
    check_numbers(numbers, P, Q)
    source = images if offsets is None else _images_in(images, offsets, sizes, C)
    N = len(source)
    if numbers.maps is None:
        extents = torch.tensor([image.shape[1:] for image in source]).view(-1, 2)
        numbers = numbers._replace(maps=whole_maps(extents, P, Q))

    def of_channels(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=images.device).view(-1, 1, 1)

    unit = 255 if images.dtype == torch.uint8 else 1
    how = Appearance(of_channels([v * unit for v in fill]), unit, reflect, of_channels(mean), of_channels(std))
    step = max(1, AT_ONCE * torch.get_num_threads() // (C * P * Q))
    parts = [slice(begin, min(begin + step, N)) for begin in range(0, N, step)]
    views = None
    if numbers.partners is not None:  # an image may be the partner of any other: all are there before they are mixed
        views = torch.empty((N, C, P, Q), dtype=torch.float32, device=images.device)
        for part in parts:
            _view(source[part], _of(numbers, part), how, views[part])
    scratch = torch.empty((min(step, N), C, P, Q), dtype=torch.float32, device=images.device)
    y = torch.empty((N, C, P, Q), dtype=dtype, device=images.device, memory_format=torch.channels_last)
    for part in parts:
        v = scratch[: part.stop - part.start]
        if views is None:
            _view(source[part], _of(numbers, part), how, v)
        else:
            _mix(views, views[part], _of(numbers, part).partners, v)
        y[part] = v.sub_(how.mean).div_(how.std)
    return y


class Appearance(NamedTuple):
    """What the images of a batch have in common: what lies beyond the border, [C, 1, 1] in units of the images, of
    which `unit` are 1; whether they are reflected there; and the mean and std of a channel, [C, 1, 1].
    """

    fill: Tensor
    unit: int
    reflect: bool
    mean: Tensor
    std: Tensor


def _of(numbers: GivenNumbers, part: slice) -> Any:
    return GivenNumbers(*(t if t is None else t[part] for t in numbers))


def _view(images: Tensor | Sequence[Tensor], numbers: Any, how: Appearance, v: Tensor) -> None:
    """v = the images but for their partners and the normalisation."""
    warp(images, numbers.maps, how.fill, how.reflect, v)
    if how.unit != 1:
        v.div_(torch.full((), how.unit, dtype=torch.float32, device=v.device))
    if numbers.colours is not None:
        recolour(v, numbers.colours)
    if numbers.boxes is not None:
        erase(v, numbers.boxes, numbers.noise, how.mean, how.std)


def _images_in(flat: Tensor, offsets: Tensor, sizes: Tensor, C: int) -> list[Tensor]:
    """The images [C, H, W] of a buffer."""
    offsets, sizes = read_extents(len(flat), offsets, sizes, C)
    return [
        flat[offset : offset + H * W * C].view(H, W, C).permute(2, 0, 1)
        for offset, (H, W) in zip(offsets.tolist(), sizes.tolist(), strict=True)
    ]


def _mix(views: Tensor, v: Tensor, partners: Tensor, out: Tensor) -> None:
    """out = weight * v + (1 - weight) * the partners' views, and the partners' alone in their boxes."""
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
