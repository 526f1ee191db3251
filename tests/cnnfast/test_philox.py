"""Philox against the known answers that its authors publish."""

from __future__ import annotations

import pytest
import torch

from cnnfast.philox import key_of, philox

# kat_vectors of Random123 (https://github.com/DEShawResearch/random123), "philox4x32 10": counter, key, result.
KNOWN = [
    (
        [0x00000000, 0x00000000, 0x00000000, 0x00000000],
        [0x00000000, 0x00000000],
        [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8],
    ),
    (
        [0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF],
        [0xFFFFFFFF, 0xFFFFFFFF],
        [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD],
    ),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_known_answers(counter, key, words, device):
    found = philox(torch.tensor(counter, device=device), torch.tensor(key, device=device))
    assert found.tolist() == words


def test_many_at_once_are_each_as_if_alone(device):
    counters, keys, words = (torch.tensor(numbers, device=device) for numbers in zip(*KNOWN, strict=True))
    assert torch.equal(philox(counters, keys), words)
    each = philox(counters[:, None], keys)  # every counter under every key
    assert each.shape == (3, 3, 4)
    assert torch.equal(each.diagonal().T, words)


def test_only_32_bits_count(device):
    counters, keys, words = (torch.tensor(numbers, device=device) for numbers in zip(*KNOWN, strict=True))
    assert torch.equal(philox(counters - 2**32, keys - 2**40), words)


@pytest.mark.parametrize("seed", [0, -1, 2**63 - 1, -(2**63), 0x123456789ABCDEF])
def test_a_seed_is_the_key_that_triton_makes_of_it(seed, device):
    assert key_of(torch.tensor(seed, device=device)).tolist() == [seed % 2**32, seed >> 32 & 0xFFFFFFFF]
