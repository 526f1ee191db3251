"""Handwritten digits: scikit-learn's 1,797 images of 8x8 pixels, a small residual network, and its training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import cnnfast.functional as F
import cnnfast.nn as cnn

from .layers import ResidualBlock, seeded

HELD_OUT = 360  # of 1,797
BATCH = 64
LEARNING_RATE = 4e-3
LABEL_SMOOTHING = 0.1
ACCURACY_WANTED = 0.97


@dataclass(frozen=True)
class Digits:
    """Images [N, 1, 8, 8] in [0, 1] and labels [N] in 0..9; `rows` are their indices among scikit-learn's images."""

    images: Tensor
    labels: Tensor
    rows: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> Digits:
        return Digits(self.images.to(device), self.labels.to(device), self.rows)


def load_digits(seed: int) -> tuple[Digits, Digits]:
    """(training part, held-out part): the same split for the same seed."""
    from sklearn.datasets import load_digits

    pixels, targets = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    labels = torch.tensor(targets)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    held_out, training = order[:HELD_OUT], order[HELD_OUT:]
    return Digits(images[training], labels[training], training), Digits(images[held_out], labels[held_out], held_out)


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
    return seeded(DigitNet, seed)


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image moved by -1, 0 or 1 pixel in both directions; the background fills what becomes free."""
    N, _, H, W = images.shape
    padded = nn.functional.pad(images[:, 0], (1, 1, 1, 1))
    dy, dx = torch.randint(0, 3, (2, N), generator=generator).to(images.device)
    rows = torch.arange(H, device=images.device) + dy[:, None]
    columns = torch.arange(W, device=images.device) + dx[:, None]
    image = torch.arange(N, device=images.device)
    return padded[image[:, None, None], rows[:, :, None], columns[:, None, :]].unsqueeze(1)


def train(
    network: nn.Module, digits: Digits, epochs: int, seed: int, on_epoch: Callable[[float], None] = lambda loss: None
) -> list[float]:
    """Trains `network` in place, on the device of its parameters. Returns the mean loss of each epoch, and calls
    `on_epoch` with it.
    """
    device = next(network.parameters()).device
    digits = digits.to(device)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(network.parameters(), lr=LEARNING_RATE)
    batches = len(digits) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=max(2, epochs * batches))
    network.train()
    losses = []
    threads = torch.get_num_threads()
    # Images as small as these gain nothing from more threads, and sums in one order give the same network everywhere.
    torch.set_num_threads(1)
    for _ in range(epochs):
        total = torch.zeros((), device=device)
        for batch in (
            torch.randperm(len(digits), generator=generator)[: batches * BATCH].view(batches, BATCH).to(device)
        ):
            logits = network(shifted(digits.images[batch], generator))
            loss = nn.functional.cross_entropy(logits, digits.labels[batch], label_smoothing=LABEL_SMOOTHING)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.detach()
        losses.append(total.item() / batches)
        on_epoch(losses[-1])
    torch.set_num_threads(threads)
    network.eval()
    return losses


@torch.no_grad()
def predict(network: nn.Module, digits: Digits) -> Tensor:
    """The digit that the network reads in each image, [N] on the CPU."""
    device = next(network.parameters()).device
    return network.eval()(digits.images.to(device)).argmax(1).cpu()
