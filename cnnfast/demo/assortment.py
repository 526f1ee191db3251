"""One of each kind: what cnnfast.nn and cnnfast.functional compute besides a ResNet's layers, on a piece of the
photograph.
"""

from __future__ import annotations

from torch import Tensor, nn

import cnnfast.functional as F
import cnnfast.nn as cnn

from .layers import seeded

CHANNELS = 8
SIZE = 8  # pixels of each side


class Assortment(nn.Module):
    """[N, 3, H, W] to [N, 2], for H and W of 8 or more: each kind of padding, convolution, norm and pooling once.

    The convolution by explicit im2col pads nothing ("valid"), the next one keeps the size ("same") and is dilated; then
    come a depthwise one, a grouped one without a norm, a norm without a convolution, and a transposed one that doubles
    the size. Activations differ.
    """

    def __init__(self) -> None:
        super().__init__()
        self.valid = cnn.Conv2d(3, CHANNELS, 3, padding="valid")
        self.dilated = cnn.ConvBNAct(CHANNELS, CHANNELS, 3, padding="same", dilation=2, activation="leaky_relu")
        self.depthwise = cnn.ConvBNAct(CHANNELS, CHANNELS, 3, groups=CHANNELS, activation="silu")
        self.grouped = cnn.Conv2d(CHANNELS, CHANNELS, 1, groups=2)
        self.larger = cnn.ConvTranspose2d(CHANNELS, CHANNELS, 2, stride=2)
        self.norm, self.second_norm = cnn.BatchNorm2d(CHANNELS), cnn.BatchNorm2d(CHANNELS)
        self.average = cnn.AvgPool2d(2)
        self.adaptive = cnn.AdaptiveAvgPool2d((2, 3))
        self.sequence = cnn.Conv1d(CHANNELS, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x, self.valid.weight, self.valid.bias, padding="valid", algorithm="im2col")
        x = self.depthwise(self.dilated(x))
        x = F.conv_act(x, self.grouped.weight, self.grouped.bias, groups=2, activation="mish")
        n = self.second_norm
        x = F.bn_act(x, n.running_mean, n.running_var, n.weight, n.bias, self.training, activation="relu6")
        x = self.norm(self.larger(x))
        return self.sequence(self.adaptive(self.average(x)).flatten(2)).mean(2)


def make_assortment(seed: int) -> Assortment:
    """The layers in training mode."""
    return seeded(Assortment, seed)
