from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cnnfast.engine.planning.arena import ALIGNMENT, Lifetime, arrange, least


@st.composite
def lifetimes(draw: st.DrawFn) -> list[Lifetime]:
    def lifetime() -> Lifetime:
        first = draw(st.integers(0, 12))
        size = draw(st.one_of(st.integers(0, 8).map(lambda n: n * ALIGNMENT), st.integers(0, 300)))
        return Lifetime(size, first, first + draw(st.integers(0, 6)))

    return [lifetime() for _ in range(draw(st.integers(0, 14)))]


def aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


@given(lifetimes())
def test_what_lives_together_lies_apart(buffers):
    addresses, total = arrange(buffers)
    assert all(address % ALIGNMENT == 0 for address in addresses)
    for (a, one), (b, other) in combinations(zip(addresses, buffers, strict=True), 2):
        together = one.first <= other.last and other.first <= one.last
        assert not together or a + one.bytes <= b or b + other.bytes <= a or not (one.bytes and other.bytes)
    assert all(address + buffer.bytes <= total for address, buffer in zip(addresses, buffers, strict=True))
    assert least(buffers) <= total <= sum(aligned(buffer.bytes) for buffer in buffers)


@given(lifetimes())
def test_the_least_is_what_is_alive_at_the_fullest_step(buffers):
    alive = [sum(b.bytes for b in buffers if b.first <= step <= b.last) for step in range(20)]
    assert least(buffers) == max(alive)


def test_a_chain_takes_what_two_neighbours_take():
    chain = [Lifetime(640, step, step + 1) for step in range(10)]
    assert arrange(chain)[1] == least(chain) == 2 * 640


LINES = {  # (lines, first, last): found by trying random ones
    "best with the largest first": [(3, 0, 1), (1, 3, 3), (4, 2, 2), (2, 1, 2)],
    "best with what is large for long first": [(1, 0, 2), (3, 0, 3), (3, 2, 4), (2, 2, 4), (4, 0, 1), (2, 4, 7)],
    "best in the order of beginnings": [(3, 2, 4), (4, 2, 3), (4, 1, 2), (1, 0, 3), (4, 4, 6), (2, 3, 6)],
    "best with the smallest gap": [(4, 0, 2), (4, 4, 7), (1, 1, 3), (6, 1, 1), (3, 2, 5), (3, 3, 4), (5, 4, 6)],
}


@pytest.mark.parametrize("lines", LINES.values(), ids=LINES.keys())
def test_the_best_of_several_arrangements_is_kept(lines):
    """Each of these needs more if the order or the choice that it is named for is missing."""
    buffers = [Lifetime(n * ALIGNMENT, first, last) for n, first, last in lines]
    assert arrange(buffers)[1] == least(buffers)
