from __future__ import annotations

from itertools import combinations

from hypothesis import given
from hypothesis import strategies as st

from cnnfast.engine.arena import ALIGNMENT, Lifetime, arrange, least


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


def test_the_smallest_gap_is_taken():
    """Gaps of four and of two lines are free at step 2: what needs two goes into the second, so that what needs four,
    but comes later in the order of sizes because it is not longer, still finds room.
    """
    line = ALIGNMENT
    walls = [Lifetime(100 * line, 0, 0), Lifetime(20 * line, 0, 2)]
    addresses, total = arrange([*walls, Lifetime(4 * line, 1, 2), Lifetime(2 * line, 2, 2)])
    assert total == 120 * line
    assert addresses[0] != addresses[1]
