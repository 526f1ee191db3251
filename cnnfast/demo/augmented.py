"""The photograph in many views, augmented in one batch: what that takes, beside torchvision's transforms."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

import cnnfast.nn as cnn
from cnnfast.bench.augmentation import Recipe
from cnnfast.bench.augmenters import torchvision_chain
from cnnfast.dispatch import backend, prefer_kernels
from cnnfast.measuring.timing import clock_of

from .by_kernels import KernelRun
from .photograph import MEAN, STD, load_photograph
from .results import Augmentation

COUNT, SIZE = 24, 96
RECIPE: dict[str, Any] = {
    "degrees": 15, "brightness": 0.3, "contrast": 0.3, "saturation": 0.3, "hue": 0.05, "erasing_p": 0.3,
}  # fmt: skip
OURS, THEIRS = "cnn.Augment", "torchvision"
ROUNDS = 3  # in which both take turns


class Views(nn.Module):
    """The first `count` views of an image: uint8, [1, 3, H, W] to [count, 3, SIZE, SIZE], normalised. The first ones
    are the same however many they are.
    """

    def __init__(self, count: int, seed: int) -> None:
        super().__init__()
        self.count = count
        self.augment = cnn.Augment(SIZE, **RECIPE, seed=seed)

    def forward(self, image: Tensor) -> Tensor:
        return self.augment(image.expand(self.count, -1, -1, -1), index=range(self.count))


def load_source() -> Tensor:
    """The photograph that the views are of: uint8, [1, 3, 2 SIZE, 2 SIZE]."""
    return (load_photograph(2 * SIZE) * 255).round().to(torch.uint8)


def levels(views: Tensor) -> Tensor:
    """Views, on the CPU, as they were before they were normalised: from 0 to 255."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    return (views.cpu() * std + mean) * 255


def one_by_one(seed: int) -> Callable[[Tensor], Tensor]:
    """The same kinds of change to one image [3, H, W] at a time, by torchvision. Raises ImportError without it."""
    changes = torchvision_chain(Recipe("views", **RECIPE), SIZE, torch.float32)

    def views(image: Tensor) -> Tensor:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return torch.stack([changes(image[0]) for _ in range(COUNT)])

    return views


def augmentation_of(source: Tensor, seed: int, run: KernelRun, kernels: bool) -> tuple[Augmentation, Tensor]:
    """What the views take, and they themselves, [COUNT, 3, SIZE, SIZE] in [0, 1] on the CPU, by PyTorch's operators.

    run: the first of them by our kernels, which are timed on a GPU. kernels: whether any can run here.
    """
    views = Views(COUNT, seed)
    with backend("torch"):
        theirs = levels(views(source))
    apart = float((levels(run.output) - theirs[: len(run.output)]).abs().max())
    steps: dict[str, Callable[[], Any]] = {OURS: lambda: views(source)}
    with suppress(ImportError):
        loop = one_by_one(seed)
        steps[THEIRS] = lambda: loop(source)
    gpu, clock = source.is_cuda, clock_of(source.device)
    samples: dict[str, list[float]] = {name: [] for name in steps}
    with prefer_kernels() if gpu else backend("torch"):
        for _ in range(1 + ROUNDS):
            for name, step in steps.items():
                samples[name].append(clock.sample(step, 1))
    times = {name: statistics.median(found[1:]) * 1000 for name, found in samples.items()}  # the first warms up
    by = "our kernels" if gpu and kernels else "PyTorch's operators"
    found = Augmentation(COUNT, SIZE, len(run.output), run.launches, apart, times, by, kernels)
    return found, theirs.clamp(0, 255) / 255
