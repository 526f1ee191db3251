"""Which tile a convolution kernel of gather/ runs with. Pure Python: imports neither torch nor triton.

tables.py holds what was measured; this is what runs where nothing was, and what measuring tries (`search_tiles`). Tiles
for depthwise convolution are in gather/depthwise/tiles.py, those for tensor maps in tma/tiles.py. DEFAULT_TILES are
chosen by resources alone: nothing here has been measured on a GPU yet. All of them use 4 warps, because loops over
flattened taps x channels were once miscompiled at 8 (pytorch/pytorch#173068): a tile of 8 has to be checked on the GPU
and the layer that it is to serve, as measuring does.
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
# The limit that lets ptxas take all registers there are. Without any limit it spills a few where that lets one more
# program run.
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


@dataclass(frozen=True, slots=True)
class PackedTile(TileConfig):
    """A tile of the same kernels on a packed image (gather/stem.py)."""

    def __str__(self) -> str:
        return f"packed {TileConfig.__str__(self)}"


# Largest first. Shared memory of the largest stays under the 99 KiB of sm_89.
DEFAULT_TILES: dict[Precision, tuple[TileConfig, ...]] = {
    "half": (TileConfig(128, 64, 32, 4, 4), TileConfig(64, 64, 32, 4, 4), TileConfig(64, 32, 32, 4, 4)),
    "tf32": (TileConfig(64, 64, 16, 4, 4), TileConfig(64, 32, 16, 4, 4)),
    "ieee": (TileConfig(64, 64, 16, 4, 3), TileConfig(64, 32, 16, 4, 3)),
    "fp64": (TileConfig(64, 32, 16, 4, 2), TileConfig(32, 32, 16, 4, 2)),
}

# Before sm_90, where fprop's epilogue leaves it the registers: from the second-level cache it loads two thirds of what
# the largest of DEFAULT_TILES does for as many products. On sm_90 its loop waits after every wgmma.
SQUARE_TILE = TileConfig(128, 128, 32, 4, 3)
# Tiles of 8 warps, which only measuring tries.
WIDE_TILES = (TileConfig(128, 128, 32, 8, 4), TileConfig(256, 64, 32, 8, 4))

# Programs that keep a GPU busy: one a multiprocessor of the smallest data-centre part. Measured tables replace this
# guess.
BUSY_PROGRAMS = 108
# The most taps whose masks a kernel keeps as the bits of one number.
MOST_TAP_BITS = 31
# So many adjacent channels at least are loaded by one instruction, where channels are a multiple of so many.
LEAST_VECTOR = 4
# The most parts that wgrad's sum is cut into, each of which takes a slot of a workspace, and the fewest k-steps of a
# part: below that a further split costs more than it hides.
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

    `adjacent`: whether channels lie next to each other in all operands. If not, every element needs an address in
    registers, and so do some where channels are so few that a k-step spans several taps. `arch`: 90 for sm_90; on
    sm_100 the compiler takes more registers.
    """
    tiles = DEFAULT_TILES[precision]
    depth = problem.group_filters if operation == "dgrad" else problem.group_channels
    few = depth < tiles[0].BLOCK_K and problem.R * problem.S > 1
    if not adjacent or (few and operation == "wgrad" and arch >= 100):  # on sm_100 triton 3.6.0 spills larger ones
        return tiles[-1:]
    return tiles[1:] if few or arch >= 100 else tiles


def register_limit(problem: ConvProblem, operation: Operation, precision: Precision, tile: TileConfig) -> int | None:
    """The limit on a thread's registers that ptxas is given for a kernel of gather/; None: it is given none.

    Without a limit ptxas takes a few registers too few for some kernels, so that one more program may run, and spills 8
    to 16 bytes. That of triton 3.7.1: dgrad with 64 sums a thread, on sm_80 and sm_89; with 16, on sm_89, fprop in
    float32, and in half precision on a packed image; wgrad with 32, on sm_89 on a packed image, on sm_80 where a block
    of columns spans two taps, and in float64 with 16 on sm_89. That of 3.9.0: wgrad of strided windows with 64, on
    sm_89. The limits, which are what 3, 4 and 5 programs of 4 warps may have, make no tile spill. Other kernels get
    none, because ptxas uses a limit up where fewer registers would do. dgrad with 128 sums, which do not fit into 168,
    may take all.
    """
    sums = tile.BLOCK_M * tile.BLOCK_N // (32 * tile.num_warps)
    on_packed = precision == "half" and isinstance(tile, PackedTile)
    if operation == "dgrad" and sums >= 64:
        return 168 if sums < 128 else MAX_REGISTERS
    if operation == "fprop" and sums <= 16 and problem.group_channels >= tile.BLOCK_K:
        return 128 if precision == "ieee" else 96 if on_packed else None
    if operation == "wgrad" and precision == "fp64":
        return 128 if sums == 16 else None
    if operation == "wgrad" and precision == "half":
        if sums == 32:
            return 128 if on_packed else 96 if form_of(problem, operation, tile) == "masked" else None
        strided = problem.stride_h * problem.stride_w > 1 and problem.R * problem.S > 1
        return 168 if sums == 64 and strided else None
    return None


def possible_tiles(
    problem: ConvProblem,
    operation: Operation,
    precision: Precision,
    adjacent: bool = True,
    arch: int = 90,
    heavy: bool = False,
) -> list[TileConfig]:
    """The tiles that may run where nothing was measured, largest first: those of candidate_tiles that are not mostly
    padding, and the square one.

    Where the loop has fewer steps than a tile has stages, the tile comes with fewer stages as well, down to the steps:
    they take less shared memory, so that more programs may live on a multiprocessor. A wgrad, whose SPLIT_K is 1, keeps
    its stages: its steps follow from the image, and another image would compile another kernel.

    heavy: whether fprop has a norm with a residual, or an activation of more than one instruction: many registers.
    """
    GEMM_M, GEMM_N, _ = gemm_extents(problem, operation)
    tiles = candidate_tiles(problem, operation, precision, adjacent, arch)
    least = tiles[-1]
    found = [t for t in tiles if t.BLOCK_M <= max(GEMM_M, least.BLOCK_M) and t.BLOCK_N <= max(GEMM_N, least.BLOCK_N)]
    whole = form_of(problem, operation, SQUARE_TILE, adjacent) in ("1x1", "taps")
    fills = GEMM_M >= SQUARE_TILE.BLOCK_M and GEMM_N >= SQUARE_TILE.BLOCK_N
    if precision == "half" and arch < 90 and whole and fills and not heavy:
        found.insert(0, SQUARE_TILE)
    if operation == "wgrad":
        return found
    staged = []
    for tile in found:
        least_stages = min(tile.num_stages, max(1, steps_of_loop(problem, operation, tile)))
        staged += [replace(tile, num_stages=stages) for stages in range(least_stages, tile.num_stages + 1)]
    return staged


def programs(problem: ConvProblem, operation: Operation, tile: TileConfig) -> int:
    """The programs of a launch; in wgrad, those of one part of the sum."""
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


def depth_and_taps(problem: ConvProblem, operation: Operation) -> tuple[int, int]:
    """A group's channels and a filter's taps; in dgrad its filters, and the taps that reach the class of pixels that
    most taps reach.
    """
    g = problem
    if operation == "dgrad":
        return g.group_filters, cdiv(g.R, tap_step(g.stride_h, g.dil_h)) * cdiv(g.S, tap_step(g.stride_w, g.dil_w))
    return g.group_channels, g.R * g.S


def steps_of_loop(problem: ConvProblem, operation: Operation, tile: TileConfig) -> int:
    """The k-steps of a program's main loop; in dgrad, of the class of pixels that the most taps reach."""
    g = problem
    if operation == "wgrad":
        return cdiv(cdiv(gemm_extents(g, operation)[2], tile.BLOCK_K), tile.SPLIT_K)
    depth, taps = depth_and_taps(g, operation)
    return cdiv(taps * depth, tile.BLOCK_K) if depth < tile.BLOCK_K else taps * cdiv(depth, tile.BLOCK_K)


def form_of(problem: ConvProblem, operation: Operation, tile: TileConfig, adjacent: bool = True) -> str:
    """The form of a gather kernel's main loop, as far as its instructions follow from it.

    "1x1"; "taps": a k-step stays within one tap of a filter, whose mask is a bit of a number; "masked": where blocks of
    channels reach beyond them, or taps are too many, masks are computed in each step; "flat": few channels, a k-step
    spans several taps; "narrow": so few that they are loaded one at a time. In wgrad it is tiles, not k-steps, that
    span several taps, and then are "masked". "apart": channels are not `adjacent`, and each element is loaded alone.
    """
    depth, taps = depth_and_taps(problem, operation)
    step = tile.BLOCK_N if operation == "wgrad" else tile.BLOCK_K
    if not adjacent:
        return "apart"
    if taps == 1:
        return "1x1"
    if depth < step and depth % LEAST_VECTOR:
        return "narrow"
    if operation != "wgrad" and depth < step:
        return "flat"
    return "masked" if depth % step or (operation != "wgrad" and taps > MOST_TAP_BITS) else "taps"


def least_shared_bytes(tile: TileConfig, precision: Precision) -> int:
    """The shared memory of a program that its loads in flight fill. The compiler takes at least this much; on sm_90 it
    takes a stage more.
    """
    return (tile.num_stages - 1) * (tile.BLOCK_M + tile.BLOCK_N) * tile.BLOCK_K * ELEMENT_BYTES[precision]


def search_tiles(
    problem: ConvProblem, operation: Operation, precision: Precision, adjacent: bool = True, arch: int = 90
) -> Iterator[TileConfig]:
    """What measuring tries: the default tiles that may be chosen and wider ones, as they are, with k-steps of twice
    their length, and with one stage less; in wgrad, in place of fewer stages, with half and twice the default split.

    It leaves out what cannot win or makes no difference: blocks of which half or more would be empty where there are
    smaller ones, tiles that need more shared memory than `arch` has, and stages that the loop has no steps to fill.
    """
    depth = problem.group_filters if operation == "dgrad" else problem.group_channels
    GEMM_M, GEMM_N, _ = gemm_extents(problem, operation)
    tiles = candidate_tiles(problem, operation, precision, adjacent, arch)
    wide = WIDE_TILES if precision == "half" and tiles[0] == DEFAULT_TILES["half"][0] else ()
    if wide and arch < 90:
        wide = (SQUARE_TILE, *wide)
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
