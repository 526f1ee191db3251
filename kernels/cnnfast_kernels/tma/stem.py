"""Convolutions of an image of few channels, as the first of a network is, by the tensor-map kernels.

A tensor map demands that pixels are multiples of 16 bytes, which three channels are not. So the image is packed first
(packing.py), and every load of it is one instruction.

No GPU has shown yet that it takes maps whose rows overlap. So nothing here runs by default, only where measuring found
it right and fastest.
"""

from __future__ import annotations

from functools import partial

import torch

from ..epilogue import Finish
from ..layout import Laid, layout_of
from ..packing import (
    PackedFpropLaunches,
    PackedWgradLaunches,
    Packing,
    packed_problem,
    packing_of,
    plan_packed_fprop,
    plan_packed_wgrad,
    why_not_packed,
)
from ..problem import ConvProblem
from .fprop import plan_tma_fprop
from .tiles import BoxTile
from .views import ALIGNMENT
from .wgrad import plan_slot_gradients


def pixel_of(problem: ConvProblem) -> int:
    """Channels of a packed pixel: so many that the pixels of one output are a multiple of 16 bytes from the next's."""
    return ALIGNMENT if problem.stride_w % 2 else ALIGNMENT // 2


def is_packed(problem: ConvProblem) -> bool:
    """Whether the tensor-map kernels would serve a convolution so: few channels, no gaps between the taps of a row. One
    column of outputs is none that a map can step along.
    """
    g = problem
    return g.C < ALIGNMENT and g.Q > 1 and not why_not_packed(g, pixel_of(g), ALIGNMENT)


def boxed_problem(problem: ConvProblem) -> ConvProblem:
    """The convolution as the tensor-map kernels see it: a box's channels end where the taps of a row do."""
    pixel = pixel_of(problem)
    return packed_problem(problem, pixel, ALIGNMENT, problem.S * pixel)


def boxed_packing(problem: ConvProblem, dtype: torch.dtype) -> Packing:
    pixel = pixel_of(problem)
    return packing_of(problem, dtype, pixel, problem.S * pixel)


def plan_tma_stem_fprop(
    problem: ConvProblem,
    tile: BoxTile,
    x: Laid,
    w: Laid,
    y: Laid,
    residual: Laid | None = None,
    e: Finish | None = None,
) -> PackedFpropLaunches:
    """As `plan_tma_fprop`, but that x and w may have any memory layout."""
    packing = boxed_packing(problem, layout_of(x).dtype)
    run = plan_tma_fprop(packing.problem, tile, packing.x, packing.w, y, residual, e)
    return plan_packed_fprop(problem, packing, x, w, run)


def plan_tma_stem_wgrad(problem: ConvProblem, tile: BoxTile, x: Laid, dy: Laid, dw: Laid) -> PackedWgradLaunches:
    """As `plan_tma_wgrad`, but that x may have any memory layout."""
    packing = boxed_packing(problem, layout_of(x).dtype)
    plan = partial(plan_slot_gradients, packing.problem, tile, packing.x, dy)
    return plan_packed_wgrad(problem, packing, tile.SPLIT_K, x, dw, plan)
