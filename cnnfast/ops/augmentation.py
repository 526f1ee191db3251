"""The operator of augmentation: numbers that lie on the CPU are checked by value, and all of them reach the device of
the images in one copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cnnfast_kernels.augment import Augmenting, ImageNumbers, ImageSource, augment_batch

from ..image_numbers import ARGUMENTS, GivenNumbers, check_numbers, fake, read_extents, whole_maps
from .registry import register

ALIGNMENT = 16  # bytes: where each tensor of numbers begins, so that Triton compiles for aligned ones alone


def _augment(
    images: Tensor, offsets, sizes, maps, colours, boxes, noise, partners, size, mean, std, fill, reflect, dtype
) -> Tensor:
    P, Q = size
    given = GivenNumbers(maps, colours, boxes, noise, partners)
    capturing = images.is_cuda and torch.cuda.is_current_stream_capturing()
    if capturing:
        _check_capturable(given, offsets)
    check_numbers(GivenNumbers(*(t if t is not None and t.is_cpu else None for t in given)), P, Q)
    contrast = colours is not None and not (colours.is_cpu and bool((colours[:, 1] == 1).all()))
    if offsets is not None:
        offsets, sizes = read_extents(len(images), offsets, sizes, len(mean))
    if maps is None:
        maps = _whole_maps(images, P, Q) if sizes is None else whole_maps(sizes, P, Q)
    offsets, sizes, *numbers = together((offsets, sizes, maps, colours, boxes, noise, partners), images.device)
    source = ImageSource(images, offsets, sizes)
    augmenting = Augmenting(P, Q, dtype, tuple(fill), tuple(mean), tuple(std), reflect)
    return augment_batch(source, ImageNumbers(*numbers), augmenting, contrast)


def _check_capturable(given: GivenNumbers, offsets: Tensor | None) -> None:
    """Raises RuntimeError if numbers would have to be read or copied while a graph is captured."""
    if offsets is not None:
        raise RuntimeError(
            "augment(): images of different sizes cannot be augmented under CUDA graph capture, because offsets and "
            "sizes are checked by value: give images [N, C, H, W]"
        )
    for name, t in zip(given._fields, given, strict=True):
        if t is not None and t.is_cpu:
            raise RuntimeError(
                f"augment(): under CUDA graph capture numbers must be on the GPU, where a replay finds them, but "
                f"{name} is on the CPU: give {name}.cuda(), made before the capture, and copy new numbers into it"
            )


def _whole_maps(images: Tensor, P: int, Q: int) -> Tensor:
    """float32 [N, 2, 3], made where the images [N, C, H, W] are, so that a graph may be captured."""
    N, _, H, W = images.shape
    maps = images.new_zeros((N, 2, 3), dtype=torch.float32)
    maps[:, 0, 0], maps[:, 1, 1] = W / Q, H / P
    return maps


def together(tensors: Sequence[Tensor | None], device: torch.device) -> list[Any]:
    """The tensors, contiguous and on `device`; None stays. All that lie elsewhere are copied there in one, which the
    CPU does not wait for.
    """
    found = [t if t is None else t.contiguous() for t in tensors]
    away = {i: t for i, t in enumerate(found) if t is not None and t.device != device}
    if not away:
        return found
    begins, length = {}, 0
    for i, t in away.items():
        begins[i] = length
        length += -(-t.nbytes // ALIGNMENT) * ALIGNMENT
    packed = torch.empty(length, dtype=torch.uint8, pin_memory=device.type == "cuda")

    def part(i: int, memory: Tensor) -> Tensor:
        t = away[i]
        return memory[begins[i] : begins[i] + t.nbytes].view(t.dtype).view(t.shape)

    for i, t in away.items():
        part(i, packed).copy_(t)
    there = packed.to(device, non_blocking=True)
    return [part(i, there) if i in away else t for i, t in enumerate(found)]


augment = register(f"augment({ARGUMENTS}) -> Tensor", _augment, fake)
