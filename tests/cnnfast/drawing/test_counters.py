"""Uniform numbers named by counters: known ones, and that nothing but the name counts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cnnfast.drawing import Dice, Draw
from cnnfast.drawing.counters import TRIES, below, between, first_of, tries_of, uniform, words
from cnnfast.philox import philox

INDEX = np.array([0, 1, 7, 2**31, 2**33 + 5, 2**63 - 1, -1])


def test_words_are_those_of_philox():
    """The counter is (index's lower half, its upper half, epoch, draw), the key the seed's halves."""
    drawn = words(seed=(3 << 32) + 9, epoch=2**32 - 1, index=INDEX, draws=[Draw.COINS, Draw.ERASING])
    for d, draw in enumerate((0, 32)):
        for n, index in enumerate(INDEX.tolist()):
            counter = torch.tensor([index & 0xFFFFFFFF, index >> 32 & 0xFFFFFFFF, 2**32 - 1, draw])
            assert drawn[d, :, n].tolist() == philox(counter, torch.tensor([9, 3])).tolist()


def test_known_numbers():
    """Written down where they were first computed; every machine has the same."""
    u = Dice(seed=1, epoch=2, index=np.array([3]))[Draw.CROP][:, 0]
    assert [float(v).hex() for v in u] == KNOWN


KNOWN = ["0x1.9b08561500000p-1", "0x1.431c284500000p-1", "0x1.ecaace4900000p-1", "0x1.cee92a1b00000p-1"]


def test_numbers_depend_on_their_names_alone():
    """Not on other images, on their order, or on what else is drawn."""
    many = Dice(5, 6, INDEX, (Draw.COINS, *tries_of(Draw.CROP)))
    for n, index in enumerate(INDEX):
        alone = Dice(5, 6, INDEX[n : n + 1])
        assert np.array_equal(alone[Draw.COINS][:, 0], many[Draw.COINS][:, n])
        assert np.array_equal(alone[Draw.CROP + TRIES - 1][:, 0], many[Draw.CROP + TRIES - 1][:, n])
        assert np.array_equal(alone.tries(Draw.CROP)[..., 0], many.tries(Draw.CROP)[..., n]), index
    for other in (Dice(6, 6, INDEX), Dice(5, 7, INDEX), Dice(5 + 2**32, 6, INDEX), Dice(5, 6, INDEX + 100)):
        assert not np.isin(other[Draw.COINS], many[Draw.COINS]).any()


def test_no_two_draws_share_a_number():
    used = [*Draw, *tries_of(Draw.CROP), *tries_of(Draw.ERASING)]
    assert len(set(used)) == len(Draw) + 2 * (TRIES - 1)


def test_numbers_are_uniform():
    """Kolmogorov and Smirnov's distance of 20 000, and no correlation between the four of a draw or of two images."""
    u = Dice(0, 0, np.arange(20_000))[Draw.COINS]
    for row in u:
        distance = np.abs(np.sort(row) - (np.arange(len(row)) + 0.5) / len(row)).max()
        assert distance < 1.95 / len(row) ** 0.5  # exceeded by one true sample in a thousand
    correlations = np.corrcoef(np.concatenate([u[:, 1:], u[:, :-1]]))
    assert np.abs(correlations - np.eye(8)).max() < 4 / 20_000**0.5
    assert u.min() > 0
    assert u.max() < 1


@pytest.mark.parametrize("word", [0, 1, 2**32 - 1])
def test_ends_are_not_left(word):
    u = uniform(np.array([word]))
    assert 0 < u[0] < 1
    assert 0.1 <= between(0.1, 0.3, u)[0] <= 0.3
    assert between(0.3, 0.3, u)[0] == 0.3
    assert below(3, u)[0] == (2 if word > 1 else 0)


def test_the_first_try_that_fits_counts():
    fits = np.array([[False, True, False], [True, True, False]])
    assert first_of(fits, np.array([[1, 2, 3], [4, 5, 6]]))[0].tolist() == [4, 2, 3]
