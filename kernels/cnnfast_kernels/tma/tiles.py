"""Which tile a tensor-map kernel runs with. Pure Python: imports neither torch nor triton.

Nothing here has been measured on a GPU. The sizes compile without spills with every supported version of Triton. Where
tables.py has no measured row, a model of what they cost (costs.py) chooses among them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from typing import NamedTuple

from ..problem import ConvProblem, tap_pairs
from ..tiling import Operation, cdiv


class Box(NamedTuple):
    """What a kernel is compiled for of its tile: its constexpr argument `box`. The fields are BoxTile's."""

    TILE_N: int
    TILE_H: int
    TILE_W: int
    TILE_K: int
    TILE_C: int


@dataclass(frozen=True, slots=True)
class BoxTile:
    """A box of TILE_N images x TILE_H rows x TILE_W columns of pixels, TILE_K filters and TILE_C channels.

    A program computes two of these three and sums over the third: fprop steps through channels, dgrad through filters,
    wgrad through pixels. SPLIT_K is the number of parts that wgrad's sum is cut into.
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
    def box(self) -> Box:
        return Box(self.TILE_N, self.TILE_H, self.TILE_W, self.TILE_K, self.TILE_C)

    @property
    def pixels(self) -> int:
        return self.TILE_N * self.TILE_H * self.TILE_W

    def gemm(self, operation: Operation) -> tuple[int, int, int]:
        """(rows, columns, depth) of the matrix product of one step; a kernel may swap rows and columns."""
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
    """The size of a BoxTile, whose pixels may form a box of any shape."""

    pixels: int
    filters: int
    channels: int
    num_warps: int
    num_stages: int


# Largest first. Flattened loops by pointers keep to four warps for the reason that tiling.py gives; loops of boxes are
# not of that form.
SIZES: dict[Operation, tuple[BoxSize, ...]] = {
    "fprop": (
        BoxSize(256, 128, 64, 8, 3),
        BoxSize(128, 256, 64, 8, 3),
        BoxSize(256, 64, 64, 4, 4),
        BoxSize(128, 128, 64, 4, 3),
        BoxSize(128, 64, 64, 4, 4),
        BoxSize(64, 64, 64, 4, 4),
    ),
    "dgrad": (
        BoxSize(256, 64, 128, 8, 3),
        BoxSize(128, 64, 256, 8, 3),
        BoxSize(256, 64, 64, 4, 4),
        BoxSize(128, 64, 128, 4, 3),
        BoxSize(128, 64, 64, 4, 4),
        BoxSize(64, 64, 64, 4, 4),
    ),
    "wgrad": (
        BoxSize(64, 128, 256, 8, 3),
        BoxSize(64, 256, 128, 8, 3),
        BoxSize(64, 128, 128, 4, 3),
        BoxSize(64, 128, 64, 4, 4),
        BoxSize(64, 64, 64, 4, 4),
    ),
}
# The most channels of wgrad's boxes of several axes: they pass through registers (see boxes.py), and with more ptxas
# waits after every wgmma.
MOST_CHANNELS_OF_BOXES = 64
# The most sums (rows x columns of the product) of a tile where a kernel needs many registers for something else: for
# erf, which needs the most of all activations, and on sm_100 for the addresses of a gradient's weights, and for what
# the epilogue of a gradient reads.
MOST_SUMS = 128 * 64
# (rows, columns) of an image that a box may have; it takes as many images as it needs for its pixels. Boxes of a single
# long row are tried too.
SHAPES = ((8, 16), (8, 8), (4, 4), (2, 2), (1, 16), (1, 1))
# Where less than this share of a box lies in the tensor, the kernels of gather/, whose tiles waste no pixels, are taken
# to be faster.
MIN_USEFUL = 0.5
# How many shapes of box of one size a model compares.
SHAPES_OF_SIZE = 4


def box_grid(problem: ConvProblem, operation: Operation) -> tuple[int, int]:
    """Rows and columns of the pixels that boxes cover: outputs, or in dgrad inputs of the largest class (dgrad.py)."""
    g = problem
    return (cdiv(g.H, g.stride_h), cdiv(g.W, g.stride_w)) if operation == "dgrad" else (g.P, g.Q)


def box_count(problem: ConvProblem, operation: Operation, tile: BoxTile) -> int:
    """Boxes that cover the pixels of `box_grid`, in all images."""
    rows, columns = box_grid(problem, operation)
    return cdiv(problem.N, tile.TILE_N) * cdiv(rows, tile.TILE_H) * cdiv(columns, tile.TILE_W)


def box_programs(problem: ConvProblem, operation: Operation, tile: BoxTile) -> int:
    """Programs of a launch."""
    g = problem
    tiles_k, tiles_c = cdiv(g.K, tile.TILE_K), cdiv(g.C, tile.TILE_C)
    match operation:
        case "fprop":
            return box_count(g, operation, tile) * tiles_k
        case "dgrad":
            return box_count(g, operation, tile) * g.parities * tiles_c
        case "wgrad":
            return g.R * g.S * tiles_k * tiles_c * tile.SPLIT_K


def box_phases(problem: ConvProblem, operation: Operation, tile: BoxTile) -> tuple[int, int] | None:
    """Phases of rows and of columns (boxes.py) in which the tile's boxes see x, or in dgrad dx.

    None where they cannot step with the stride: where the image is no whole number of phases, or a block of channels
    would reach into the next pixel's. Only wgrad may read the next pixel's channels, since it stores nothing that comes
    of them.
    """
    g = problem
    phase_h = g.stride_h if tile.TILE_H > 1 else 1
    phase_w = g.stride_w if tile.TILE_W > 1 else 1
    whole = g.H % phase_h == 0 and g.W % phase_w == 0
    return (phase_h, phase_w) if whole and (phase_w == 1 or operation == "wgrad" or g.C % tile.TILE_C == 0) else None


def form_of(problem: ConvProblem, operation: Operation, tile: BoxTile) -> str:
    """The form that a kernel's loads have, as far as its instructions follow from it: "1x1"; "taps"; "phases" where the
    image is seen in phases (boxes.py).
    """
    if box_phases(problem, operation, tile) != (1, 1):
        return "phases"
    return "1x1" if problem.R * problem.S == 1 else "taps"


def candidate_boxes(
    problem: ConvProblem, operation: Operation, activation: str | None = None, arch: int = 90, finished: bool = False
) -> Iterator[BoxTile]:
    """The tiles that a convolution may get, each of which compiles without spills and without a wait after every wgmma:
    each size with every shape of box that can step with the stride.

    arch: 90 for sm_90. finished: whether dgrad has an epilogue.
    """
    g = problem
    short_of_registers = activation == "gelu" or (arch >= 100 and (operation == "wgrad" or finished))
    for pixels, filters, channels, num_warps, num_stages in SIZES[operation]:
        if operation == "fprop" and g.C <= 32:
            channels = 32
        if operation == "dgrad" and g.K <= 32:
            filters = 32
        for rows, columns in (*SHAPES, (1, pixels)):
            if rows * columns > pixels:
                continue
            tile = BoxTile(pixels // (rows * columns), rows, columns, filters, channels, num_warps, num_stages)
            sums = prod(tile.gemm(operation)[:2])
            several_axes = pixels not in (tile.TILE_N, tile.TILE_W)
            serialised = operation == "wgrad" and several_axes and channels > MOST_CHANNELS_OF_BOXES
            spills = short_of_registers and sums > MOST_SUMS
            if operation == "fprop" and num_warps == 8:
                serialised = skips_taps(g, tile)
                spills |= arch >= 100 and tile.TILE_W > 128  # with statistics, by triton 3.7.1
            if box_phases(g, operation, tile) is not None and not serialised and not spills:
                yield tile


def skips_taps(problem: ConvProblem, tile: BoxTile) -> bool:
    """Whether fprop's boxes skip taps that see only padding. How many steps a loop has is then known at run time only,
    and at 8 warps ptxas of triton 3.6.0 waits after every wgmma of it.
    """
    g = problem
    rows = tile.TILE_H == 1 and (g.R > 1 or g.pad_h > 0)
    return rows or (tile.TILE_W == 1 and (g.S > 1 or g.pad_w > 0))


def box_steps(problem: ConvProblem, operation: Operation, tile: BoxTile) -> int:
    """Steps of all programs together. Boxes of one row skip taps that see only padding along H, those of one column
    along W.
    """
    g = problem
    rows, columns = box_grid(g, operation)
    steps_h, steps_w = cdiv(rows, tile.TILE_H) * g.R, cdiv(columns, tile.TILE_W) * g.S
    if tile.TILE_H == 1:
        steps_h = tap_pairs(g.P, g.H, g.R, g.stride_h, g.pad_h, g.dil_h)
    if tile.TILE_W == 1:
        steps_w = tap_pairs(g.Q, g.W, g.S, g.stride_w, g.pad_w, g.dil_w)
    return cdiv(g.N, tile.TILE_N) * steps_h * steps_w * cdiv(g.K, tile.TILE_K) * cdiv(g.C, tile.TILE_C)


def possible_boxes(
    problem: ConvProblem, operation: Operation, activation: str | None = None, arch: int = 90, finished: bool = False
) -> list[BoxTile]:
    """The tiles that may run where nothing was measured: of each size the shapes of box with the fewest steps, at most
    SHAPES_OF_SIZE, and each of them with fewer stages as well, which take less shared memory.

    It leaves out boxes that would be mostly empty, as `is_half_empty` says too.
    """
    rows, columns = box_grid(problem, operation)
    pixels = problem.N * rows * columns
    sizes: dict[object, list[BoxTile]] = {}
    for tile in candidate_boxes(problem, operation, activation, arch, finished):
        useful = pixels >= MIN_USEFUL * tile.pixels * box_count(problem, operation, tile)
        if useful and not is_half_empty(problem, operation, tile):
            sizes.setdefault((tile.pixels, tile.TILE_K, tile.TILE_C), []).append(tile)
    found: dict[BoxTile, None] = {}
    for tiles in sizes.values():
        fewest = sorted(tiles, key=lambda tile: box_steps(problem, operation, tile))[:SHAPES_OF_SIZE]
        for tile in fewest:
            found |= dict.fromkeys(replace(tile, num_stages=stages) for stages in range(1, tile.num_stages + 1))
    return list(found)


def is_half_empty(problem: ConvProblem, operation: Operation, tile: BoxTile) -> bool:
    """Whether half or more of the tile's filters, or of its channels, do not exist, though there are smaller tiles."""
    least_filters, least_channels = (min(size[i] for size in SIZES[operation]) for i in (1, 2))
    return tile.TILE_K >= max(2 * problem.K, least_filters + 1) or tile.TILE_C >= max(2 * problem.C, least_channels + 1)
