"""What compiling.py compiles: the launchers themselves, on tensors without data.

Nothing here repeats a kernel's signature. A case runs the launcher that production runs, on meta tensors of a real
layer's shape, so what is compiled is what production would compile. Every tile that can be chosen appears with its
heaviest epilogue; what changes the code of all tiles alike (layouts, activations, other dtypes) appears on one tile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch

from ..activations import ACTIVATIONS
from ..gather.depthwise.tiles import strip_tiles
from ..gather.stem import run_problem
from ..packed_tiles import packed, packed_wgrad_tiles
from ..questions import Tile
from ..tiling import (
    DEFAULT_TILES,
    ELEMENT_BYTES,
    SQUARE_TILE,
    VECTOR_BYTES,
    Operation,
    Precision,
    candidate_tiles,
    choose_tile,
    possible_tiles,
)
from ..tma.stem import boxed_problem
from ..tma.tiles import candidate_boxes
from ..tma.views import why_not_on
from .layers import (
    BODY,
    DEEP,
    DEPTHWISE_CHANNELS,
    DEPTHWISE_WINDOWS,
    FLOAT32,
    FORMS,
    LAST,
    MANY,
    NARROW,
    POINTWISE,
    SHALLOW,
    SHORTCUT,
    STEM,
    STEMS,
    STRIDED,
    CaseLayer,
)
from .passes import passes

# The dtype in which each precision's tiles are compiled. float16 differs from bfloat16 in one instruction.
DTYPES: dict[Precision, torch.dtype] = {"half": torch.bfloat16, "tf32": FLOAT32, "ieee": FLOAT32, "fp64": torch.float64}


def square_convolutions() -> Iterator[Case]:
    """The square tile, which only runs before sm_90, with every epilogue that it may have; of loops that the compiler
    would unroll too, for then it would spill.
    """
    for layer in (BODY, DEEP, SHORTCUT):
        for name in ("plain", "train", "dgrad", "wgrad"):
            yield case(name, layer, SQUARE_TILE, "half")
        yield case("infer", layer, SQUARE_TILE, "half", note=" no residual", residual=False)
        yield case("act", layer, SQUARE_TILE, "half", note=" no norm")
    yield case("dgrad", STRIDED, SQUARE_TILE, "half")
    yield case("transposed", STRIDED, SQUARE_TILE, "half")
    yield case("train", BODY, SQUARE_TILE, "half", torch.float16)


def shallow_convolutions(arch: int) -> Iterator[Case]:
    """Loops of fewer steps than their tile has stages."""
    for name in ("infer", "dgrad", "wgrad"):
        for tile in possible_tiles(SHALLOW.problem, OPERATIONS[name], "half", arch=arch, heavy=name == "infer"):
            yield case(name, SHALLOW, tile, "half")


OPERATIONS: dict[str, Operation] = {"infer": "fprop", "train": "fprop", "dgrad": "dgrad", "wgrad": "wgrad"}


@dataclass(frozen=True, slots=True)
class Case:
    """`run()` launches one or more kernels; `name` tells what is special. tile: the one that is named."""

    name: str
    run: Callable[[], object]
    tile: Tile | None = None


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
    run = partial(getattr(layer, operation), tile, precision, dtype, **options)
    return Case(f"{operation} {kind} {layer.name}{note}", run, tile)


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


def stems(arch: int) -> Iterator[Case]:
    """Images of few channels, as they lie and packed."""
    for precision in DEFAULT_TILES:
        for name in ("infer", "wgrad"):
            tile = choose_tile(STEM.problem, OPERATIONS[name], precision, arch=arch)
            yield case(name, STEM, tile, precision, note=" as it lies")
    seen = run_problem(STEM.problem, torch.bfloat16)
    tiles = candidate_tiles(seen, "fprop", "half", arch=arch)
    for name in ("infer", "train", "wgrad"):
        for tile in packed_wgrad_tiles("half", arch) if name == "wgrad" else tiles:
            yield case(name, STEM, packed(tile), "half", note=" packed")
        for layer in STEMS:
            yield case(name, layer, None, "half", note=" packed")
        yield case(name, STEM, None, "tf32", note=" packed")


def convolutions(arch: int) -> Iterator[Case]:
    # No tile is named for groups of few filters, which never meet the larger ones.
    for precision in DEFAULT_TILES:
        tiles = candidate_tiles(BODY.problem, "fprop", precision, arch=arch)
        for tile in tiles:
            yield case("infer", BODY, tile, precision)
            yield case("dgrad", BODY, tile, precision)
            yield case("wgrad", BODY, tile, precision)
        yield case("train", BODY, tiles[0], precision)
        yield case("dgrad", STRIDED, tiles[0], precision)
        yield case("wgrad", STRIDED, tiles[0], precision)
        yield case("wgrad", BODY, tiles[0], precision, note=" of slices", packed=False)

    largest, *_, smallest = candidate_tiles(BODY.problem, "fprop", "half", arch=arch)
    for layer in FORMS:
        yield case("infer", layer, choose_tile(layer.problem, "fprop", "half", layer.fmt == LAST, arch), "half")
    for layer in (DEEP, SHORTCUT):
        yield case("dgrad", layer, choose_tile(layer.problem, "dgrad", "half", arch=arch), "half")
    yield case("transposed", STRIDED, largest, "half")
    yield case("wgrad", DEEP, largest, "half", note=", one slot", split=1)
    yield case("infer", BODY, largest, "half", torch.float16)
    for activation in ACTIVATIONS:
        if activation not in (None, "relu"):
            yield case("infer", POINTWISE, smallest, "half", note=f" {activation}", activation=activation)
    # VGG's convolutions, and those of a re-parametrised block with an addition
    yield case("act", BODY, largest, "half", note=" no norm, no residual", residual=False)
    yield case("act", BODY, largest, "half", note=" no norm")
    yield case("act", POINTWISE, smallest, "half", note=" no norm prelu", activation="prelu")
    yield Case("im2col bfloat16", partial(BODY.im2col, torch.bfloat16))


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
        for tile in candidate_boxes(DEEP.problem, operation, arch=arch):
            if tile.TILE_W == tile.pixels:
                yield case(name, DEEP, tile, "half", note=" in boxes")
    for name in ("infer", "train", "wgrad"):
        for tile in candidate_boxes(boxed_problem(STEM.problem), OPERATIONS[name], arch=arch):
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
    for name in ("plain", "dgrad", "wgrad"):  # fewer stages, of one shape of box
        operation: Operation = "fprop" if name == "plain" else OPERATIONS[name]
        for layer in (BODY, DEEP):
            for tile in candidate_boxes(layer.problem, operation, arch=arch):
                if (tile.TILE_H, tile.TILE_W) == ((1, tile.pixels) if layer is DEEP else some[0]):
                    for stages in range(1, tile.num_stages):
                        yield case(name, layer, replace(tile, num_stages=stages), "half", note=" in boxes")
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


def masked_gradients(arch: int) -> Iterator[Case]:
    """dgrad with an epilogue: the heaviest, which reads three images, of the tiles that have the fewest registers left
    for it, and each other tensor that may tell the mask on one tile.
    """
    largest, *_ = candidate_tiles(BODY.problem, "dgrad", "half", arch=arch)
    yield case("masked", BODY, largest, "half")
    yield case("masked", STRIDED, largest, "half", note=" words", mask="words")
    yield case("masked", DEEP, largest, "half", note=" silu", mask="y", activation="silu")
    yield case("masked", BODY, candidate_tiles(BODY.problem, "dgrad", "fp64", arch=arch)[0], "fp64")
    if why_not_on(arch):
        return
    for tile in candidate_boxes(BODY.problem, "dgrad", arch=arch, finished=True):
        if (tile.TILE_H, tile.TILE_W) == (8, 8) and (tile.pixels, tile.TILE_C) != (64, 64):
            yield case("masked", BODY, tile, "half", note=" in boxes")
    tile = next(candidate_boxes(STRIDED.problem, "dgrad", arch=arch, finished=True))
    yield case("masked", STRIDED, tile, "half", note=" in boxes", mask="y")
    boxes = candidate_boxes(DEEP.problem, "dgrad", arch=arch, finished=True)
    row = next(tile for tile in boxes if tile.TILE_W == tile.pixels)
    yield case("masked", DEEP, row, "half", note=" in boxes, words", mask="words", sums=False)


def second_products(arch: int) -> Iterator[Case]:
    """dgrad that begins with a second product: every tile that may serve, with an epilogue and without."""
    if why_not_on(arch):
        return
    for layer in (SHALLOW, DEEP):
        for below in (True, False):
            for tile in candidate_boxes(layer.problem, "dgrad", arch=arch, finished=below):
                if tile.TILE_W == tile.pixels:
                    note = " in boxes" if below else " in boxes, nothing below"
                    yield case("begun", layer, tile, "half", note=note, below=below)
    tile = next(candidate_boxes(SHALLOW.problem, "dgrad", arch=arch, finished=True))
    yield case("begun", SHALLOW, tile, "half", torch.float16, note=" in boxes")


def joins(arch: int) -> Iterator[Case]:
    """1x1 convolutions that leave words of bits: every tile that may serve."""
    for layer in (SHALLOW, DEEP):
        for tile in candidate_tiles(layer.problem, "fprop", "half", arch=arch):
            yield case("joined", layer, tile, "half")
    yield case("joined", SHALLOW, None, "half", torch.float16)
    if arch < 90:
        for layer in (SHALLOW, DEEP):
            yield case("joined", layer, SQUARE_TILE, "half", note=" no residual", residual=False)
    if why_not_on(arch):
        return
    for layer in (SHALLOW, DEEP):
        for tile in candidate_boxes(layer.problem, "fprop", "relu", arch):
            if tile.TILE_W == tile.pixels:
                yield case("joined", layer, tile, "half", note=" in boxes")


def cases(arch: int = 90) -> list[Case]:
    """All of them for sm_90 or another, in an order that every process of one version agrees on."""
    boxes = () if why_not_on(arch) else box_convolutions(arch)
    leaner = [*shallow_convolutions(arch), *(square_convolutions() if arch < 90 else ())]
    return [
        *convolutions(arch),
        *stems(arch),
        *depthwise_convolutions(),
        *[Case(*case) for case in passes()],
        *boxes,
        *leaner,
        *masked_gradients(arch),
        *second_products(arch),
        *joins(arch),
    ]
