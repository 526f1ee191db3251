"""Which tile a convolution kernel runs with. Pure Python: imports neither torch nor triton.

What was measured is in tables.py; this is what runs where nothing was, and what measuring tries (`search_tiles`). A row
of `DEFAULT_TILES` is a choice by resources alone: nothing here has been measured on a GPU yet. All of them use 4 warps,
because loops over flattened taps x channels were once miscompiled at 8 (pytorch/pytorch#173068): a tile of 8 has to be
checked on the GPU and the layer that it is to serve, as measuring does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from .gpus import SHARED_LIMITS
from .problem import ConvProblem, tap_step

Operation = Literal["fprop", "dgrad", "wgrad"]
Precision = Literal["half", "tf32", "ieee", "fp64"]

# The most that one instruction of a thread loads.
VECTOR_BYTES = 16
ELEMENT_BYTES: dict[Precision, int] = {"half": 2, "tf32": 4, "ieee": 4, "fp64": 8}
# ptxas may take all registers there are. Told no number, it spills a few where that lets one more program run.
MAX_REGISTERS = 255


@dataclass(frozen=True, slots=True)
class TileConfig:
    """Extents along the GEMM's axes, and how a program is built from them. SPLIT_K cuts wgrad's reduction."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int = 4
    num_stages: int = 3
    SPLIT_K: int = 1

    def __str__(self) -> str:
        split = f" split {self.SPLIT_K}" if self.SPLIT_K > 1 else ""
        return f"{self.BLOCK_M}x{self.BLOCK_N}x{self.BLOCK_K} w{self.num_warps} s{self.num_stages}{split}"


# Largest first. Shared memory of the largest stays under the 99 KiB of sm_89.
DEFAULT_TILES: dict[Precision, tuple[TileConfig, ...]] = {
    "half": (TileConfig(128, 64, 32, 4, 4), TileConfig(64, 64, 32, 4, 4), TileConfig(64, 32, 32, 4, 4)),
    "tf32": (TileConfig(64, 64, 16, 4, 4), TileConfig(64, 32, 16, 4, 4)),
    "ieee": (TileConfig(64, 64, 16, 4, 3), TileConfig(64, 32, 16, 4, 3)),
    "fp64": (TileConfig(64, 32, 16, 4, 2), TileConfig(32, 32, 16, 4, 2)),
}

# Of 8 warps: measuring tries them, nothing else does.
WIDE_TILES = (TileConfig(128, 128, 32, 8, 4), TileConfig(256, 64, 32, 8, 4))

# Programs that keep a GPU busy: one a multiprocessor of the smallest data-centre part. Measured tables replace this
# guess.
BUSY_PROGRAMS = 108
# The workspace of partial weight gradients, and the k-steps below which a further split costs more than it hides.
MAX_SPLIT = 64
MIN_STEPS_PER_SPLIT = 8


def precision_class(dtype: str, tf32: bool = False) -> Precision:
    """`dtype` as PyTorch prints it, without "torch."."""
    match dtype:
        case "float16" | "bfloat16":
            return "half"
        case "float32":
            return "tf32" if tf32 else "ieee"
        case "float64":
            return "fp64"
    raise ValueError(f"dtype={dtype} has no kernel: use float16, bfloat16, float32 or float64")


def gemm_extents(problem: ConvProblem, operation: Operation) -> tuple[int, int, int]:
    """(GEMM_M, GEMM_N, GEMM_K) of one group."""
    taps = problem.R * problem.S
    match operation:
        case "fprop":
            return problem.N * problem.P * problem.Q, problem.group_filters, taps * problem.group_channels
        case "dgrad":
            return problem.N * problem.H * problem.W, problem.group_channels, taps * problem.group_filters
        case "wgrad":
            return problem.group_filters, taps * problem.group_channels, problem.N * problem.P * problem.Q


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def candidate_tiles(
    problem: ConvProblem, operation: Operation, precision: Precision, adjacent: bool = True, arch: int = 90
) -> tuple[TileConfig, ...]:
    """The default tiles that a convolution may get, largest first: those whose kernels keep within the registers of 4
    warps.

    `adjacent`: channels lie next to each other in all operands; if not, every element needs an address of its own. Few
    channels (a k-step spans several taps) need some too. `arch`: 90 for sm_90; on sm_100 the compiler takes more
    registers.
    """
    tiles = DEFAULT_TILES[precision]
    depth = problem.group_filters if operation == "dgrad" else problem.group_channels
    few = depth < tiles[0].BLOCK_K and problem.R * problem.S > 1
    if not adjacent or (few and operation == "wgrad" and arch >= 100):  # on sm_100 triton 3.6.0 spills larger ones
        return tiles[-1:]
    return tiles[1:] if few or arch >= 100 else tiles


def register_limit(problem: ConvProblem, operation: Operation, precision: Precision, tile: TileConfig) -> int | None:
    """The registers of a thread that ptxas is told for a kernel of gather/; None: it is told nothing.

    Told nothing, that of triton 3.7.1 takes a few too few for two kernels, so that one more program may run, and spills
    8 to 16 bytes: dgrad with 64 sums a thread, on sm_80 and sm_89, and fprop in float32 with 16, on sm_89. The limits,
    which are what 3 and 4 programs of 4 warps may have, make no tile spill. Others compile to fewer registers without a
    limit, which ptxas uses up where there is one.
    """
    sums = tile.BLOCK_M * tile.BLOCK_N // (32 * tile.num_warps)
    if operation == "dgrad" and sums >= 64:
        return 168
    if operation == "fprop" and precision == "ieee" and sums <= 16 and problem.group_channels >= tile.BLOCK_K:
        return 128
    return None


def programs(problem: ConvProblem, operation: Operation, tile: TileConfig) -> int:
    """Those of a launch; in wgrad, those of one part of the sum."""
    GEMM_M, GEMM_N, _ = gemm_extents(problem, operation)
    return cdiv(GEMM_M, tile.BLOCK_M) * cdiv(GEMM_N, tile.BLOCK_N) * problem.groups


def default_split(problem: ConvProblem, tile: TileConfig) -> int:
    """Parts of wgrad's sum: enough to fill a GPU, each of some steps."""
    steps = cdiv(gemm_extents(problem, "wgrad")[2], tile.BLOCK_K)
    return max(
        1, min(MAX_SPLIT, cdiv(2 * BUSY_PROGRAMS, programs(problem, "wgrad", tile)), steps // MIN_STEPS_PER_SPLIT)
    )


def choose_tile(
    problem: ConvProblem, operation: Operation, precision: Precision, adjacent: bool = True, arch: int = 90
) -> TileConfig:
    """The largest candidate that is not mostly padding and leaves enough programs to fill a GPU; else the smallest."""
    GEMM_M, GEMM_N, _ = gemm_extents(problem, operation)
    tiles = candidate_tiles(problem, operation, precision, adjacent, arch)
    least = tiles[-1]
    fitting = [t for t in tiles if t.BLOCK_M <= max(GEMM_M, least.BLOCK_M) and t.BLOCK_N <= max(GEMM_N, least.BLOCK_N)]
    if operation == "wgrad":  # the split, not the tile, makes the programs
        return replace(fitting[0], SPLIT_K=default_split(problem, fitting[0]))
    return next((t for t in fitting if programs(problem, operation, t) >= BUSY_PROGRAMS), fitting[-1])


def steps_of_loop(problem: ConvProblem, operation: Operation, tile: TileConfig) -> int:
    """The k-steps of a program's main loop; in dgrad, of the class of pixels that the most taps reach."""
    g = problem
    if operation == "wgrad":
        return cdiv(cdiv(gemm_extents(g, operation)[2], tile.BLOCK_K), tile.SPLIT_K)
    depth, taps = g.group_channels, g.R * g.S
    if operation == "dgrad":
        depth = g.group_filters
        taps = cdiv(g.R, tap_step(g.stride_h, g.dil_h)) * cdiv(g.S, tap_step(g.stride_w, g.dil_w))
    return cdiv(taps * depth, tile.BLOCK_K) if depth < tile.BLOCK_K else taps * cdiv(depth, tile.BLOCK_K)


def least_shared_bytes(tile: TileConfig, precision: Precision) -> int:
    """Of a program: what its loads that are on their way fill. The compiler takes at least this much; on sm_90 it takes
    a stage more.
    """
    return (tile.num_stages - 1) * (tile.BLOCK_M + tile.BLOCK_N) * tile.BLOCK_K * ELEMENT_BYTES[precision]


def search_tiles(
    problem: ConvProblem, operation: Operation, precision: Precision, adjacent: bool = True, arch: int = 90
) -> Iterator[TileConfig]:
    """What measuring tries: the default tiles that may be chosen and wider ones, first as they are, then with k-steps
    of twice their length and with one stage less; in wgrad, instead of that, with half and twice the default split.

    Left out is what cannot win or does not differ: blocks of which half or more would be empty where there are smaller
    ones, tiles that need more shared memory than `arch` has, and fewer stages where the loop has no more steps than
    that.
    """
    depth = problem.group_filters if operation == "dgrad" else problem.group_channels
    GEMM_M, GEMM_N, _ = gemm_extents(problem, operation)
    tiles = candidate_tiles(problem, operation, precision, adjacent, arch)
    wide = WIDE_TILES if precision == "half" and tiles[0] == DEFAULT_TILES["half"][0] else ()
    least = tiles[-1]
    limit = SHARED_LIMITS.get(arch, min(SHARED_LIMITS.values()))
    found: set[TileConfig] = set()
    for tile in (*tiles, *wide):
        if tile.BLOCK_M >= max(2 * GEMM_M, least.BLOCK_M + 1) or tile.BLOCK_N >= max(2 * GEMM_N, least.BLOCK_N + 1):
            continue
        longer = [
            replace(tile, BLOCK_K=step) for step in [tile.BLOCK_K] + [2 * tile.BLOCK_K] * (depth >= 2 * tile.BLOCK_K)
        ]
        if operation == "wgrad":
            splits = [(t, default_split(problem, t)) for t in longer]
            ways = [*splits, *((t, cdiv(s, 2)) for t, s in splits), *((t, min(2 * s, MAX_SPLIT)) for t, s in splits)]
            variants = [replace(t, SPLIT_K=split) for t, split in ways]
        else:
            variants = [
                replace(t, num_stages=stages) for stages in (tile.num_stages, tile.num_stages - 1) for t in longer
            ]
        for variant in variants:
            same = replace(
                variant, num_stages=min(variant.num_stages, max(1, steps_of_loop(problem, operation, variant)))
            )
            if same not in found and least_shared_bytes(variant, precision) <= limit:
                found.add(same)
                yield variant


# ----------------------------------------------------------------------------------------------------------------------
# Depthwise convolution

STRIP_THREADS = 128
STRIP_ROWS = (2, 4, 7)
# Taps of one column of a filter whose weights, or gradients, are in registers at a time; taps of a filter for whose
# gradients all are.
MAX_COLUMN_TAPS = 7
MAX_WHOLE_TAPS = 9
# Vectors that may be on their way to a thread's registers.
MAX_LOADS = 20
# wgrad: the workspace of partial gradients, and what of x and dy stays in the first-level cache while a filter's
# columns are summed one after another.
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
    """The rows that strips may have, the least work first: loads, of as many instructions as two multiply-adds, and
    multiply-adds, which in wgrad cost twice where strips are ragged. Those with no more than MAX_LOADS loads at once;
    the fewest, if there are none.

    In dgrad they are multiples of the stride: then every strip meets the same taps.
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


def strip_tiles(problem: ConvProblem, operation: Operation, precision: Precision, vector: int) -> tuple[StripTile, ...]:
    """The tiles that a depthwise convolution may get, the least work first. `vector`: adjacent channels that one load
    takes; 0: channels are apart.

    128 threads with one vector each, of 16 to 32 channels: that is 64 or 128 bytes of a pixel side by side. Where
    channels are apart threads lie side by side in the image.
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
    splits = (
        sorted({cdiv(chosen.SPLIT_K, 2), chosen.SPLIT_K, min(2 * chosen.SPLIT_K, MAX_STRIP_SPLIT)})
        if operation == "wgrad"
        else [1]
    )
    for tile in strip_tiles(problem, operation, precision, min(vector, 1) if problem.group_filters > 1 else vector):
        yield from (replace(tile, SPLIT_K=split) for split in splits)


def choose_strip_tile(problem: ConvProblem, operation: Operation, precision: Precision, vector: int) -> StripTile:
    """The candidate of the least work that leaves enough programs to fill a GPU, which in wgrad the split provides;
    else the lowest.
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
