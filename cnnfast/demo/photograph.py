"""A photograph of scikit-learn's, and the first layers of a ResNet that it goes through."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import cnnfast.functional as F
import cnnfast.nn as cnn

from .layers import ResidualBlock, seeded

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as every published ResNet expects


def sample(name: str) -> Tensor:
    """One of the two photographs that scikit-learn has, "china.jpg" and "flower.jpg": [427, 640, 3], uint8."""
    from sklearn.datasets import load_sample_image

    return torch.tensor(load_sample_image(name))


def load_photograph(size: int | None) -> Tensor:
    """A temple in China, [1, 3, H, W] in [0, 1]: all 427 x 640 pixels, or scaled down to a shorter side and cropped to
    `size` x `size`.
    """
    image = sample("china.jpg").permute(2, 0, 1).unsqueeze(0).float() / 255
    if size is None:
        return image
    H, W = image.shape[2:]
    scale = size / min(H, W)
    image = nn.functional.interpolate(image, (round(H * scale), round(W * scale)), mode="bilinear", antialias=True)
    return centre(image, size).clamp(0, 1)


def normalized(image: Tensor) -> Tensor:
    """The image as networks expect it: in channels_last, with mean 0 and variance 1 over ImageNet."""
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))
    return ((image - mean) / std).contiguous(memory_format=torch.channels_last)


class StemAndBlock(nn.Module):
    """ResNet's beginning: a 7x7 convolution of stride 2, a 3x3 max pool of stride 2, one basic block of 64 channels."""

    def __init__(self):
        super().__init__()
        self.stem = cnn.ConvBNAct(3, 64, 7, 2)
        self.block = ResidualBlock(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(F.max_pool2d(self.stem(x), 3, 2, 1))


class BothMaps(nn.Module):
    """What those layers make of an image [N, 3, H, W]: the maps [N, 64, H/2, W/2] of the stem and those of the block,
    [N, 64, H/4, W/4].
    """

    def __init__(self, layers: StemAndBlock) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        stem = self.layers.stem(x)
        return stem, self.layers.block(F.max_pool2d(stem, 3, 2, 1))


def centre(image: Tensor, size: int) -> Tensor:
    """The middle of an image [N, C, H, W], [N, C, size, size]."""
    top, left = ((extent - size) // 2 for extent in image.shape[2:])
    return image[:, :, top : top + size, left : left + size]


def make_layers(seed: int) -> StemAndBlock:
    """The layers in training mode, with weights as ResNets start with."""
    return seeded(StemAndBlock, seed)
