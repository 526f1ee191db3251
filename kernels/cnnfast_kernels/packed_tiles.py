"""Which tile a convolution on a packed image runs with (gather/stem.py). Pure Python: imports neither torch nor triton.

A problem is here as the kernels see it, with few taps of whole vectors. Nothing has been measured on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import astuple, replace

from .problem import ConvProblem
from .tiling import (
    DEFAULT_TILES,
    MAX_SPLIT,
    Operation,
    PackedTile,
    Precision,
    TileConfig,
    cdiv,
    choose_tile,
    default_split,
    gemm_extents,
    search_tiles,
)


def choose_packed_tile(
    problem: ConvProblem, operation: Operation, precision: Precision, adjacent: bool = True, arch: int = 90
) -> PackedTile:
    """As choose_tile, for what is packed: `problem` is as the kernels see it (gather/stem.py), with few taps of whole
    vectors. In wgrad it is the tile that reads dy least often: of one width, the narrowest.
    """
    if operation != "wgrad" or not adjacent:
        return packed(choose_tile(problem, operation, precision, adjacent, arch))
    columns = gemm_extents(problem, operation)[1]
    tiles = packed_wgrad_tiles(precision, arch)
    tile = min(tiles, key=lambda tile: (cdiv(columns, tile.BLOCK_N), tile.BLOCK_N))
    return packed(replace(tile, SPLIT_K=default_split(problem, tile)))


def packed_wgrad_tiles(precision: Precision, arch: int) -> list[TileConfig]:
    """What the gradient of packed filters may get. Wider columns have dy read less often, but spill on sm_100; of 128
    filters, which a first convolution seldom has, they spill on sm_80.
    """
    wide = [TileConfig(64, 128, 32, 4, 4)] if precision == "half" and arch < 100 else []
    return [*wide, *(tile for tile in DEFAULT_TILES[precision] if tile.BLOCK_M <= 64)]


def packed(tile: TileConfig) -> PackedTile:
    return PackedTile(*astuple(tile))


def search_packed_tiles(
    problem: ConvProblem, operation: Operation, precision: Precision, adjacent: bool = True, arch: int = 90
) -> Iterator[PackedTile]:
    """What measuring tries: in wgrad each of its tiles, the default first, with half and twice the default split."""
    if operation != "wgrad" or not adjacent:
        yield from map(packed, search_tiles(problem, operation, precision, adjacent, arch))
        return
    tiles = packed_wgrad_tiles(precision, arch)
    chosen = choose_packed_tile(problem, operation, precision, adjacent, arch)
    for tile in dict.fromkeys([chosen, *(packed(replace(t, SPLIT_K=default_split(problem, t))) for t in tiles)]):
        for split in dict.fromkeys((tile.SPLIT_K, cdiv(tile.SPLIT_K, 2), min(2 * tile.SPLIT_K, MAX_SPLIT))):
            yield replace(tile, SPLIT_K=split)
