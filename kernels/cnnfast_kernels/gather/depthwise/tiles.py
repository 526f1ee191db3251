"""Which tile a kernel for depthwise convolution runs with. Pure Python: imports neither torch nor triton.

tables.py holds what was measured; this is what runs where nothing was, and what measuring tries (`search_strip_tiles`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from ...problem import ConvProblem, tap_step
from ...tiling import BUSY_PROGRAMS, ELEMENT_BYTES, Operation, Precision, cdiv

STRIP_THREADS = 128
STRIP_ROWS = (2, 4, 7)
# The most taps of a filter's column whose weights, or gradients, are in registers at a time, and the most taps of a
# whole filter of which all gradients are.
MAX_COLUMN_TAPS = 7
MAX_WHOLE_TAPS = 9
# The most vectors that may be on their way to a thread's registers.
MAX_LOADS = 20
# In wgrad, the most parts of its sum, each of which takes a slot of a workspace, and the bytes of x and dy that stay in
# the first-level cache while a filter's columns are summed one after another.
MAX_STRIP_SPLIT = 2048
CACHED_BYTES = 64 * 2**10


@dataclass(frozen=True, slots=True)
class StripTile:
    """BLOCK_M strips of ROWS pixels below each other, BLOCK_C channels of each. SPLIT_K cuts wgrad's sum over the
    strips.
    """

    BLOCK_M: int
    BLOCK_C: int
    ROWS: int
    num_warps: int = STRIP_THREADS // 32
    SPLIT_K: int = 1

    def __str__(self) -> str:
        split = f" split {self.SPLIT_K}" if self.SPLIT_K > 1 else ""
        return f"{self.BLOCK_M}x{self.BLOCK_C} {self.ROWS} rows w{self.num_warps}{split}"


def taps_at_once(R: int, step: int = 1) -> int:
    """How many of a column's R taps the depthwise kernels take at once: all, or a multiple of `step`."""
    return R if R <= MAX_COLUMN_TAPS else max(step, MAX_COLUMN_TAPS // step * step)


def columns_at_once(R: int, S: int) -> int:
    """How many columns of a filter depthwise wgrad sums at once: all, or one."""
    return S if R * S <= MAX_WHOLE_TAPS else 1


def strip_rows(problem: ConvProblem, operation: Operation) -> tuple[int, ...]:
    """The numbers of rows that strips may have, the least work first, of those that take at most MAX_LOADS loads at
    once; the fewest rows, if none do.

    The work is loads, each of as many instructions as two multiply-adds, and multiply-adds, which in wgrad cost twice
    where the last strip is not full. In dgrad rows are multiples of the stride: then every strip meets the same taps.
    """
    g = problem
    backward = operation == "dgrad"
    extent, unit, step = (g.H, g.stride_h, 1) if backward else (g.P, 1, g.stride_h)
    taps = taps_at_once(g.R, tap_step(g.stride_h, g.dil_h) if backward else 1)
    columns = columns_at_once(g.R, g.S) if operation == "wgrad" else 1

    def loads(rows: int) -> int:
        reach = ((rows - 1) * step + (taps - 1) * g.dil_h) // unit + 1
        return min(cdiv(rows, unit) * taps, reach)

    def work(rows: int) -> int:
        ragged = operation == "wgrad" and g.P % rows > 0
        return cdiv(extent, rows) * (2 * loads(rows) + rows * taps // unit * (2 if ragged else 1))

    candidates = sorted({cdiv(rows, unit) * unit for rows in STRIP_ROWS})
    possible = [rows for rows in candidates if loads(rows) * columns <= MAX_LOADS]
    return tuple(sorted(possible or candidates[:1], key=work))


def form_of(problem: ConvProblem) -> str:
    """The form of a kernel, which is unrolled: by the window and the stride, as "3x3/2"."""
    g = problem
    stride = str(g.stride_h) if g.stride_h == g.stride_w else f"{g.stride_h}x{g.stride_w}"
    return f"{g.R}x{g.S}/{stride}"


def strip_tiles(problem: ConvProblem, operation: Operation, precision: Precision, vector: int) -> tuple[StripTile, ...]:
    """The tiles that a depthwise convolution may get, the least work first. `vector`: how many adjacent channels one
    load takes; 0 where channels are apart.

    A program has 128 threads with one vector each, and takes 16 or 32 channels of a pixel, 64 or 128 bytes side by
    side. Where channels are apart, threads lie side by side in the image.
    """
    channels = problem.C if operation == "dgrad" else problem.K
    BLOCK_C = 1 if vector == 0 else 16 if channels <= 16 or precision == "fp64" else 32
    BLOCK_M = STRIP_THREADS * max(vector, 1) // BLOCK_C
    return tuple(StripTile(BLOCK_M, BLOCK_C, rows) for rows in strip_rows(problem, operation))


def search_strip_tiles(
    problem: ConvProblem, operation: Operation, precision: Precision, vector: int
) -> Iterator[StripTile]:
    """What measuring tries: all that may be chosen; in wgrad with half, once and twice the default split."""
    chosen = choose_strip_tile(problem, operation, precision, vector)
    splits = [1]
    if operation == "wgrad":
        splits = sorted({cdiv(chosen.SPLIT_K, 2), chosen.SPLIT_K, min(2 * chosen.SPLIT_K, MAX_STRIP_SPLIT)})
    for tile in strip_tiles(problem, operation, precision, min(vector, 1) if problem.group_filters > 1 else vector):
        yield from (replace(tile, SPLIT_K=split) for split in splits)


def choose_strip_tile(problem: ConvProblem, operation: Operation, precision: Precision, vector: int) -> StripTile:
    """The tile of the least work that leaves enough programs to fill a GPU, which in wgrad the split provides; if there
    is none, that of the fewest rows.
    """
    g = problem
    if g.group_filters > 1:  # the channels of one operand do not lie as those of the other
        vector = min(vector, 1)
    tiles = strip_tiles(g, operation, precision, vector)
    if operation == "wgrad":
        tile = tiles[0]
        parts = max(1, cdiv(g.N * cdiv(g.P, tile.ROWS) * g.Q, tile.BLOCK_M))
        split = cdiv(4 * BUSY_PROGRAMS, cdiv(g.K, tile.BLOCK_C))
        if g.R > MAX_COLUMN_TAPS or columns_at_once(g.R, g.S) < g.S:
            tile_bytes = 2 * tile.BLOCK_M * tile.ROWS * tile.BLOCK_C * ELEMENT_BYTES[precision]
            split = max(split, cdiv(parts, max(1, CACHED_BYTES // tile_bytes)))
        return replace(tile, SPLIT_K=min(parts, split, MAX_STRIP_SPLIT))
    channels, rows, columns = (g.C, g.H, g.W) if operation == "dgrad" else (g.K, g.P, g.Q)

    def programs(tile: StripTile) -> int:
        return cdiv(g.N * cdiv(rows, tile.ROWS) * columns, tile.BLOCK_M) * cdiv(channels, tile.BLOCK_C)

    return next((tile for tile in tiles if programs(tile) >= 2 * BUSY_PROGRAMS), min(tiles, key=lambda tile: tile.ROWS))
