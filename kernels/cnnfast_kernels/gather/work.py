"""What the gather kernels do with a tile: programs, k-steps, and the bytes that their masks let through. Pure Python:
imports neither torch nor triton.

A mask hides the padding, and what lies beyond the pixels, channels and filters: nothing of it is loaded.
"""

from __future__ import annotations

from math import gcd

from ..costs import TileWork
from ..problem import ConvProblem, tap_pairs, tap_step
from ..tiling import ELEMENT_BYTES, VECTOR_BYTES, Operation, Precision, TileConfig, cdiv
from ..traffic import PLAIN_SUMS, Finishing, LoopWork, dgrad_traffic, fprop_traffic, weights, wgrad_traffic

LEAST_COPY = 4  # bytes of an asynchronous copy


def class_taps(taps: int, stride: int, pad: int, dilation: int) -> list[int]:
    """How many taps of an axis each class of dgrad's pixels meets (dgrad.py)."""
    return [sum((first + pad - r * dilation) % stride == 0 for r in range(taps)) for first in range(stride)]


def most_taps(problem: ConvProblem) -> int:
    """Taps of the class of dgrad's pixels that meets the most."""
    g = problem
    return cdiv(g.R, tap_step(g.stride_h, g.dil_h)) * cdiv(g.S, tap_step(g.stride_w, g.dil_w))


def steps_of_tile(problem: ConvProblem, operation: Operation, tile: TileConfig) -> int:
    """The k-steps of one tile of fprop's result, or of dgrad's: of one for each class of its pixels."""
    g = problem
    if operation == "fprop":
        depth, taps, most = g.group_channels, [g.R * g.S], g.R * g.S
    else:
        rows = class_taps(g.R, g.stride_h, g.pad_h, g.dil_h)
        columns = class_taps(g.S, g.stride_w, g.pad_w, g.dil_w)
        depth, taps, most = g.group_filters, [r * s for r in rows for s in columns], most_taps(g)
    if depth < tile.BLOCK_K and most > 1:
        return sum(cdiv(t * depth, tile.BLOCK_K) for t in taps)
    return sum(taps) * cdiv(depth, tile.BLOCK_K)


def stages_of_loop(
    problem: ConvProblem, operation: Operation, precision: Precision, tile: TileConfig, adjacent: bool
) -> int:
    """The stages that a loop really has: one, where loads pass through registers, because those of neighbours are of
    less than the 4 bytes that an asynchronous copy takes (PTX ISA, cp.async).

    Of channels of which a k-step, or a tile of wgrad's columns, spans several taps, the compiler knows so many to be
    neighbours as divide their number.
    """
    g = problem
    if operation == "wgrad":
        depth, spans = g.group_channels, g.group_channels % tile.BLOCK_N != 0 and g.R * g.S > 1
    else:
        depth, taps = (g.group_channels, g.R * g.S) if operation == "fprop" else (g.group_filters, most_taps(g))
        spans = depth < tile.BLOCK_K and taps > 1
    neighbours = 1 if not adjacent else gcd(depth, VECTOR_BYTES) if spans else VECTOR_BYTES
    return tile.num_stages if neighbours * ELEMENT_BYTES[precision] >= LEAST_COPY else 1


def loaded_again(problem: ConvProblem, operation: Operation, tile: TileConfig, loaded: int) -> int:
    """Of the elements of an image that a kernel loads one by one, through the first-level cache, those that it has
    there: the taps of a row that a program takes meet the pixels of their neighbours.
    """
    g = problem
    if operation == "fprop":
        pixels, taps, step = tile.BLOCK_M, g.S, g.stride_w
    elif operation == "dgrad":
        pixels, taps, step = tile.BLOCK_M, cdiv(g.S, tap_step(g.stride_w, g.dil_w)), 1
    else:
        pixels, taps, step = tile.BLOCK_K, min(g.S, cdiv(tile.BLOCK_N, g.group_channels)), g.stride_w
    width = min((pixels - 1) * step + taps, pixels * taps)
    return loaded - cdiv(loaded * width, pixels * taps)


def work(
    problem: ConvProblem,
    operation: Operation,
    precision: Precision,
    tile: TileConfig,
    finishing: Finishing = PLAIN_SUMS,
    adjacent: bool = True,
) -> TileWork:
    """What conv_fprop_kernel, conv_dgrad_kernel, or conv_wgrad_kernel with the sum of its slots, does.

    adjacent: whether channels lie next to each other in all operands.
    """
    g, element = problem, ELEMENT_BYTES[precision]
    taps = tap_pairs(g.P, g.H, g.R, g.stride_h, g.pad_h, g.dil_h)
    taps *= tap_pairs(g.Q, g.W, g.S, g.stride_w, g.pad_w, g.dil_w)
    met = g.N * taps  # pairs of a pixel of the result and one of the image that a tap joins
    if operation == "fprop":
        tiles, columns = cdiv(g.N * g.P * g.Q, tile.BLOCK_M), cdiv(g.group_filters, tile.BLOCK_N)
        programs, image, others = tiles * columns * g.groups, met * g.C * columns, tiles * weights(g)
        steps = programs * steps_of_tile(g, operation, tile)
    elif operation == "dgrad":
        pixels = g.N * cdiv(g.H, g.stride_h) * cdiv(g.W, g.stride_w)  # of the largest class
        tiles, columns = cdiv(pixels, tile.BLOCK_M), cdiv(g.group_channels, tile.BLOCK_N)
        programs, image, others = tiles * g.parities * columns * g.groups, met * g.K * columns, tiles * weights(g)
        steps = tiles * columns * g.groups * steps_of_tile(g, operation, tile)
    else:
        tiles, columns = cdiv(g.group_filters, tile.BLOCK_M), cdiv(g.R * g.S * g.group_channels, tile.BLOCK_N)
        programs = tiles * columns * g.groups * tile.SPLIT_K
        image, others = met * g.C * tiles, g.N * g.P * g.Q * g.K * columns
        steps = tiles * columns * g.groups * cdiv(g.N * g.P * g.Q, tile.BLOCK_K)
    stages = stages_of_loop(g, operation, precision, tile, adjacent)
    loop = LoopWork(
        programs,
        tile.num_warps,
        steps,
        (tile.BLOCK_M, tile.BLOCK_N, tile.BLOCK_K),
        precision,
        (image + others) * element,
        stages,
        through_registers=precision != "half",
        cached=loaded_again(g, operation, tile, image) * element if stages < tile.num_stages else 0,
    )
    if operation == "fprop":
        return fprop_traffic(g, loop, element, tiles, finishing)
    if operation == "dgrad":
        return dgrad_traffic(g, loop, element)
    return wgrad_traffic(g, loop, element, tile.SPLIT_K)
