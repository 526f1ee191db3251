"""Addresses in one block of memory for buffers that live for a part of the time, so that few bytes hold them all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

ALIGNMENT = 64  # bytes: a cache line, and the widest vector of a CPU


class Lifetime(NamedTuple):
    """Bytes that are in use from step `first` to step `last`, both included."""

    bytes: int
    first: int
    last: int


def arrange(lifetimes: Sequence[Lifetime]) -> tuple[list[int], int]:
    """An address for each, a multiple of ALIGNMENT, and the bytes of the whole: no two that are in use at the same step
    overlap. The largest are placed first, each in the smallest gap that holds it among those placed that live at the
    same time: the greedy method by size of Pisarchyk and Lee, "Efficient memory management for deep neural net
    inference", 2020.
    """
    addresses = [0] * len(lifetimes)
    placed: list[tuple[int, int, Lifetime]] = []  # begin, end
    for index in sorted(range(len(lifetimes)), key=lambda i: (-lifetimes[i].bytes, lifetimes[i].first)):
        mine = lifetimes[index]
        if mine.bytes == 0:
            continue
        size = -(-mine.bytes // ALIGNMENT) * ALIGNMENT
        begin = _smallest_gap(size, sorted((b, e) for b, e, other in placed if _together(mine, other)))
        addresses[index] = begin
        placed.append((begin, begin + size, mine))
    return addresses, max((end for _, end, _ in placed), default=0)


def least(lifetimes: Sequence[Lifetime]) -> int:
    """The bytes in use at the step that uses most: no arrangement takes less."""
    steps = {lifetime.first for lifetime in lifetimes}  # the use only grows where a lifetime begins
    return max((sum(life.bytes for life in lifetimes if life.first <= step <= life.last) for step in steps), default=0)


def _together(one: Lifetime, other: Lifetime) -> bool:
    return one.first <= other.last and other.first <= one.last


def _smallest_gap(size: int, taken: Sequence[tuple[int, int]]) -> int:
    """Where the smallest gap between spans, in the order of their beginnings, begins that is `size` long; behind them
    all, if there is none.
    """
    best, free, room = None, 0, 0
    for begin, end in taken:
        if size <= begin - free and (best is None or begin - free < room):
            best, room = free, begin - free
        free = max(free, end)
    return free if best is None else best
