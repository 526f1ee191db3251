"""Which tile a convolution kernel runs with. Pure Python: imports neither torch nor triton.

A row of `DEFAULT_TILES` is a choice by resources alone: nothing here has been measured on a GPU yet. All of them use
4 warps, because loops over flattened taps x channels were once miscompiled at 8 (pytorch/pytorch#173068).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .problem import ConvProblem

Operation = Literal["fprop", "dgrad", "wgrad"]
Precision = Literal["half", "tf32", "ieee", "fp64"]


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

# Programs that keep a GPU busy: one a multiprocessor of the smallest data-centre part. Measured tables replace this guess.
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
    """The default tiles that a convolution may get, largest first: those whose kernels keep within the registers of 4 warps.

    `adjacent`: channels lie next to each other in all operands; if not, every element needs an address of its own. Few channels
    (a k-step spans several taps) need some too. `arch`: 90 for sm_90; on sm_100 the compiler takes more registers.
    """
    tiles = DEFAULT_TILES[precision]
    depth = problem.group_filters if operation == "dgrad" else problem.group_channels
    few = depth < tiles[0].BLOCK_K and problem.R * problem.S > 1
    if not adjacent:
        return tiles[-1:]
    return tiles[1:] if few or arch >= 100 else tiles


def choose_tile(problem: ConvProblem, operation: Operation, precision: Precision, adjacent: bool = True, arch: int = 90) -> TileConfig:
    """The largest candidate that is not mostly padding and leaves enough programs to fill a GPU; else the smallest."""
    GEMM_M, GEMM_N, GEMM_K = gemm_extents(problem, operation)
    tiles = candidate_tiles(problem, operation, precision, adjacent, arch)
    least = tiles[-1]
    fitting = [t for t in tiles if t.BLOCK_M <= max(GEMM_M, least.BLOCK_M) and t.BLOCK_N <= max(GEMM_N, least.BLOCK_N)]
    programs = {t: cdiv(GEMM_M, t.BLOCK_M) * cdiv(GEMM_N, t.BLOCK_N) * problem.groups for t in fitting}
    if operation == "wgrad":  # the split, not the tile, makes the programs
        tile = fitting[0]
        steps = cdiv(GEMM_K, tile.BLOCK_K)
        split = min(MAX_SPLIT, cdiv(2 * BUSY_PROGRAMS, programs[tile]), max(1, steps // MIN_STEPS_PER_SPLIT))
        return TileConfig(tile.BLOCK_M, tile.BLOCK_N, tile.BLOCK_K, tile.num_warps, tile.num_stages, split)
    return next((t for t in fitting if programs[t] >= BUSY_PROGRAMS), fitting[-1])
