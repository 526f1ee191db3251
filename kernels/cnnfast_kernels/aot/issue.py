"""How many instructions a warp issues: in one k-step of the main loop, and on its way outside of it."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from ..tiling import cdiv
from .sass import MULTIPLY_ADD, TENSOR_CORE, Instruction, main_loop, tensor_core

# rows, columns and depth of a product: written with signs between them, or as digits of which the first may be two
SPACED = re.compile(r"(\d+)x(\d+)x(\d+)")
PACKED = re.compile(r"\.(16|8)(8)(16|8|4)\b")
WARPS_OF_WGMMA = 4
LANES = 32
# tcgen05 multiplies so many rows and columns at a time, and so many bytes of each of them
UTC_ROWS, UTC_COLUMNS, UTC_BYTES = 128, 256, 32


class Issued(NamedTuple):
    """Instructions of a warp. Of a k-step of the main loop, 0 if there is none; and outside of it."""

    loop: float
    other: float


class Product(NamedTuple):
    """What a program multiplies in a k-step: rows x columns x depth of numbers of so many bytes, by so many warps."""

    rows: int
    columns: int
    depth: int
    warps: int
    number_bytes: int


def multiply_adds(i: Instruction) -> int:
    """Of a warp, by one instruction; 0 for one that does not multiply, and for tcgen05's, whose opcodes do not tell."""
    if TENSOR_CORE.fullmatch(i.family):
        if match := SPACED.search(i.opcode) or PACKED.search(i.opcode):
            rows, columns, depth = map(int, match.groups())
            return rows * columns * depth // (WARPS_OF_WGMMA if i.family.endswith("GMMA") else 1)
        return 0
    return LANES * (2 if i.family == "FFMA2" else 1) if i.family in MULTIPLY_ADD else 0


def steps_in(instructions: Iterable[Instruction], product: Product) -> int:
    """The k-steps whose products are among the instructions."""
    instructions = list(instructions)
    core = tensor_core(instructions)
    p = product
    if core is not None and core.startswith("UTC"):
        of_a_step = cdiv(p.rows, UTC_ROWS) * cdiv(p.columns, UTC_COLUMNS) * cdiv(p.depth * p.number_bytes, UTC_BYTES)
        done = sum(i.family == core for i in instructions)
    else:
        of_a_step = p.rows * p.columns * p.depth // p.warps
        done = sum(map(multiply_adds, instructions))
    return round(done / of_a_step)


def distance(code: Sequence[Instruction], start: int, arrived: Callable[[int], bool]) -> int | None:
    """Instructions of the shortest way from number `start` on to the first that has arrived, neither of both ends
    counted twice: the first is, the last is not. None if there is no way.

    What a guard skips is not run: a slow division, another warp's part, the second sum of a gradient in which NaN came
    out.
    """
    at = {i.address: n for n, i in enumerate(code)}
    waiting, seen = deque([(start, 0)]), {start}
    while waiting:
        n, steps = waiting.popleft()
        if arrived(n):
            return steps
        i = code[n]
        ends = i.family in ("EXIT", "RET") or (i.family == "BRA" and i.target is not None)
        following = [] if ends and not i.guarded else [n + 1]
        if i.target is not None and i.target in at:
            following.append(at[i.target])
        for m in following:
            if m < len(code) and m not in seen:
                seen.add(m)
                waiting.append((m, steps + 1))
    return None


def issued(code: Sequence[Instruction], product: Product | None) -> Issued:
    """Instructions of one k-step, and on the shortest way through a kernel that passes its main loop.

    product: that of a k-step; None where a turn of the loop is taken for one. A loop that is unrolled in part is
    divided by the k-steps that it has in a turn. One that is unrolled whole is what lies between the first and the last
    product, divided by its k-steps.
    """
    body = main_loop(list(code))
    at = {i.address: n for n, i in enumerate(code)}

    def ends(n: int) -> bool:
        return code[n].family == "EXIT" and not code[n].guarded

    if body is not None:
        first, last = at[body[0].address], at[body[-1].address]
        before = distance(code, 0, lambda n: n == first)
        after = distance(code, last + 1, ends)
        steps = 1 if product is None else max(1, steps_in(body, product))
        return Issued(len(body) / steps, (before or 0) + (after or 0) + 1)
    works = [n for n, i in enumerate(code) if TENSOR_CORE.fullmatch(i.family)]
    if product is None or not works:
        return Issued(0, (distance(code, 0, ends) or 0) + 1)
    first, last = works[0], works[-1]
    before, after = distance(code, 0, lambda n: n == first), distance(code, last + 1, ends)
    steps = max(1, steps_in(code, product))
    return Issued((last + 1 - first) / steps, (before or 0) + (after or 0) + 1)
