"""Weights of mixed images and their distribution, partners, and mixed labels."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from cnnfast.drawing import Dice, Draw, Mixing, label_weights, mix_labels
from cnnfast.drawing.mixing import symmetric_beta

MANY = np.arange(20_000)
# The distribution functions of Beta(alpha, alpha) that have a closed form.
CLOSED = {
    0.5: lambda x: 2 / math.pi * np.arcsin(np.sqrt(x)),
    1.0: lambda x: x,
    2.0: lambda x: x * x * (3 - 2 * x),
    3.0: lambda x: x**3 * (10 - 15 * x + 6 * x * x),
}


def partners_of(mixup_alpha: float | None, cutmix_alpha: float | None, dice: Dice, size: tuple[int, int]) -> np.ndarray:
    partners = Mixing(mixup_alpha, cutmix_alpha).draw(dice, size)
    assert partners is not None
    return partners


def weights(alpha: float) -> np.ndarray:
    u, v, _, _ = Dice(0, 0, MANY)[Draw.MIXING]
    return symmetric_beta(alpha, u, v)


@pytest.mark.parametrize(("alpha", "distribution"), CLOSED.items(), ids=map(str, CLOSED))
def test_weights_follow_the_beta_distribution(alpha, distribution):
    x = np.sort(weights(alpha))
    distance = np.abs(distribution(x) - (MANY + 0.5) / len(MANY)).max()
    assert distance < 1.95 / len(MANY) ** 0.5  # exceeded by one true sample in a thousand


@pytest.mark.parametrize("alpha", [0.01, 0.2, 0.4, 1.0, 5.0, 100.0])
def test_moments_of_weights(alpha):
    x = weights(alpha)
    assert ((x >= 0) & (x <= 1)).all()
    error = 4 / len(x) ** 0.5  # four standard errors
    variance = 1 / (4 * (2 * alpha + 1))
    fourth = 3 / (16 * (2 * alpha + 1) * (2 * alpha + 3))
    assert abs(x.mean() - 0.5) < error * variance**0.5
    assert abs(((x - 0.5) ** 2).mean() - variance) < error * (fourth - variance**2) ** 0.5
    assert abs(((x - 0.5) ** 4).mean() - fourth) < error * fourth


def test_a_small_alpha_as_pytorch_samples_it():
    """The distance of two samples, for the alpha that ImageNet is trained with."""
    torch.manual_seed(0)
    alpha = torch.tensor(0.2, dtype=torch.float64)
    theirs = torch.distributions.Beta(alpha, alpha).sample((len(MANY),)).numpy()
    ours, theirs = np.sort(weights(0.2)), np.sort(theirs)
    everywhere = np.concatenate([ours, theirs])
    distance = np.abs(np.searchsorted(ours, everywhere) - np.searchsorted(theirs, everywhere)).max() / len(MANY)
    assert distance < 1.95 * (2 / len(MANY)) ** 0.5


def test_partners_are_the_batch_shifted():
    """By every shift from 1 to N - 1 as often as by any other, chosen by the first image and the epoch."""
    shifts = []
    for epoch in range(300):
        partners = partners_of(1.0, None, Dice(0, epoch, np.arange(10, 14)), (8, 8))
        shift = partners[:, 0] - np.arange(4)
        assert len(set(shift % 4)) == 1
        shifts.append(shift[0] % 4)
        assert not partners[:, 2:].any()
    assert set(shifts) == {1, 2, 3}
    assert min(map(shifts.count, (1, 2, 3))) > 70
    again = partners_of(1.0, None, Dice(0, 299, np.array([10, 3, 2, 1])), (8, 8))
    assert again[0, 0] == shifts[-1]


def test_half_of_the_batches_are_cut():
    cut = 0
    for epoch in range(300):
        both, mixup, cutmix = (
            partners_of(*alphas, Dice(0, epoch, np.arange(4)), (64, 64))
            for alphas in ((0.5, 2), (0.5, None), (None, 2))
        )
        assert np.array_equal(both, mixup) or np.array_equal(both, cutmix)
        cut += np.array_equal(both, cutmix)
    assert 110 < cut < 190


def test_a_single_image_is_not_mixed():
    assert partners_of(1.0, 1.0, Dice(0, 0, np.arange(1)), (8, 8)).tolist() == [[0, 1, 0, 0, 0, 0]]
    assert partners_of(1.0, 1.0, Dice(0, 0, np.arange(0)), (8, 8)).shape == (0, 6)
    assert Mixing(None, None).draw(Dice(0, 0, np.arange(8)), (8, 8)) is None


@pytest.fixture
def partners():
    return torch.tensor([[1, 0.25, 0, 0, 0, 0], [2, 1, 1, 0, 3, 4], [0, 1, 0, 0, 0, 0]])  # the box is half of 4 x 4


def test_shares_of_labels(partners):
    assert label_weights(partners, (4, 4)).tolist() == [0.25, 0.5, 1]


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_classes_become_soft_labels(device, partners, dtype):
    mixed = mix_labels(torch.tensor([0, 2, 2], dtype=dtype, device=device), partners, (4, 4), 3)
    assert mixed.dtype == torch.float32
    assert mixed.tolist() == [[0.25, 0, 0.75], [0, 0, 1], [0, 0, 1]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_soft_labels_are_mixed_alike(device, partners, dtype):
    soft = torch.tensor([[1, 0], [0.5, 0.5], [0, 1]], dtype=dtype, device=device)
    mixed = mix_labels(soft, partners, (4, 4), None)
    assert mixed.dtype == dtype
    assert mixed.tolist() == [[0.625, 0.375], [0.25, 0.75], [0, 1]]
    assert soft.tolist() == [[1, 0], [0.5, 0.5], [0, 1]]


def test_classes_in_columns_are_soft_labels_of_whole_numbers(device, partners):
    mixed = mix_labels(torch.tensor([[1, 0], [0, 1], [0, 1]], device=device), partners, (4, 4), 2)
    assert mixed.tolist() == [[0.25, 0.75], [0, 1], [0, 1]]
