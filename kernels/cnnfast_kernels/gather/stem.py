"""Convolutions of an image of few channels, as the first of a network is, by the kernels that load by pointers.

As it lies, such an image is loaded one element at a time, and a program spends most of its instructions on addresses
and masks. Packed (packing.py), its loads are vectors of 16 bytes, or of 8 where outputs are an odd number of small
pixels apart, and the kernels are those of every convolution: fprop.py with all its epilogues and statistics, wgrad.py.
"""

from __future__ import annotations

from functools import partial
from math import gcd

import torch

from ..epilogue import Finish
from ..layout import Laid, layout_of, strides_nhwc
from ..packing import (
    PackedFpropLaunches,
    PackedWgradLaunches,
    Packing,
    packed_problem,
    packing_of,
    plan_packed_fprop,
    plan_packed_wgrad,
    vector_length,
    why_not_packed,
)
from ..problem import ConvProblem
from ..tiling import BUSY_PROGRAMS, PackedTile, Precision
from .fprop import plan_fprop
from .wgrad import plan_wgrad_slots

# Half of the vectors' most: below that, packing pays.
WIDE_BYTES = 8
# Outputs from which on packing pays: as many as one wave of programs has that take 64 each. Packing is two launches
# more.
LEAST_OUTPUTS = 64 * BUSY_PROGRAMS


def pixel_of(problem: ConvProblem) -> int:
    """Channels of a packed pixel."""
    return 4 if problem.C <= 4 else 8


def run_of(problem: ConvProblem, dtype: torch.dtype) -> int:
    """Elements that a row of taps is seen to have: those of its S pixels, and one pixel of a neighbour's where only
    that makes it whole vectors.

    That is so in half precision with pixels of 4 channels, an even stride and an odd S, and only there.
    """
    pixel, vector = pixel_of(problem), vector_length(dtype)
    step = gcd(problem.stride_w * pixel, vector)
    return -(-problem.S * pixel // step) * step


def why_no_packing(problem: ConvProblem, precision: Precision, dtype: torch.dtype) -> str:
    """Why the kernels of gather/ do not serve a convolution on a packed image, or "" if they can.

    In float32 without tensor cores multiplications are what takes time, and packing makes more of them; float64 is for
    judging others.
    """
    if precision not in ("half", "tf32"):
        return "there are no tensor cores for these operands"
    if problem.R * problem.S == 1:
        return "there is one tap only"
    return why_not_packed(problem, pixel_of(problem), vector_length(dtype))


def packing_pays(problem: ConvProblem, x: Laid, w: Laid) -> bool:
    """Whether a convolution that can be packed is, where nothing was measured: unless x and w are loaded as vectors
    anyway, or there is so little to do that launches count.
    """
    g = problem
    adjacent = all(t.stride(1) == 1 or t.shape[1] == 1 for t in (x, w))
    wide = adjacent and gcd(strides_nhwc(x).align, g.C) * layout_of(x).dtype.itemsize >= WIDE_BYTES
    return not wide and g.N * g.P * g.Q >= LEAST_OUTPUTS


def run_problem(problem: ConvProblem, dtype: torch.dtype) -> ConvProblem:
    """The convolution as the kernels see it."""
    return packed_problem(problem, pixel_of(problem), vector_length(dtype), run_of(problem, dtype))


def run_packing(problem: ConvProblem, dtype: torch.dtype) -> Packing:
    return packing_of(problem, dtype, pixel_of(problem), run_of(problem, dtype))


def plan_stem_fprop(
    problem: ConvProblem,
    tile: PackedTile,
    precision: Precision,
    x: Laid,
    w: Laid,
    y: Laid,
    residual: Laid | None = None,
    e: Finish | None = None,
) -> PackedFpropLaunches:
    """As `plan_fprop`."""
    packing, own = run_packing(problem, layout_of(x).dtype), problem.S * pixel_of(problem)
    run = plan_fprop(packing.problem, tile, precision, packing.x, packing.w, y, residual, e, own)
    return plan_packed_fprop(problem, packing, x, w, run)


def plan_stem_wgrad(
    problem: ConvProblem, tile: PackedTile, precision: Precision, x: Laid, dy: Laid, dw: Laid
) -> PackedWgradLaunches:
    """As `plan_wgrad`. A neighbour's pixel gets a gradient too, in columns that no sum of slots reads."""
    packing = run_packing(problem, layout_of(x).dtype)
    plan = partial(plan_wgrad_slots, packing.problem, tile, precision, packing.x, dy)
    return plan_packed_wgrad(problem, packing, tile.SPLIT_K, x, dw, plan)
