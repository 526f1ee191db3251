"""The bytes that a convolution moves, as far as all families of kernels move the same: its tensors, what follows the
sums of a forward kernel, a gradient in slots, and further launches. Pure Python: imports neither torch nor triton.

A family's `work` counts what its kernels' loops load (gather/work.py, gather/depthwise/work.py, tma/work.py), and
begins from one of these.
"""

from __future__ import annotations

from typing import NamedTuple

from .costs import TileWork
from .problem import ConvProblem, pixels_met
from .tiling import Operation, Precision, cdiv

# How many entries of moments one program of moments.py combines into one.
COMBINED = 128


class Finishing(NamedTuple):
    """What follows the sums of a forward kernel, as far as it moves bytes: moments of tiles are left, a norm by given
    statistics reads four vectors, a residual is read.
    """

    moments: bool = False
    norm: bool = False
    residual: bool = False


PLAIN_SUMS = Finishing()


class LoopWork(NamedTuple):
    """What the loops of a launch do: the fields of TileWork of the same names."""

    programs: int
    warps: int
    steps: int
    product: tuple[int, int, int]
    precision: Precision
    loaded: int
    stages: int
    through_registers: bool
    cached: int = 0


def sum_bytes(precision: Precision) -> int:
    """Of one sum of products of this precision."""
    return 8 if precision == "fp64" else 4


def met_pixels(problem: ConvProblem) -> int:
    """Pixels of all images that some tap of some output meets: a 1x1 filter with a stride leaves most out."""
    g = problem
    rows = pixels_met(g.P, g.H, g.R, g.stride_h, g.pad_h, g.dil_h)
    return g.N * rows * pixels_met(g.Q, g.W, g.S, g.stride_w, g.pad_w, g.dil_w)


def weights(problem: ConvProblem) -> int:
    return problem.K * problem.group_channels * problem.R * problem.S


def least_bytes(problem: ConvProblem, operation: Operation, element: int) -> int:
    """That an operation moves if each of its tensors is read or written once; of the image, where it is read, only
    what a tap meets. element: bytes of one.
    """
    g = problem
    image = g.N * g.H * g.W if operation == "dgrad" else met_pixels(g)
    return (image * g.C + weights(g) + g.N * g.P * g.Q * g.K) * element


def levels(tiles: int) -> list[int]:
    """The entries that each launch reads which combines the moments of tiles, down to one."""
    found = [tiles]
    while found[-1] > COMBINED:
        found.append(cdiv(found[-1], COMBINED))
    return found


def fprop_traffic(
    problem: ConvProblem, loop: LoopWork, element: int, tiles: int, finishing: Finishing = PLAIN_SUMS
) -> TileWork:
    """tiles: of pixels. element: bytes of one of a tensor's. A program has its filters of one tile."""
    g, a_sum = problem, sum_bytes(loop.precision)
    results = g.N * g.P * g.Q * g.K * element
    moments = tiles * 2 * g.K * a_sum if finishing.moments else 0
    vectors = tiles * 4 * g.K * a_sum if finishing.norm else 0
    residual = results if finishing.residual else 0
    least = least_bytes(g, "fprop", element) + residual
    read = levels(tiles) if finishing.moments and tiles else []
    return TileWork(
        **loop._asdict(),
        outside=results + residual + moments + vectors,
        moved=least + moments,
        memory=least,
        flops=g.flops,
        launches=len(read),
        further=sum(read) * 2 * g.K * a_sum,
    )


def dgrad_traffic(problem: ConvProblem, loop: LoopWork, element: int, second: int = 0) -> TileWork:
    """second: tiles of pixels that begin with a second product (second_product.py); 0 where there is none."""
    g = problem
    least, image = least_bytes(g, "dgrad", element), g.N * g.H * g.W * g.C
    outside, flops = image * element, g.flops
    if second:
        least += (image + g.C * g.C) * element
        outside += second * 2 * g.C * sum_bytes(loop.precision)
        flops += 2 * image * g.C
    return TileWork(**loop._asdict(), outside=outside, moved=least, memory=least, flops=flops)


def wgrad_traffic(problem: ConvProblem, loop: LoopWork, element: int, slots: int) -> TileWork:
    """slots: parts of the sum. Several are added by a further launch."""
    least, result = least_bytes(problem, "wgrad", element), weights(problem) * element
    outside = result if slots == 1 else slots * weights(problem) * sum_bytes(loop.precision)
    return TileWork(
        **loop._asdict(),
        outside=outside,
        moved=least - result + outside,
        memory=least,
        flops=problem.flops,
        launches=0 if slots == 1 else 1,
        further=0 if slots == 1 else outside + result,
    )
