"""Which tile a tensor-map kernel runs with. Pure Python: imports neither torch nor triton.

Nothing here has been measured on a GPU. The sizes compile without spills on every supported compiler, and a small model
of what a convolution moves and multiplies chooses among them where tables.py has no measured row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from ..problem import ConvProblem
from ..tiling import Operation, cdiv


@dataclass(frozen=True, slots=True)
class BoxTile:
    """A box of TILE_N images x TILE_H rows x TILE_W columns of pixels, TILE_K filters, TILE_C channels: the letters of
    ConvProblem.

    One of the three is summed over: fprop steps through channels, dgrad through filters, wgrad through pixels, which
    SPLIT_K cuts.
    """

    TILE_N: int
    TILE_H: int
    TILE_W: int
    TILE_K: int
    TILE_C: int
    num_warps: int = 4
    num_stages: int = 3
    SPLIT_K: int = 1

    @property
    def pixels(self) -> int:
        return self.TILE_N * self.TILE_H * self.TILE_W

    def gemm(self, operation: Operation) -> tuple[int, int, int]:
        """(rows, columns, depth) of the product of one step, rows and columns in either order."""
        match operation:
            case "fprop":
                return self.pixels, self.TILE_K, self.TILE_C
            case "dgrad":
                return self.pixels, self.TILE_C, self.TILE_K
            case "wgrad":
                return self.TILE_K, self.TILE_C, self.pixels

    def __str__(self) -> str:
        split = f" split {self.SPLIT_K}" if self.SPLIT_K > 1 else ""
        box = f"{self.TILE_N}x{self.TILE_H}x{self.TILE_W}"
        return f"{box} pixels k{self.TILE_K} c{self.TILE_C} w{self.num_warps} s{self.num_stages}{split}"


class BoxSize(NamedTuple):
    """A BoxTile whose pixels are no box yet."""

    pixels: int
    filters: int
    channels: int
    num_warps: int
    num_stages: int


# Largest first, four warps for the reason that tiling.py gives.
SIZES: dict[Operation, tuple[BoxSize, ...]] = {
    "fprop": (
        BoxSize(256, 64, 64, 4, 4),
        BoxSize(128, 128, 64, 4, 3),
        BoxSize(128, 64, 64, 4, 4),
        BoxSize(64, 64, 64, 4, 4),
    ),
    "dgrad": (
        BoxSize(256, 64, 64, 4, 4),
        BoxSize(128, 64, 128, 4, 3),
        BoxSize(128, 64, 64, 4, 4),
        BoxSize(64, 64, 64, 4, 4),
    ),
    "wgrad": (BoxSize(64, 128, 128, 4, 3), BoxSize(64, 128, 64, 4, 4), BoxSize(64, 64, 64, 4, 4)),
}
# In wgrad boxes of several axes pass through registers (see boxes.py), and ptxas then waits after every wgmma of 128
# columns.
MOST_CHANNELS_OF_BOXES = 64
# A tile's sums that leave a thread registers enough for erf, which takes the most, and on sm_100 for the addresses of a
# gradient's weights.
MOST_SUMS = 128 * 64
# Rows x columns of an image in a box, which takes as many images as make up its pixels. One row of all pixels is tried
# too.
SHAPES = ((8, 16), (8, 8), (4, 4), (2, 2), (1, 16), (1, 1))
# Where less of a box than this lies in the tensor, the pointers of gather/, which pack the pixels, have less to do.
MIN_USEFUL = 0.5
# The model's machine, from data sheets and estimates: multiprocessors; of each, floating-point operations a clock, and
# bytes a clock from the second-level cache; clocks of a program outside its loop; bytes of memory a clock, and the
# clocks that one more launch takes.
MULTIPROCESSORS = 132
FLOPS_PER_CLOCK = 4096
CACHE_BYTES_PER_CLOCK = 24
CLOCKS_PER_PROGRAM = 1500
MEMORY_BYTES_PER_CLOCK = 2400
CLOCKS_PER_LAUNCH = 3500
MAX_SPLIT = 64


def box_grid(problem: ConvProblem, operation: Operation) -> tuple[int, int]:
    """Rows and columns of the pixels that boxes tile: outputs; in dgrad, inputs of the largest class (see dgrad.py)."""
    g = problem
    return (cdiv(g.H, g.stride_h), cdiv(g.W, g.stride_w)) if operation == "dgrad" else (g.P, g.Q)


def box_count(problem: ConvProblem, operation: Operation, tile: BoxTile) -> int:
    rows, columns = box_grid(problem, operation)
    return cdiv(problem.N, tile.TILE_N) * cdiv(rows, tile.TILE_H) * cdiv(columns, tile.TILE_W)


def box_phases(problem: ConvProblem, operation: Operation, tile: BoxTile) -> tuple[int, int] | None:
    """(PHASE_H, PHASE_W), as boxes.py explains them, of x, or of dx in dgrad; None where the tile's boxes cannot step
    with the stride.

    That is where an image is no whole number of phases, or a block of channels reaches into the next pixel's. Wgrad may
    read those, for it does not store what they make.
    """
    g = problem
    phase_h = g.stride_h if tile.TILE_H > 1 else 1
    phase_w = g.stride_w if tile.TILE_W > 1 else 1
    whole = g.H % phase_h == 0 and g.W % phase_w == 0
    return (phase_h, phase_w) if whole and (phase_w == 1 or operation == "wgrad" or g.C % tile.TILE_C == 0) else None


def phases_of(problem: ConvProblem, operation: Operation, tile: BoxTile) -> tuple[int, int]:
    """Those of a tile that somebody named. Raises ValueError where there are none."""
    g, phases = problem, box_phases(problem, operation, tile)
    if phases is None:
        raise ValueError(
            f"tile={tile} cannot step with stride {g.stride_h}x{g.stride_w} over {g.C} channels of {g.H}x{g.W} pixels: "
            "use boxes of one row and one column, or channels and pixels that its blocks and the stride divide"
        )
    return phases


def candidate_boxes(
    problem: ConvProblem, operation: Operation, activation: str | None = None, arch: int = 90
) -> Iterator[BoxTile]:
    """The tiles that a convolution may get: of each size, with every shape of box that suits its strides. `arch`: 90
    for sm_90.
    """
    g = problem
    short_of_registers = activation == "gelu" or (operation == "wgrad" and arch >= 100)
    for pixels, filters, channels, num_warps, num_stages in SIZES[operation]:
        if operation == "fprop" and g.C <= 32:
            channels = 32
        if operation == "dgrad" and g.K <= 32:
            filters = 32
        for rows, columns in (*SHAPES, (1, pixels)):
            if rows * columns > pixels:
                continue
            tile = BoxTile(pixels // (rows * columns), rows, columns, filters, channels, num_warps, num_stages)
            sums = tile.gemm(operation)[0] * tile.gemm(operation)[1]
            serial = (
                operation == "wgrad" and pixels not in (tile.TILE_N, tile.TILE_W) and channels > MOST_CHANNELS_OF_BOXES
            )
            if (
                box_phases(g, operation, tile) is not None
                and not serial
                and not (short_of_registers and sums > MOST_SUMS)
            ):
                yield tile


def tap_pairs(outputs: int, inputs: int, taps: int, stride: int, pad: int, dilation: int) -> int:
    """The pairs of an output pixel and a tap, along one axis, that meet in the image and not in the padding."""
    pairs = 0
    for tap in range(taps):
        first = tap * dilation - pad  # what the first output sees
        pairs += max(min(outputs, cdiv(max(inputs - first, 0), stride)) - cdiv(max(-first, 0), stride), 0)
    return pairs


def box_steps(problem: ConvProblem, operation: Operation, tile: BoxTile) -> int:
    """Steps of all programs together. Boxes of one row, or column, skip the taps that see padding."""
    g = problem
    rows, columns = box_grid(g, operation)
    steps_h = (
        tap_pairs(g.P, g.H, g.R, g.stride_h, g.pad_h, g.dil_h) if tile.TILE_H == 1 else cdiv(rows, tile.TILE_H) * g.R
    )
    steps_w = (
        tap_pairs(g.Q, g.W, g.S, g.stride_w, g.pad_w, g.dil_w) if tile.TILE_W == 1 else cdiv(columns, tile.TILE_W) * g.S
    )
    return cdiv(g.N, tile.TILE_N) * steps_h * steps_w * cdiv(g.K, tile.TILE_K) * cdiv(g.C, tile.TILE_C)


def estimated_clocks(problem: ConvProblem, operation: Operation, tile: BoxTile) -> float:
    """What a convolution takes if its programs are spread evenly and each is bound by its products or by what it loads."""
    g = problem
    tiles_k, tiles_c = cdiv(g.K, tile.TILE_K), cdiv(g.C, tile.TILE_C)
    programs = {
        "fprop": box_count(g, operation, tile) * tiles_k,
        "dgrad": box_count(g, operation, tile) * g.parities * tiles_c,
        "wgrad": g.R * g.S * tiles_k * tiles_c * tile.SPLIT_K,
    }[operation]
    rows, columns, depth = tile.gemm(operation)
    step = max(2 * rows * columns * depth / FLOPS_PER_CLOCK, 2 * (rows + columns) * depth / CACHE_BYTES_PER_CLOCK)
    waves = cdiv(programs, MULTIPROCESSORS)
    clocks = waves * (box_steps(g, operation, tile) / programs * step + CLOCKS_PER_PROGRAM)
    if tile.SPLIT_K > 1:  # partial gradients are written and read again
        clocks += CLOCKS_PER_LAUNCH + 8 * tile.SPLIT_K * g.K * g.R * g.S * g.C / MEMORY_BYTES_PER_CLOCK
    return clocks


def splits(problem: ConvProblem, operation: Operation, tile: BoxTile) -> Iterator[BoxTile]:
    """The tile, and in wgrad also with its sum cut into 2, 4, 8, ... parts, none of them without a box."""
    most = min(MAX_SPLIT, box_count(problem, operation, tile)) if operation == "wgrad" else 1
    split = 1
    while split <= most:
        yield replace(tile, SPLIT_K=split)
        split *= 2


def search_boxes(
    problem: ConvProblem, operation: Operation, activation: str | None = None, arch: int = 90
) -> Iterator[BoxTile]:
    """What measuring tries, those of the least estimated clocks first: all candidates whose boxes would not be mostly
    empty, and splits.
    """
    rows, columns = box_grid(problem, operation)
    pixels = problem.N * rows * columns
    useful = [
        tile
        for tile in candidate_boxes(problem, operation, activation, arch)
        if pixels >= MIN_USEFUL * tile.pixels * box_count(problem, operation, tile)
    ]
    candidates = [split for tile in useful for split in splits(problem, operation, tile)]
    yield from sorted(candidates, key=lambda tile: estimated_clocks(problem, operation, tile))


def is_half_empty(problem: ConvProblem, operation: Operation, tile: BoxTile) -> bool:
    """Whether half or more of the tile's filters or channels do not exist, though there are tiles of fewer."""
    least_filters, least_channels = (min(size[i] for size in SIZES[operation]) for i in (1, 2))
    return tile.TILE_K >= max(2 * problem.K, least_filters + 1) or tile.TILE_C >= max(2 * problem.C, least_channels + 1)


def choose_box_tile(
    problem: ConvProblem, operation: Operation, activation: str | None = None, arch: int = 90
) -> BoxTile | None:
    """The candidate of the least estimated clocks; None if the boxes of all would be mostly empty."""
    return next(search_boxes(problem, operation, activation, arch), None)
