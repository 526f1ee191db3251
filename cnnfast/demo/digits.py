"""Handwritten digits: scikit-learn's 1,797 images of 8x8 pixels, a small residual network, and its training.

What trains is imported where the digits are read and learnt: the network is an example model of other commands too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

import cnnfast.functional as F
import cnnfast.nn as cnn
from cnnfast import backend, convert

from .layers import ResidualBlock, seeded

if TYPE_CHECKING:
    from cnnfast.training import Run
    from cnnfast.training.samples import ImageSet

HELD_OUT = 0.2  # of each class
ACCURACY_WANTED = 0.97


@dataclass(frozen=True)
class Digits:
    """Images [N, 1, 8, 8] as the network reads them, from -1 (paper) to 1 (ink), and labels [N] in 0..9; `rows` are
    their indices among scikit-learn's images.
    """

    images: Tensor
    labels: Tensor
    rows: Tensor

    def __len__(self) -> int:
        return len(self.labels)


def load_digits(seed: int) -> tuple[ImageSet, Digits]:
    """(what is learnt from, what is held out): the same split for the same seed, that of `cnnfast train digits`."""
    from cnnfast.training.batches import loader
    from cnnfast.training.preparing import prepare
    from cnnfast.training.samples import DIGITS

    data = prepare(DIGITS, HELD_OUT, None, None, seed)
    part = data.held_out
    assert part is not None
    (batch,) = loader(part.images, part.indices, batch=len(part.indices))
    with backend("torch"):
        images = data.augment.eval()(batch.images)
    return data.training.images.taken(data.training.indices), Digits(images, batch.labels, batch.index)


class DigitNet(nn.Module):
    """[N, 1, 8, 8] to ten logits [N, 10]: a stem, two residual blocks with a max pool between, a global mean, a linear
    layer.
    """

    def __init__(self, width: int = 16):
        super().__init__()
        self.stem = cnn.ConvBNAct(1, width, 3)
        self.block1 = ResidualBlock(width, width)
        self.block2 = ResidualBlock(width, 2 * width)
        self.head = nn.Linear(2 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.block1(self.stem(x)), 3, 2, 1)
        return self.head(F.global_avg_pool2d(self.block2(x), keepdim=False))


def make_network(seed: int) -> DigitNet:
    """As training leaves it but for its weights: converted, and in channels_last. So kernels that are compiled before
    the training serve after it.
    """
    return convert(seeded(DigitNet, seed), inplace=True, memory_format=torch.channels_last)


def train(
    network: nn.Module,
    images: ImageSet,
    epochs: int,
    seed: int,
    on_epoch: Callable[[float], None] = lambda loss: None,
) -> Run:
    """Trains `network` in place by cnnfast.training.fit, as `cnnfast train digits` does it; it stays on its device.
    Calls `on_epoch` with the mean loss of each epoch.

    Nothing of `images` is held out, and the last epoch's weights are kept: no image that the network is judged by has
    chosen them.
    """
    from cnnfast import training

    class ToldModule(training.Module):
        def on_train_epoch_end(self) -> None:
            super().on_train_epoch_end()
            on_epoch(float(self.trainer.callback_metrics["loss"]))

    device = next(network.parameters()).device
    run = training.fit(network, images, validation=0, epochs=epochs, seed=seed, module=ToldModule, progress=False)
    network.to(device)  # lightning leaves it on the CPU
    return run


@torch.no_grad()
def predict(network: nn.Module, digits: Digits) -> Tensor:
    """The digit that the network reads in each image, [N] on the CPU."""
    device = next(network.parameters()).device
    return network.eval()(digits.images.to(device)).argmax(1).cpu()
