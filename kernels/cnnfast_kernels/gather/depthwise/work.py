"""What the depthwise kernels do with a tile: programs, turns of their innermost loops, and the bytes that they load.
Pure Python: imports neither torch nor triton.

A turn is one column of the filter, up to seven taps of it. Its loads go to registers. Those of the next column are for
the most part of pixels that the program has loaded before: the first-level cache has them, and the weights.
"""

from __future__ import annotations

from functools import lru_cache

from ...costs import TileWork
from ...problem import ConvProblem, tap_pairs, tap_step
from ...tiling import ELEMENT_BYTES, Operation, Precision, cdiv
from ...traffic import PLAIN_SUMS, Finishing, LoopWork, dgrad_traffic, fprop_traffic, weights, wgrad_traffic
from .tiles import StripTile, columns_at_once, taps_at_once


@lru_cache(4096)
def image_rows(problem: ConvProblem, rows: int) -> int:
    """Rows of the image that all strips of a column of outputs load for a column of the filter."""
    g = problem
    taps = taps_at_once(g.R)
    found = 0
    for r0 in range(0, g.R, taps):
        steps = {i * g.stride_h + r * g.dil_h for i in range(rows) for r in range(min(taps, g.R - r0))}
        begin = r0 * g.dil_h - g.pad_h
        found += sum(0 <= begin + p * g.stride_h + j < g.H for p in range(0, g.P, rows) for j in steps)
    return found


@lru_cache(4096)
def gradient_rows(problem: ConvProblem, rows: int) -> int:
    """Rows of dy that all strips of a column of dx load for a column of the filter."""
    g = problem
    taps = taps_at_once(g.R, tap_step(g.stride_h, g.dil_h))
    found = 0
    for r0 in range(0, g.R, taps):
        meet = {i - r * g.dil_h for i in range(rows) for r in range(min(taps, g.R - r0))}
        begin = g.pad_h // g.stride_h - r0 * g.dil_h // g.stride_h
        steps = {j // g.stride_h for j in meet if j % g.stride_h == 0}
        strips = range(cdiv(g.H + g.pad_h % g.stride_h, rows))
        found += sum(0 <= begin + i * (rows // g.stride_h) + j < g.P for i in strips for j in steps)
    return found


def work(
    problem: ConvProblem,
    operation: Operation,
    precision: Precision,
    tile: StripTile,
    finishing: Finishing = PLAIN_SUMS,
    copied: bool = False,
) -> TileWork:
    """What depthwise_fprop_kernel, depthwise_dgrad_kernel, or depthwise_wgrad_kernel with the sum of its slots, does.

    copied: whether the filters are copied first, tap by tap, which is one more launch.
    """
    g, element = problem, ELEMENT_BYTES[precision]
    taps = taps_at_once(g.R, tap_step(g.stride_h, g.dil_h) if operation == "dgrad" else 1)
    parts, at_once = cdiv(g.R, taps), columns_at_once(g.R, g.S) if operation == "wgrad" else 1
    if operation == "dgrad":
        strips, columns, channels = cdiv(g.H + g.pad_h % g.stride_h, tile.ROWS), cdiv(g.W, g.stride_w), g.C
        rows, step = gradient_rows(g, tile.ROWS), 1
    else:
        strips, columns, channels = cdiv(g.P, tile.ROWS), g.Q, g.K
        rows, step = image_rows(g, tile.ROWS), g.stride_w
    tiles, tiles_c = cdiv(g.N * strips * columns, tile.BLOCK_M), cdiv(channels, tile.BLOCK_C)
    pixels = g.N * g.K * rows * tap_pairs(g.Q, g.W, g.S, g.stride_w, g.pad_w, g.dil_w)
    # pixels side by side that the strips of a tile meet, and how often they load them
    width, often = (tile.BLOCK_M - 1) * step + (g.S - 1) * g.dil_w + 1, tile.BLOCK_M * g.S
    if operation == "dgrad":
        width, often = tile.BLOCK_M + (g.S - 1) * g.dil_w // g.stride_w, tile.BLOCK_M * cdiv(g.S, g.stride_w)
    again = pixels - cdiv(pixels * min(width, often), often)
    if operation == "wgrad":
        programs, turns = tile.SPLIT_K * tiles_c, tiles * tiles_c * parts * (g.S // at_once)
        results = g.N * g.P * g.Q * g.K
        loaded = pixels + results * parts * (g.S // at_once)
        cached = again + loaded - pixels - results
    else:
        classes = g.stride_w if operation == "dgrad" else 1
        multiplier = g.group_filters if operation == "dgrad" else 1
        programs = tiles * tiles_c * classes
        turns = tiles * tiles_c * parts * g.S * multiplier
        filters = tiles * weights(g)
        loaded = pixels + tile.BLOCK_M * filters
        cached = again + (tile.BLOCK_M - 1) * filters
    loop = LoopWork(
        programs,
        tile.num_warps,
        turns,
        (tile.BLOCK_M * tile.ROWS, tile.BLOCK_C, taps * at_once),
        "fp64" if precision == "fp64" else "ieee",
        loaded * element,
        0,
        through_registers=True,
        cached=cached * element,
    )
    if operation == "wgrad":
        return wgrad_traffic(g, loop, element, tile.SPLIT_K)
    found = (
        fprop_traffic(g, loop, element, tiles, finishing) if operation == "fprop" else dgrad_traffic(g, loop, element)
    )
    copy = 2 * weights(g) * element if copied else 0
    return found._replace(launches=found.launches + copied, further=found.further + copy)
