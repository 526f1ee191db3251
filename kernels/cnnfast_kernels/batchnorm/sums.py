"""The sums over all axes but channels: of a gradient, and of what normalise-activate(-add) makes of it.

Every program leaves the sums of its tile in a slot; gradients.py has the formulas.
"""

from __future__ import annotations

from itertools import chain
from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl

from .. import launch, memory
from ..activations import activate_backward
from ..dtypes import accumulator_dtype
from ..epilogue import Channels, finish_of
from ..layout import Layout, dense
from ..moments import combine_slots
from ..planes import (
    PlaneTensor,
    common_planes,
    load_tile,
    load_vector,
    locate_tile,
    mergeable,
)
from .channels import load_scale

STRIDES = [f"{t}_stride_{d}" for t in ("dz", "y", "z", "residual") for d in "nlc"]


class GradientSumsOperands(NamedTuple):
    """dz and, of its shape, y, z and residual; slots [tiles, quantities, C]; the others [C], contiguous. What is not
    needed is None.
    """

    dz: torch.Tensor
    y: torch.Tensor | None
    z: torch.Tensor | None
    residual: torch.Tensor | None
    mean: torch.Tensor | None
    var: torch.Tensor | None
    gamma: torch.Tensor | None
    beta: torch.Tensor | None
    slots: torch.Tensor


@triton.jit
@no_type_check
def load_gradient(dz, y, z, residual, of_channels, invstd, scale, at, e: tl.constexpr):
    """(g, xhat) of a tile. Without y nobody needs xhat, and g stands in its place. Where z is given, the activation's
    derivative follows from it; else the activation's argument is computed again, to the bits that epilogue.finish made
    of it: where the derivative follows from z, it is the same as with z.
    """
    ACC: tl.constexpr = tl.float64 if e.double else tl.float32
    ACTIVATION: tl.constexpr = e.activation
    gradient = load_tile(dz, at, ACC)
    centred = gradient
    xhat = gradient
    if y.ptr is not None:
        centred = load_tile(y, at, ACC)
        if of_channels.mean is not None:
            centred = centred - load_vector(of_channels.mean, at.c, at.c_ok, ACC)[None, :]
            xhat = centred * invstd[None, :]
    if ACTIVATION is not None:
        slope = tl.full((), e.slope, ACC)
        if z.ptr is not None:
            gradient = activate_backward(gradient, load_tile(z, at, ACC), slope, ACTIVATION)
        else:
            u = centred
            if of_channels.mean is not None:
                u = centred * scale[None, :]
            if of_channels.beta is not None:
                u = u + load_vector(of_channels.beta, at.c, at.c_ok, ACC)[None, :]
            if residual.ptr is not None:
                u = u + load_tile(residual, at, ACC)
            gradient = activate_backward(gradient, u, slope, ACTIVATION, y.ptr.dtype.element_ty)
    return gradient, xhat


@triton.jit(do_not_specialize=["L", *STRIDES])
@no_type_check
def gradient_sums_kernel(
    dz_ptr, y_ptr, z_ptr, residual_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr, slots_ptr, L,
    dz_stride_n, dz_stride_l, dz_stride_c, y_stride_n, y_stride_l, y_stride_c,
    z_stride_n, z_stride_l, z_stride_c, residual_stride_n, residual_stride_l, residual_stride_c,
    QUANTITIES: tl.constexpr, g: tl.constexpr, e: tl.constexpr,
):  # fmt: skip
    """One tile's slot in slots [tiles, QUANTITIES, C]: the sums over its rows of g and, if there are two QUANTITIES, of
    g * xhat. g: PlaneGeometry; e: Finish.

    A channel whose invstd is infinite (variance and eps are 0) sums g * (y - mean) instead: `combine_slots` multiplies
    the whole sum by it.
    """
    ACC: tl.constexpr = tl.float64 if e.double else tl.float32
    BLOCK_C: tl.constexpr = g.BLOCK_C
    at = locate_tile(L, g)
    of_channels = Channels(None, mean_ptr, var_ptr, gamma_ptr, beta_ptr, None)
    invstd = tl.zeros((BLOCK_C,), ACC)
    scale = invstd
    if var_ptr is not None:
        invstd, scale = load_scale(of_channels, at, e)
        invstd = tl.where(invstd == float("inf"), 1.0, invstd)
    dz = PlaneTensor(dz_ptr, dz_stride_n, dz_stride_l, dz_stride_c, g.ALIGN)
    y = PlaneTensor(y_ptr, y_stride_n, y_stride_l, y_stride_c, g.ALIGN)
    z = PlaneTensor(z_ptr, z_stride_n, z_stride_l, z_stride_c, g.ALIGN)
    residual = PlaneTensor(residual_ptr, residual_stride_n, residual_stride_l, residual_stride_c, g.ALIGN)
    gradient, xhat = load_gradient(dz, y, z, residual, of_channels, invstd, scale, at, e)
    slot = slots_ptr + at.number.to(tl.int64) * QUANTITIES * g.C + at.c
    tl.store(slot, tl.sum(tl.where(at.l_ok[:, None], gradient, 0.0), 0), mask=at.c_ok)
    if QUANTITIES == 2:
        tl.store(slot + g.C, tl.sum(tl.where(at.l_ok[:, None], gradient * xhat, 0.0), 0), mask=at.c_ok)


Shape = tuple[int, ...]


def strides(*operands: torch.Tensor | None) -> tuple[Shape | None, ...]:
    return tuple([None if t is None else t.stride() for t in operands])  # a generator would be entered once a tensor


@launch.planned
def plan_sums(
    shape: Shape,
    strides: tuple[Shape | None, ...],
    dtype: torch.dtype,
    eps: float,
    activation: str | None,
    slope: float,
    quantities: int,
) -> tuple[launch.Launch[GradientSumsOperands], Layout]:
    planes = common_planes(shape, strides, dtype)
    run = launch.Launch(
        gradient_sums_kernel, planes.grid, planes.units, *chain(*planes.strides),
        QUANTITIES=quantities, e=finish_of(dtype, eps, activation, slope), **planes.constants,
    )  # fmt: skip
    return run, dense((planes.tiles, quantities, planes.C), accumulator_dtype(dtype))


def channel_sum(dy: torch.Tensor) -> torch.Tensor:
    """The sum over all axes but channels of dy [N, C, *spatial]: [C], of dy's dtype. Zero if there are no rows."""
    dy = mergeable(dy)
    run, layout = plan_sums(dy.shape, strides(dy, None, None, None), dy.dtype, 0.0, None, 0.0, 1)
    slots = memory.empty(layout, dy)
    run(GradientSumsOperands(dy, None, None, None, None, None, None, None, slots))
    return combine_slots(slots)[0].to(dy.dtype)
