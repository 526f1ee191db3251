"""Small networks and small data to train them with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from cnnfast.training import Run, fit, fitting
from cnnfast.training.preparing import OF_DIGITS
from cnnfast.training.samples import ImageSet, open_images


class SmallNet(nn.Module):
    """A stem, a residual sum, a head with dropout: grey images [N, 1, H, W] to logits [N, classes]."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.conv, self.bn = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.dropout = nn.Dropout(0.1)
        self.fc = nn.Linear(8 * 4, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.relu(self.bn(self.conv(x)) + x)
        return self.fc(self.dropout(nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)))


def small_net(seed: int = 0) -> SmallNet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return SmallNet()


def few_digits(count: int) -> ImageSet:
    """The first of scikit-learn's digits."""
    images = open_images("digits", 8)
    taken = torch.arange(count)
    return replace(images, source=images.source.taken(taken), labels=images.labels[taken])


def small_fit(model: nn.Module | None = None, *, count: int = 120, **options: Any) -> Run:
    """Three epochs of five batches, some seconds on any machine; without what comes after them (finishing.py)."""
    usual = {"augment": OF_DIGITS, "epochs": 3, "batch": 16, "lr": 5e-3, "ema": 0.9, "progress": False}
    with mock.patch.object(fitting, "finish"):
        return fit(model or small_net(), few_digits(count), **usual | options)


def weights(folder: Path) -> dict[str, Tensor]:
    """All that training goes on from, flat: by name, of the checkpoint that a run has left."""
    found: dict[str, Tensor] = {}

    def visit(name: str, value: Any) -> None:
        if isinstance(value, Tensor):
            found[name] = value
        elif isinstance(value, dict | list | tuple):
            for key, part in value.items() if isinstance(value, dict) else enumerate(value):
                visit(f"{name}/{key}", part)

    visit("", torch.load(folder / "last.ckpt", weights_only=True))
    return found
