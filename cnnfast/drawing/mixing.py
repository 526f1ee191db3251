"""Pairs of images that are mixed, by the rules of torchvision's MixUp and CutMix, but with a weight or box of each
image's own: and their labels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .counters import Dice, Draw, below
from .elementary import exp, log, sine_and_cosine


def symmetric_beta(alpha: float, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Numbers of the distribution Beta(alpha, alpha) from uniform ones u, v in (0, 1), without rejection:

        1/2 + S / (2 sqrt(1 + 1 / ((u**(-1 / alpha) - 1) cos(2 pi v)**2)))

    with S = 1 for v below 1/2, else -1, for every alpha > 0 (L. Devroye, Random variate generation in one line of code,
    Winter Simulation Conference 1996; the tests compare distribution and moments).
    """
    _, cosine = sine_and_cosine(360 * v)
    with np.errstate(over="ignore", divide="ignore"):
        spread = (exp(-log(u) / alpha) - 1) * (cosine * cosine)
        half = 0.5 / np.sqrt(1 + 1 / spread)
    return np.where(v < 0.5, 0.5 + half, 0.5 - half)


@dataclass(frozen=True, slots=True)
class Mixing:
    """MixUp's and CutMix's alpha; None: that one is not done. With both a batch gets either, one as often as the
    other.
    """

    mixup_alpha: float | None
    cutmix_alpha: float | None

    @property
    def draws(self) -> tuple[Draw, ...]:
        return () if self.mixup_alpha is None and self.cutmix_alpha is None else (Draw.MIXING, Draw.PARTNER)

    def draw(self, dice: Dice, size: tuple[int, int]) -> np.ndarray | None:
        """float32 [N, 6]: partner, weight, and the box in which the partner is seen. A single image stays as it is."""
        if not self.draws:
            return None
        N = len(dice)
        partners = np.zeros((N, 6), np.float32)
        partners[:, 1] = 1
        if N < 2:
            return partners
        shift, choice, _, _ = dice.of_the_batch(Draw.PARTNER)
        partners[:, 0] = (np.arange(N) + 1 + below(N - 1, shift)) % N
        u, v, x, y = dice[Draw.MIXING]
        if self.cutmix_alpha is None or (self.mixup_alpha is not None and choice < 0.5):
            assert self.mixup_alpha is not None
            partners[:, 1] = symmetric_beta(self.mixup_alpha, u, v)
        else:
            partners[:, 2:] = cut(symmetric_beta(self.cutmix_alpha, u, v), x, y, size).T
        return partners


def cut(weight: np.ndarray, x: np.ndarray, y: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """CutMix's boxes (left, top, right, bottom) [4, N], around the pixel that x and y in (0, 1) choose."""
    P, Q = size
    x, y = below(Q, x), below(P, y)
    half = 0.5 * np.sqrt(1 - weight)
    half_width, half_height = np.floor(half * Q), np.floor(half * P)
    return np.stack(
        (
            np.maximum(x - half_width, 0), np.maximum(y - half_height, 0),
            np.minimum(x + half_width, Q), np.minimum(y + half_height, P),
        )
    )  # fmt: skip


def label_weights(partners: Tensor, size: tuple[int, int]) -> Tensor:
    """How much of each result its own image is, float32 [N]: the weight, and nothing in the partner's box."""
    _, weight, left, top, right, bottom = partners.double().unbind(1)
    area = (right - left) * (bottom - top)
    return (weight * (1 - area / (size[0] * size[1]))).float()


def mix_labels(labels: Tensor, partners: Tensor, size: tuple[int, int], num_classes: int | None) -> Tensor:
    """Soft labels [N, K] of mixed images: float32 from classes [N], of their own dtype from soft ones."""
    weights = label_weights(partners, size).to(labels.device, non_blocking=True)[:, None]
    partner = partners[:, 0].long().to(labels.device, non_blocking=True)
    if labels.dim() == 1:
        assert num_classes is not None
        soft = torch.zeros(len(labels), num_classes, device=labels.device)
        soft.scatter_(1, labels.long()[:, None], 1.0)
    else:
        soft = labels if labels.is_floating_point() else labels.float()
    weights = weights.to(soft.dtype)
    return weights * soft + (1 - weights) * soft[partner]
