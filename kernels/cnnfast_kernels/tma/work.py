"""What the tensor-map kernels do with a tile: programs, steps, and the bytes of their boxes. Pure Python: imports
neither torch nor triton.

What of a box lies outside its tensor is filled with zeros, not loaded. Boxes of one row or one column skip the taps
that see only padding. All of this is separate along the two axes of an image.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

from ..costs import TileWork
from ..problem import ConvProblem, tap_pairs
from ..tiling import Operation, cdiv
from ..traffic import PLAIN_SUMS, Finishing, LoopWork, dgrad_traffic, fprop_traffic, wgrad_traffic
from .tiles import BoxTile, box_count, box_phases, box_programs

ELEMENT = 2  # bytes: half precision


class AxisBoxes(NamedTuple):
    """Along one axis, of all boxes and the taps that they take: how many pairs of a box and a tap there are, and how
    many pixels of the image, and of the output, these pairs load.
    """

    pairs: int
    image: int
    output: int


class Axis(NamedTuple):
    """One axis of a convolution, and how long a box is along it."""

    inputs: int
    outputs: int
    taps: int
    stride: int
    pad: int
    dilation: int
    tile: int


def axes(problem: ConvProblem, tile: BoxTile) -> tuple[Axis, Axis]:
    """Rows and columns."""
    g = problem
    rows = Axis(g.H, g.P, g.R, g.stride_h, g.pad_h, g.dil_h, tile.TILE_H)
    return rows, Axis(g.W, g.Q, g.S, g.stride_w, g.pad_w, g.dil_w, tile.TILE_W)


@lru_cache(4096)
def fprop_boxes(a: Axis) -> AxisBoxes:
    """A box reaches beyond the outputs, and loads what its taps meet there."""
    boxes = cdiv(a.outputs, a.tile)
    met = tap_pairs(boxes * a.tile, a.inputs, a.taps, a.stride, a.pad, a.dilation)
    return AxisBoxes(met if a.tile == 1 else boxes * a.taps, met, 0)


@lru_cache(4096)
def dgrad_boxes(a: Axis) -> AxisBoxes:
    """Boxes of every class cover as many pixels as the largest class has (dgrad.py)."""
    boxes = cdiv(cdiv(a.inputs, a.stride), a.tile)
    pairs = met = 0
    for first in range(a.stride):
        for tap in range(a.taps):
            begin = first + a.pad - tap * a.dilation
            if begin % a.stride == 0:
                begin //= a.stride  # what the first pixel of the class meets of dy
                inside = max(min(begin + boxes * a.tile, a.outputs) - max(begin, 0), 0)
                pairs += inside if a.tile == 1 else boxes
                met += inside
    return AxisBoxes(pairs, 0, met)


@lru_cache(4096)
def wgrad_boxes(a: Axis) -> tuple[AxisBoxes, ...]:
    """Of each tap. Boxes that it moves out of the image are skipped."""
    return tuple(_wgrad_boxes(a))


def _wgrad_boxes(a: Axis) -> Iterator[AxisBoxes]:
    for tap in range(a.taps):
        offset = tap * a.dilation - a.pad
        begin = cdiv(max(-offset, 0), a.stride)
        end = min(a.outputs, cdiv(max(a.inputs - offset, 0), a.stride))
        first = begin // a.tile
        boxes = cdiv(end, a.tile) - first if begin < end else 0
        beyond = (first + boxes) * a.tile
        image = min(beyond, cdiv(max(a.inputs - offset, 0), a.stride)) - max(first * a.tile, begin)
        yield AxisBoxes(boxes, max(image, 0) if boxes else 0, min(beyond, a.outputs) - first * a.tile if boxes else 0)


def channels_seen(problem: ConvProblem, tile: BoxTile) -> list[int]:
    """Of each column of wgrad's filter, the channels that all blocks of them load of a pixel: those of the next pixels
    too, where the image is seen in phases of columns and no block divides its channels.
    """
    g = problem
    phases = (box_phases(g, "wgrad", tile) or (1, 1))[1]
    blocks = cdiv(g.C, tile.TILE_C) * tile.TILE_C
    return [min(blocks, (phases - (s * g.dil_w - g.pad_w) % phases) * g.C) for s in range(g.S)]


def work(
    problem: ConvProblem,
    operation: Operation,
    tile: BoxTile,
    finishing: Finishing = PLAIN_SUMS,
    filter_channels: int | None = None,
    second: bool = False,
) -> TileWork:
    """What tma_fprop_kernel, tma_dgrad_kernel, or tma_wgrad_kernel with the sum of its slots, does in half precision.

    problem: as the kernels see it, see `views.flattened` and `stem.packing_of`. filter_channels: of the filters that
    fprop loads, if they were packed to more than the problem's. second: whether dgrad has a second product.
    """
    g = problem
    rows, columns = axes(g, tile)
    images, tiles_k, tiles_c = cdiv(g.N, tile.TILE_N), cdiv(g.K, tile.TILE_K), cdiv(g.C, tile.TILE_C)
    if operation == "fprop":
        h, w = fprop_boxes(rows), fprop_boxes(columns)
        boxes = images * h.pairs * w.pairs
        loaded = g.N * h.image * w.image * g.C * tiles_k + boxes * g.K * (filter_channels or g.C)
    elif operation == "dgrad":
        h, w = dgrad_boxes(rows), dgrad_boxes(columns)
        boxes = images * h.pairs * w.pairs
        loaded = g.N * h.output * w.output * g.K * tiles_c + boxes * g.K * g.C
        if second:
            tiles_k += cdiv(g.C, tile.TILE_K)
            loaded += g.N * g.H * g.W * g.C * tiles_c + boxes * g.C * g.C
    else:
        taps = wgrad_boxes(rows)
        h = AxisBoxes(*map(sum, zip(*taps, strict=True)))
        across = wgrad_boxes(columns)
        w = AxisBoxes(*map(sum, zip(*across, strict=True)))
        seen = sum(tap.image * channels for tap, channels in zip(across, channels_seen(g, tile), strict=True))
        boxes = images * h.pairs * w.pairs
        loaded = g.N * (h.output * w.output * g.K * tiles_c + h.image * seen * tiles_k)
    pixels_or_filters, others, depth = tile.gemm(operation)
    product = (pixels_or_filters, others, depth) if operation == "wgrad" else (others, pixels_or_filters, depth)
    loop = LoopWork(
        box_programs(g, operation, tile),
        tile.num_warps,
        boxes * tiles_k * tiles_c,
        product,
        "half",
        loaded * ELEMENT,
        tile.num_stages,
        through_registers=False,
    )
    if operation == "fprop":
        return fprop_traffic(g, loop, ELEMENT, box_count(g, operation, tile), finishing)
    if operation == "dgrad":
        return dgrad_traffic(g, loop, ELEMENT, boxes if second else 0)
    return wgrad_traffic(g, loop, ELEMENT, tile.SPLIT_K)
