"""What compiling.py compiles: the launchers themselves, on tensors without data.

Nothing here repeats a kernel's signature. A case runs the launcher that production runs, on meta tensors of a real
layer's shape, so what is compiled is what production would compile. Every tile that can be chosen appears with its
heaviest epilogue; what changes the code of all tiles alike (layouts, activations, other dtypes) appears on one tile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from ..activations import ACTIVATIONS
from ..choosing import Tile
from ..gather.depthwise.tiles import strip_tiles
from ..tiling import DEFAULT_TILES, ELEMENT_BYTES, VECTOR_BYTES, Operation, Precision, candidate_tiles, choose_tile
from ..tma.stem import packed_problem
from ..tma.tiles import candidate_boxes
from ..tma.views import why_not_on
from .layers import (
    BODY,
    DEPTHWISE_CHANNELS,
    DEPTHWISE_WINDOWS,
    FLOAT32,
    FORMS,
    LAST,
    MANY,
    NARROW,
    POINTWISE,
    SHORTCUT,
    STEM,
    STRIDED,
    CaseLayer,
)
from .passes import passes

# The dtype in which each precision's tiles are compiled. float16 differs from bfloat16 in one instruction.
DTYPES: dict[Precision, torch.dtype] = {"half": torch.bfloat16, "tf32": FLOAT32, "ieee": FLOAT32, "fp64": torch.float64}


@dataclass(frozen=True, slots=True)
class Case:
    """`run()` launches one or more kernels; `name` tells what is special."""

    name: str
    run: Callable[[], object]


def case(
    operation: str,
    layer: CaseLayer,
    tile: Tile | None,
    precision: Precision,
    dtype: torch.dtype | None = None,
    note: str = "",
    **options,
) -> Case:
    """Where no tile is named it is the one that is chosen."""
    dtype = dtype or DTYPES[precision]
    kind = str(dtype).removeprefix("torch.") + (" tf32" if precision == "tf32" else "")
    return Case(
        f"{operation} {kind} {layer.name}{note}", partial(getattr(layer, operation), tile, precision, dtype, **options)
    )


def depthwise_convolutions() -> Iterator[Case]:
    three, *_, seven, _ = DEPTHWISE_WINDOWS
    windows: dict[Precision, tuple[CaseLayer, ...]] = {
        "half": DEPTHWISE_WINDOWS,
        "ieee": (three, seven),
        "fp64": (three,),
    }
    operations: dict[str, Operation] = {"infer": "fprop", "dgrad": "dgrad", "wgrad": "wgrad"}
    for precision in windows:
        vector = VECTOR_BYTES // ELEMENT_BYTES[precision]
        for layer in windows[precision]:
            for name, operation in operations.items():
                for tile in strip_tiles(layer.problem, operation, precision, vector):
                    yield case(name, layer, tile, precision)
        for layer in (three, seven):
            yield case("train", layer, None, precision)
    for layer in DEPTHWISE_CHANNELS:
        for name in operations:
            yield case(name, layer, None, "half")
    yield case("transposed", three, None, "half")
    # no norm, which leaves registers free; and one slope for all channels, which is not loaded as a vector
    yield case("act", three, None, "half", note=" no norm")
    yield case("act", three, None, "half", note=" no norm prelu", activation="prelu")


def convolutions(arch: int) -> Iterator[Case]:
    # No tile is named for the stem and groups of few filters, which never meet the larger ones.
    for precision in DEFAULT_TILES:
        tiles = candidate_tiles(BODY.problem, "fprop", precision, arch=arch)
        for tile in tiles:
            yield case("infer", BODY, tile, precision)
            yield case("dgrad", BODY, tile, precision)
            yield case("wgrad", BODY, tile, precision)
        yield case("train", BODY, tiles[0], precision)
        yield case("infer", STEM, None, precision)
        yield case("dgrad", STRIDED, tiles[0], precision)
        yield case("wgrad", STRIDED, tiles[0], precision)
        yield case("wgrad", BODY, tiles[0], precision, note=" of slices", packed=False)
        yield case("wgrad", STEM, None, precision)

    largest, *_, smallest = candidate_tiles(BODY.problem, "fprop", "half", arch=arch)
    for layer in FORMS:
        yield case("infer", layer, choose_tile(layer.problem, "fprop", "half", layer.fmt == LAST, arch), "half")
    for layer in (POINTWISE, SHORTCUT):
        yield case("dgrad", layer, choose_tile(layer.problem, "dgrad", "half", arch=arch), "half")
    yield case("transposed", STRIDED, largest, "half")
    yield case("wgrad", POINTWISE, largest, "half", split=1)
    yield case("infer", BODY, largest, "half", torch.float16)
    for activation in ACTIVATIONS:
        if activation not in (None, "relu"):
            yield case("infer", POINTWISE, smallest, "half", note=f" {activation}", activation=activation)
    # VGG's convolutions, and those of a re-parametrised block with an addition
    yield case("act", BODY, largest, "half", note=" no norm, no residual", residual=False)
    yield case("act", BODY, largest, "half", note=" no norm")
    yield case("act", POINTWISE, smallest, "half", note=" no norm prelu", activation="prelu")
    yield Case("im2col bfloat16", partial(BODY.im2col, torch.bfloat16))


OPERATIONS: dict[str, Operation] = {"infer": "fprop", "train": "fprop", "dgrad": "dgrad", "wgrad": "wgrad"}


def box_convolutions(arch: int) -> Iterator[Case]:
    """By tensor maps: every size with every shape of box; for statistics, and where the image is seen in phases, with
    one or two shapes.
    """
    some = ((8, 8), (1, 1))
    for name, operation in OPERATIONS.items():
        for tile in candidate_boxes(BODY.problem, operation, arch=arch):
            if name != "train" or (tile.TILE_H, tile.TILE_W) in some:
                yield case(name, BODY, tile, "half", note=" in boxes")
        for tile in candidate_boxes(STRIDED.problem, operation, arch=arch):
            if (tile.TILE_H, tile.TILE_W) == some[0]:
                yield case(name, STRIDED, tile, "half", note=" in boxes")
        for tile in candidate_boxes(POINTWISE.problem, operation, arch=arch):
            if tile.TILE_W == tile.pixels:
                yield case(name, POINTWISE, tile, "half", note=" in boxes")
    for name in ("infer", "train", "wgrad"):
        for tile in candidate_boxes(packed_problem(STEM.problem), OPERATIONS[name], arch=arch):
            if (tile.TILE_H, tile.TILE_W) == (8, 8):
                yield case(name, STEM, tile, "half", note=" in boxes")
    for layer in (SHORTCUT, NARROW, MANY):
        for name in ("infer", "dgrad", "wgrad"):
            yield case(
                name, layer, next(candidate_boxes(layer.problem, OPERATIONS[name], arch=arch)), "half", note=" in boxes"
            )
    yield case("transposed", STRIDED, next(candidate_boxes(STRIDED.problem, "dgrad")), "half", note=" in boxes")
    yield case(
        "wgrad",
        BODY,
        next(candidate_boxes(BODY.problem, "wgrad", arch=arch)),
        "half",
        note=" in boxes, one slot",
        split=1,
    )
    tile = next(candidate_boxes(BODY.problem, "fprop", arch=arch))
    yield case("act", BODY, tile, "half", note=" in boxes, no norm")
    yield case("act", BODY, tile, "half", note=" in boxes, no norm prelu", activation="prelu")
    for activation in ACTIVATIONS:
        tile = next(candidate_boxes(BODY.problem, "fprop", activation))
        if activation in (None, "relu"):
            yield case(
                "infer", BODY, tile, "half", torch.float16, note=f" in boxes {activation}", activation=activation
            )
        else:
            yield case("infer", BODY, tile, "half", note=f" in boxes {activation}", activation=activation)


def cases(arch: int = 90) -> list[Case]:
    """All of them for sm_90 or another, in an order that every process of one version agrees on."""
    boxes = () if why_not_on(arch) else box_convolutions(arch)
    return [*convolutions(arch), *depthwise_convolutions(), *[Case(*case) for case in passes()], *boxes]
