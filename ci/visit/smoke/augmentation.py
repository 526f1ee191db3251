"""Augmentation to try: a map, colours, boxes and partners at once."""

from __future__ import annotations

import torch
from torch import Tensor

from cnnfast_kernels.augment import Augmenting, ImageNumbers, ImageSource, augment_batch

from .trial import SINGLE, SmokeTrial, Tensors, integers

LEFT, TOP, RIGHT, BOTTOM = 3, 2, 9, 8  # of a box that is filled; the partner is seen in one that lies a row below it


def numbers(x: Tensor, shape: tuple[int, ...], colours: list[float], weight: float, value: float) -> ImageNumbers:
    """Of a batch whose first image is flipped, and the others are turned round; each has the next for its partner."""
    N, C, H, W = shape
    maps = torch.tensor([[[-1.0, 0, W], [0, 1, 0]]] + [[[-1.0, 0, W], [0, -1, H]]] * (N - 1))
    boxes = torch.tensor([[[LEFT, TOP, RIGHT, BOTTOM, *[value] * C]]] * N)
    partners = torch.tensor([[(n + 1) % N, weight, LEFT, TOP + 1, RIGHT, BOTTOM + 1] for n in range(N)])
    return ImageNumbers(
        *(t.to(x.device) for t in (maps, torch.tensor([colours] * N), boxes)), None, partners.to(x.device)
    )


def mixed(view: Tensor, weight: float, value: float) -> Tensor:
    """What boxes, partners and the normalisation by mean 0.5 and std 0.25 make of the views of a batch."""
    view = view.clone()
    view[:, :, TOP:BOTTOM, LEFT:RIGHT] = value
    other = view.roll(-1, 0)
    result = weight * view + (1 - weight) * other
    seen = slice(None), slice(None), slice(TOP + 1, BOTTOM + 1), slice(LEFT, RIGHT)
    result[seen] = other[seen]
    return (result - 0.5) / 0.25


def moved(x: Tensor) -> Tensor:
    return torch.cat((x[:1].flip(3), x[1:].flip(2, 3)))


def everything_grey(shape: tuple[int, ...]) -> SmokeTrial:
    """Images of one channel, of multiples of 1/8, and as many pixels as a power of two: with contrast, yet exact."""

    def ours(x: Tensor) -> Tensors:
        half = (0.5,)
        own = numbers(x, shape, [1.0, 0.5, 1.0, 0.0, 0.0], 0.25, 0.75)
        return (augment_batch(ImageSource(x), own, Augmenting(*shape[2:], SINGLE, half, half, (0.25,))),)

    def exact(x: Tensor) -> Tensors:
        return (mixed(moved(0.5 * x + 0.5 * x.mean((1, 2, 3), keepdim=True)), 0.25, 0.75),)

    return SmokeTrial(f"augmentation {shape}", lambda d: (integers(shape, 8, d, SINGLE).abs() / 8,), ours, exact)


def everything(shape: tuple[int, ...], different_sizes: bool = False) -> SmokeTrial:
    """Bytes of three channels, in one buffer if `different_sizes`: brightness, contrast, saturation and a third of a
    turn.
    """
    N, C, H, W = shape

    def ours(x: Tensor) -> Tensors:
        own = numbers(x, shape, [0.5, 1.5, 0.5, 1 / 3, 0.0], 0.75, 0.25)
        source = ImageSource(x)
        if different_sizes:
            offsets = torch.arange(N, device=x.device) * (H * W * C)
            sizes = torch.tensor([[H, W]] * N, dtype=torch.int32, device=x.device)
            source = ImageSource(x.permute(0, 2, 3, 1).reshape(-1), offsets, sizes)
        three = (0.5,) * 3
        return (augment_batch(source, own, Augmenting(H, W, SINGLE, three, three, (0.25,) * 3)),)

    def grey(x: Tensor) -> Tensor:
        return 0.2989 * x[:, :1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:]

    def exact(x: Tensor) -> Tensors:
        x = x / 255 * 0.5
        x = (1.5 * x - 0.5 * grey(x).mean((1, 2, 3), keepdim=True)).clamp(0, 1)
        x = 0.5 * x + 0.5 * grey(x)
        return (mixed(moved(x[:, [2, 0, 1]]), 0.75, 0.25),)  # red becomes green, green blue, and blue red

    return SmokeTrial(
        f"augmentation {shape}{' of different sizes' * different_sizes}",
        lambda d: (integers(shape, 127, d, torch.int32).abs().mul(2).to(torch.uint8),),
        ours,
        exact,
        tolerance=2.0**-18,
    )
