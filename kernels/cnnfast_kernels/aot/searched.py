"""The cases of which resources.py has rows: each form of each kernel's main loop with the tiles that search may try.

What a network's layers need is estimated from these, so they need not be all that can be compiled: epilogues are
compiled with the tiles that search begins with, and on boxes of each kind; k-steps of another length, fewer stages and
boxes of other extents without an epilogue, for they change the loop alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import NamedTuple, TypeVar

from ..devices import Gpu
from ..gather.depthwise.tiles import strip_tiles
from ..questions import Tile
from ..resource_keys import resource_key
from ..resources import ResourceKey
from ..tiling import (
    DEFAULT_TILES,
    ELEMENT_BYTES,
    SQUARE_TILE,
    VECTOR_BYTES,
    WIDE_TILES,
    Operation,
    Precision,
    TileConfig,
    candidate_tiles,
    choose_tile,
    search_tiles,
)
from ..tma.stem import boxed_problem
from ..tma.tiles import BoxTile, candidate_boxes
from ..tma.views import why_not_on
from .cases import DTYPES, Case, case
from .layers import (
    APART,
    BODY,
    DEEP,
    DEPTHWISE_WINDOWS,
    FLAT,
    MANY,
    STEM,
    STRIDED,
    UNEVEN,
    CaseLayer,
)

OPERATIONS: dict[str, Operation] = {
    "plain": "fprop",
    "train": "fprop",
    "infer": "fprop",
    "dgrad": "dgrad",
    "wgrad": "wgrad",
}
# With the lightest epilogue, or with the only one that there is.
LIGHT = ("plain", "dgrad", "wgrad")


Staged = TypeVar("Staged", TileConfig, BoxTile)


class SearchedCase(NamedTuple):
    """name: of a method of the layer. note: behind the case's name."""

    name: str
    layer: CaseLayer
    tile: Tile
    precision: Precision
    note: str = ""


def fewer_stages(tiles: Iterable[Staged]) -> Iterator[Staged]:
    """The tiles, and each with every smaller number of stages."""
    for tile in tiles:
        yield from (replace(tile, num_stages=stages) for stages in range(tile.num_stages, 0, -1))


def gather_tiles(layer: CaseLayer, name: str, precision: Precision, arch: int) -> list[TileConfig]:
    """The tiles that a search begins with. Of a light kernel for 3x3 filters also all others that it tries; of one for
    1x1, which may have few k-steps, each with fewer stages, where half precision loads by pointers.
    """
    operation = OPERATIONS[name]
    first = [*candidate_tiles(layer.problem, operation, precision, arch=arch)]
    if precision == "half" and arch < 100:
        first += [*WIDE_TILES, *([SQUARE_TILE] if arch < 90 else ())]
    if name not in LIGHT:
        return first
    if layer is BODY:
        others = search_tiles(layer.problem, operation, precision, arch=arch)
        return first + [replace(tile, SPLIT_K=1) for tile in others]
    return [*fewer_stages(first)] if precision == "half" and arch < 90 else first


def gathered(arch: int) -> Iterator[SearchedCase]:
    for precision in DEFAULT_TILES:
        for layer in (BODY, DEEP):
            for name in OPERATIONS if layer is BODY or precision == "half" else LIGHT:
                for tile in gather_tiles(layer, name, precision, arch):
                    yield SearchedCase(name, layer, tile, precision)
        for layer in (STEM, FLAT, MANY, UNEVEN, APART):
            for name in OPERATIONS if precision == "half" else LIGHT:
                operation = OPERATIONS[name]
                tiles = [choose_tile(layer.problem, operation, precision, layer is not APART, arch)]
                if layer is MANY and precision == "half":  # the largest spills, and then the next ones are chosen
                    tiles = [*candidate_tiles(layer.problem, operation, precision, arch=arch)]
                for tile in tiles:
                    yield SearchedCase(name, layer, replace(tile, SPLIT_K=1), precision)


def axes(tile: BoxTile) -> tuple[bool, bool, bool]:
    """Along which of the pixels' axes a box has several."""
    return tile.TILE_N > 1, tile.TILE_H > 1, tile.TILE_W > 1


def size(tile: BoxTile) -> tuple[int, ...]:
    return tile.pixels, tile.TILE_K, tile.TILE_C, tile.num_warps, tile.num_stages


def box_tiles(layer: CaseLayer, name: str, arch: int) -> list[BoxTile]:
    """Of each size one box of each kind, which has several pixels along the same axes; of a 1x1 convolution, whose
    image is one row, one row. Of a light kernel one of each size with fewer stages too.
    """
    problem = boxed_problem(layer.problem) if layer is STEM else layer.problem
    tiles = [*candidate_boxes(problem, OPERATIONS[name], arch=arch)]
    if layer is DEEP:
        tiles = [tile for tile in tiles if tile.TILE_W == tile.pixels]
    if layer is STEM:
        tiles = [tile for tile in tiles if (tile.TILE_H, tile.TILE_W) == (8, 8)]
    kinds: dict[object, BoxTile] = {}
    sizes: dict[object, BoxTile] = {}
    for tile in tiles:
        kinds.setdefault((axes(tile), size(tile)), tile)
        sizes.setdefault(size(tile), tile)
    staged = fewer_stages(sizes.values()) if name in LIGHT and layer in (BODY, DEEP) else ()
    return [*kinds.values(), *staged]


def boxed(arch: int) -> Iterator[SearchedCase]:
    for layer in (BODY, DEEP, STRIDED, STEM):
        for name in OPERATIONS if layer in (BODY, DEEP) else LIGHT:
            if layer is not STEM or name != "dgrad":
                for tile in box_tiles(layer, name, arch):
                    yield SearchedCase(name, layer, tile, "half", " in boxes")


def stripped(arch: int) -> Iterator[SearchedCase]:
    precisions: tuple[Precision, ...] = ("half", "ieee")
    for precision in precisions:
        vector = VECTOR_BYTES // ELEMENT_BYTES[precision]
        for layer in DEPTHWISE_WINDOWS:
            for name in OPERATIONS if precision == "half" else LIGHT:
                tiles = strip_tiles(layer.problem, OPERATIONS[name], precision, vector)
                for tile in tiles if precision == "half" and name in LIGHT else tiles[:1]:
                    yield SearchedCase(name, layer, tile, precision)


def searched(arch: int) -> dict[ResourceKey, Case]:
    """All of them for sm_90 or another, in an order that every process of one version agrees on, by their keys."""
    boxes = () if why_not_on(arch) else boxed(arch)
    found: dict[ResourceKey, Case] = {}
    for one in (*gathered(arch), *stripped(arch), *boxes):
        question = one.layer.question(one.name, one.precision, DTYPES[one.precision], Gpu("", arch))
        made = case(one.name, one.layer, one.tile, one.precision, note=one.note)
        found.setdefault(resource_key(question, one.tile), made)
    return found
