"""Addresses in one block of memory for buffers that live for a part of the time, so that few bytes hold them all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

ALIGNMENT = 64  # bytes: a cache line, and the widest vector of a CPU


class Lifetime(NamedTuple):
    """Bytes that are in use from step `first` to step `last`, both included."""

    bytes: int
    first: int
    last: int


# Which is placed first: the largest, what is large for long, or what begins first. Each is best for some networks: with
# the largest first, MNASNet needs a quarter more than least() says, and DenseNets a twentieth; the others need none.
ORDERS: tuple[Callable[[Lifetime], tuple[int, ...]], ...] = (
    lambda life: (-life.bytes, life.first),
    lambda life: (-life.bytes * (life.last - life.first + 1), life.first),
    lambda life: (life.first, -life.bytes),
)


def arrange(lifetimes: Sequence[Lifetime]) -> tuple[list[int], int]:
    """An address for each, a multiple of ALIGNMENT, and the bytes of the whole: no two that are in use at the same step
    overlap. After Pisarchyk and Lee, "Efficient memory management for deep neural net inference", 2020: greedy, in
    several orders, of which the best is kept.
    """
    return min((_greedy(lifetimes, order) for order in ORDERS), key=lambda found: found[1])


def least(lifetimes: Sequence[Lifetime]) -> int:
    """The bytes in use at the step that uses most: no arrangement takes less."""
    steps = {life.first for life in lifetimes}  # the use only grows where something begins
    return max((sum(life.bytes for life in lifetimes if life.first <= step <= life.last) for step in steps), default=0)


def _greedy(lifetimes: Sequence[Lifetime], order: Callable[[Lifetime], tuple[int, ...]]) -> tuple[list[int], int]:
    """Each in its turn goes into the smallest gap that holds it, among those placed that live at the same time."""
    addresses = [0] * len(lifetimes)
    placed: list[tuple[int, int, Lifetime]] = []  # with begin and end
    for index in sorted(range(len(lifetimes)), key=lambda index: order(lifetimes[index])):
        mine = lifetimes[index]
        size = -(-mine.bytes // ALIGNMENT) * ALIGNMENT
        taken = sorted((b, e) for b, e, other in placed if mine.first <= other.last and other.first <= mine.last)
        begin = _smallest_gap(size, taken)
        if size:
            addresses[index] = begin
            placed.append((begin, begin + size, mine))
    return addresses, max((end for _, end, _ in placed), default=0)


def _smallest_gap(size: int, taken: Sequence[tuple[int, int]]) -> int:
    """Where the smallest gap of at least `size` begins between spans that are given in the order of their beginnings;
    behind them all, if there is none.
    """
    gaps, free = [], 0
    for begin, end in taken:
        if size <= begin - free:
            gaps.append((begin - free, free))
        free = max(free, end)
    return min(gaps)[1] if gaps else free
