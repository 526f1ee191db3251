"""Small networks and small data to train them with."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from cnnfast.training.samples import ImageSet, open_images

OPTIONS: dict[str, Any] = {
    "size": 8,
    "augment": {"crop_scale": None, "padding": 1, "horizontal_flip_p": 0.0, "resize_size": 8},
    "progress": False,
}


class SmallNet(nn.Module):
    """A stem, a residual block, a head: grey images [N, 1, H, W] to logits [N, classes]."""

    def __init__(self, classes: int = 10, dropout: float = 0.0) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.conv, self.bn = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(8 * 4, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.relu(self.bn(self.conv(x)) + x)
        x = nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)
        return self.fc(self.dropout(x))


def small_net(seed: int = 0, **options: Any) -> SmallNet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return SmallNet(**options)


def few_digits(count: int) -> ImageSet:
    """The first of scikit-learn's digits."""
    images = open_images("digits", 8)
    taken = torch.arange(count)
    return replace(images, source=images.source.taken(taken), labels=images.labels[taken])
