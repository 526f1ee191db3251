"""Which family of kernels, and which tile, serves a convolution: by a measured row (tables.py), or else by default.

The choice follows from layouts alone: nothing here touches a tensor. `candidates` lists what measuring tries.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import islice, zip_longest

from . import tables
from .choosing_costs import cost_of
from .gather.depthwise.filters import vector_length
from .gather.depthwise.tiles import StripTile, choose_strip_tile, search_strip_tiles
from .gather.stem import packing_pays
from .gpus import KnownGpu, stand_in
from .packed_tiles import choose_packed_tile, search_packed_tiles
from .questions import Question, Tile
from .resource_keys import resource_key
from .resources import resources_of
from .tiling import (
    MAX_SPLIT,
    MIN_STEPS_PER_SPLIT,
    PackedTile,
    TileConfig,
    default_split,
    possible_tiles,
    programs,
    search_tiles,
    steps_of_loop,
)
from .tma.tiles import BoxTile, box_count, box_programs, possible_boxes

MOST_CANDIDATES = 12  # that measuring tries
# What a model compares of the ways to cut a weight gradient's sum: parts, powers of two, and waves of programs.
PARTS = tuple(2**i for i in range(MAX_SPLIT.bit_length()))
WAVES = (1, 2, 3)


def default_tile(q: Question) -> Tile:
    """What runs where nothing was measured: of all that may (`possible`), the tile with the least modelled time on the
    GPU, or on one like it. No GPU has told yet whether the model is right.
    """
    if q.problem.is_depthwise:
        return choose_strip_tile(q.problem, q.operation, q.precision, vector_length(q.x, q.y))
    gpu = stand_in(*q.gpu)
    return min(possible(q, gpu), key=lambda tile: cost_of(q, tile, gpu).seconds)


def possible(q: Question, gpu: KnownGpu) -> list[Tile]:
    """The tiles that a dense convolution may run with where nothing was measured, all of which compile without spills.

    An image of few channels is packed where that pays, but not for tensor maps, whose rows would overlap: no GPU has
    shown yet that it takes them.
    """
    found: list[Tile] = []
    if not q.why_no_boxes and not q.packed:
        found += possible_boxes(q.boxed, q.operation, q.activation, q.gpu.arch, q.finished)
    if not q.why_no_packing and packing_pays(q.problem, q.x, q.w):
        return [choose_packed_tile(*q.packed_how)]
    heavy = q.activation not in (None, "relu") or (q.statistics == "norm" and q.residual is not None) or q.finished
    found += possible_tiles(q.problem, q.operation, q.precision, q.adjacent, q.gpu.arch, heavy)
    found = [tile for tile in found if not _spills(q, tile)] or found[-1:]
    return [cut for tile in found for cut in _cuts(q, tile, gpu)] if q.operation == "wgrad" else found


def _spills(q: Question, tile: Tile) -> bool:
    """Whether machine code of this very kernel has spilled registers."""
    row = resources_of(resource_key(q, tile))
    return row.exact and row.spill_bytes > 0


def _cuts(q: Question, tile: Tile, gpu: KnownGpu) -> list[Tile]:
    """A weight gradient's tile with the sum cut into 1, 2, 4, ... parts, and so that programs fill the GPU some times
    over, as many as live on a multiprocessor at once.
    """
    if isinstance(tile, BoxTile):
        one, most = box_programs(q.boxed, q.operation, tile), box_count(q.boxed, q.operation, tile)
        usual = 1
    elif isinstance(tile, PackedTile):
        return [tile]
    else:
        assert isinstance(tile, TileConfig)
        one, usual = programs(q.problem, q.operation, tile), default_split(q.problem, tile)
        most = max(usual, steps_of_loop(q.problem, q.operation, tile) // MIN_STEPS_PER_SPLIT)
    places = gpu.multiprocessors * cost_of(q, tile, gpu).residents
    filling = [waves * places // max(one, 1) for waves in WAVES]
    splits = {min(split, most, MAX_SPLIT) for split in (*PARTS, usual, *filling) if split >= 1}
    return [replace(tile, SPLIT_K=split) for split in sorted(splits)]


def candidates(q: Question) -> list[Tile]:
    """The tiles that measuring tries, at most MOST_CANDIDATES: the default, then one of each family that can serve in
    turn.

    Within a family they come by the time that they are modelled to take, but every tile comes once before any comes in
    a second variant, with another split or number of stages, say. No GPU has told which tiles win, and the best may be
    among those left out.
    """
    if q.problem.is_depthwise:
        families: list[list[Tile]] = [
            [*search_strip_tiles(q.problem, q.operation, q.precision, vector_length(q.x, q.y))]
        ]
    else:
        gpu = stand_in(*q.gpu)
        families = [[*search_tiles(q.problem, q.operation, q.precision, q.adjacent, q.gpu.arch)]]
        if not q.why_no_packing:
            families.insert(0, [*search_packed_tiles(*q.packed_how)])
        if not q.why_no_boxes:
            boxes: list[Tile] = [*possible_boxes(q.boxed, q.operation, q.activation, q.gpu.arch, q.finished)]
            if q.operation == "wgrad":
                boxes = [cut for box in boxes for cut in _cuts(q, box, gpu)]
            families.insert(0, boxes)
        for family in families:
            family.sort(key=lambda tile: cost_of(q, tile, gpu).seconds)
    found: dict[Tile, None] = {default_tile(q): None}
    for turn in zip_longest(*map(_spread, families)):
        found |= dict.fromkeys(tile for tile in turn if tile is not None)
    return list(islice(found, MOST_CANDIDATES))


def _spread(tiles: Iterable[Tile]) -> list[Tile]:
    """The same tiles, one of each shape in turn; those of one shape stay in the order given."""
    shapes: dict[object, list[Tile]] = {}
    for tile in tiles:
        shapes.setdefault(_shape(tile), []).append(tile)
    return [tile for turn in zip_longest(*shapes.values()) for tile in turn if tile is not None]


def _shape(tile: Tile) -> object:
    match tile:
        case TileConfig():
            return tile.BLOCK_M, tile.BLOCK_N
        case BoxTile():
            return tile.pixels, tile.TILE_K, tile.TILE_C
        case StripTile():
            return tile.ROWS


def measured(q: Question) -> tables.TableRow | None:
    """The row that serves these tensors; None where there is none, or its winner is a tile that they cannot take, for
    they are not aligned, say.
    """
    row = tables.find(q.key)
    return row if row is not None and (row.winner == "library" or _can_run(row.tile, q)) else None


def choose(q: Question, row: tables.TableRow | None) -> Tile:
    """The tile to run: that of the measured row, if there is one and it can run, or else the default."""
    return row.tile if row is not None and _can_run(row.tile, q) else default_tile(q)


def _can_run(tile: Tile, q: Question) -> bool:
    if isinstance(tile, PackedTile):
        return not q.why_no_packing
    family = StripTile if q.problem.is_depthwise else TileConfig if q.why_no_boxes else (TileConfig, BoxTile)
    return isinstance(tile, family)
