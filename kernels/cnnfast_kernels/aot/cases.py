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
from ..augment import Augmenting, ImageNumbers, ImageSource, augment_batch
from ..batchnorm import (
    apply_sums,
    batch_moments,
    channel_sum,
    combine_ranks,
    gradient_sums,
    normalize,
    normalize_backward,
    update_running,
)
from ..choosing import Tile
from ..gather.depthwise.tiles import strip_tiles
from ..pooling import (
    adaptive_avg_pool,
    adaptive_avg_pool_backward,
    avg_pool,
    avg_pool_backward,
    global_avg_pool,
    max_pool,
    max_pool_backward,
    max_pool_indices,
)
from ..problem import PoolProblem
from ..tiling import DEFAULT_TILES, ELEMENT_BYTES, VECTOR_BYTES, Operation, Precision, candidate_tiles, choose_tile
from ..tma.stem import packed_problem
from ..tma.tiles import candidate_boxes
from ..tma.views import why_not_on
from . import layers
from .layers import (
    BATCH,
    BODY,
    DEPTHWISE_CHANNELS,
    DEPTHWISE_WINDOWS,
    FLOAT32,
    FORMS,
    LAST,
    MANY,
    NARROW,
    NCHW,
    POINTWISE,
    SHORTCUT,
    STEM,
    STRIDED,
    CaseLayer,
)

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


def batch_norm(dtype: torch.dtype, fmt: torch.memory_format, training: bool) -> None:
    """Forward and backward of act(batch_norm(y) + residual), all gradients asked for."""
    C = 64
    y = layers.empty(BATCH, C, 56, 56, dtype=dtype, fmt=fmt)
    residual = torch.empty_like(y)
    weight, bias = layers.empty(C), layers.empty(C)
    mean, var = batch_moments(y) if training else (layers.empty(C), layers.empty(C))
    if training:
        update_running(layers.empty(C), layers.empty(C), mean, var, 0.1, BATCH * 56 * 56)
    z = normalize(y, mean, var, weight, bias, residual, 1e-5, "relu", 0.0)
    normalize_backward(
        torch.empty_like(z),
        y,
        z,
        mean,
        var,
        weight,
        bias,
        residual,
        1e-5,
        "relu",
        0.0,
        training,
        (True, True, True, True),
    )
    channel_sum(z)


def batch_norm_over_ranks(dtype: torch.dtype, ranks: int) -> None:
    """What so many ranks compute otherwise than one: the statistics of all, and gradients by sums over all."""
    C = 64
    y = layers.empty(BATCH, C, 56, 56, dtype=dtype, fmt=LAST)
    weight, bias = layers.empty(C), layers.empty(C)
    own, _ = batch_moments(y)
    gathered = layers.empty(ranks, 2 * C + 1, dtype=own.dtype)
    statistics = combine_ranks(gathered, layers.empty(C), layers.empty(C), 0.1)
    norm = weight, bias, y
    sums = gradient_sums(y, y, y, *statistics[:2], *norm, 1e-5, "relu", 0.0)
    apply_sums(y, y, y, statistics, *norm, sums, 1e-5, "relu", 0.0, (True, True))


def activation_pass(dtype: torch.dtype, fmt: torch.memory_format, activation: str) -> None:
    """Forward and backward of act(y + bias + residual) after a convolution that the library serves."""
    y = layers.empty(BATCH, 64, 56, 56, dtype=dtype, fmt=fmt)
    bias, residual = layers.empty(64, dtype=dtype), torch.empty_like(y)
    slopes = layers.empty(64, dtype=dtype) if activation == "prelu" else None
    norm = (None, None, None, bias, residual, 0.0, activation, 0.01)
    z = normalize(y, *norm, slopes)
    if activation != "prelu":
        normalize_backward(torch.empty_like(z), y, z, *norm, False, (True, False, True, False))


def pooling(dtype: torch.dtype, fmt: torch.memory_format) -> None:
    x = layers.empty(BATCH, 64, 112, 112, dtype=dtype, fmt=fmt)
    window = PoolProblem.of(tuple(x.shape), (3, 3), (2, 2), (1, 1))
    y, taps = max_pool(window, x, with_taps=True)
    assert taps is not None
    max_pool_indices(window, taps)
    max_pool_backward(window, y, taps, fmt)
    avg_pool(window, x, False, None)
    avg_pool_backward(window, y, False, None, fmt)
    adaptive_avg_pool_backward(adaptive_avg_pool(x, 7, 7), (BATCH, 64, 112, 112), fmt)
    global_avg_pool(layers.empty(BATCH, 512, 7, 7, dtype=dtype, fmt=fmt))


def augmentation(images: torch.dtype, dtype: torch.dtype, everything: bool, C: int = 3, noise: bool = False) -> None:
    """A map alone, or everything that can be done to images, of one size in NCHW or of different sizes."""
    x = layers.empty(BATCH, C, 256, 256, dtype=images)
    source = ImageSource(x)
    if images == torch.uint8:
        offsets, sizes = layers.empty(BATCH, dtype=torch.int64), layers.empty(BATCH, 2, dtype=torch.int32)
        source = ImageSource(x.view(-1), offsets, sizes)
    numbers = ImageNumbers(layers.empty(BATCH, 2, 3))
    if everything:
        boxes, seeds = layers.empty(BATCH, 1, 4 + C), None
        if noise:
            boxes, seeds = layers.empty(BATCH, 1, 4), layers.empty(BATCH, dtype=torch.int64)
        numbers = ImageNumbers(numbers.maps, layers.empty(BATCH, 5), boxes, seeds, layers.empty(BATCH, 6))
    augmenting = Augmenting(224, 224, dtype, (0.0,) * C, (0.5,) * C, (0.25,) * C, reflect=everything)
    augment_batch(source, numbers, augmenting)


def passes() -> Iterator[Case]:
    yield Case("batch norm bfloat16", partial(batch_norm, torch.bfloat16, LAST, True))
    yield Case("batch norm bfloat16, given statistics", partial(batch_norm, torch.bfloat16, LAST, False))
    yield Case("batch norm float32 NCHW", partial(batch_norm, FLOAT32, NCHW, True))
    yield Case("batch norm float64", partial(batch_norm, torch.float64, LAST, True))
    # 8 ranks are those of one machine; 2048 make the highest block, of one channel, with float64's registers.
    yield Case("batch norm over 8 ranks bfloat16", partial(batch_norm_over_ranks, torch.bfloat16, 8))
    yield Case("batch norm over 2048 ranks float64", partial(batch_norm_over_ranks, torch.float64, 2048))
    # read off the result, computed again, and one whose slopes are operands
    for activation in ("relu", "mish", "prelu"):
        yield Case(f"bias and {activation} bfloat16", partial(activation_pass, torch.bfloat16, LAST, activation))
    yield Case("bias and mish float32 NCHW", partial(activation_pass, FLOAT32, NCHW, "mish"))
    yield Case("pooling bfloat16", partial(pooling, torch.bfloat16, LAST))
    yield Case("pooling float32 NCHW", partial(pooling, FLOAT32, NCHW))
    yield Case("augmentation uint8 to bfloat16, a map", partial(augmentation, torch.uint8, torch.bfloat16, False))
    yield Case("augmentation uint8 to bfloat16", partial(augmentation, torch.uint8, torch.bfloat16, True))
    yield Case("augmentation uint8 to float16, noise", partial(augmentation, torch.uint8, torch.float16, True, 3, True))
    yield Case("augmentation float32", partial(augmentation, FLOAT32, FLOAT32, True))
    yield Case("augmentation float16, grey", partial(augmentation, torch.float16, torch.float16, True, 1))


def cases(arch: int = 90) -> list[Case]:
    """All of them for sm_90 or another, in an order that every process of one version agrees on."""
    boxes = () if why_not_on(arch) else box_convolutions(arch)
    return [*convolutions(arch), *depthwise_convolutions(), *passes(), *boxes]
