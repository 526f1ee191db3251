"""The derivatives of normalise-activate(-add), and the sum over all axes but channels.

With g = dz * act'(u), u the argument of act, and xhat = (y - mean) * invstd, in training:

    dbeta = sum g,  dgamma = sum g * xhat,  dresidual = g,  dy = scale * (g - dbeta / rows - xhat * dgamma / rows)

with frozen statistics dy = scale * g. Every program leaves the sums of its tile in a slot.
"""

from __future__ import annotations

from itertools import chain
from typing import Any, NamedTuple, no_type_check

import torch
import triton
import triton.language as tl

from .. import launch, memory
from ..dtypes import accumulator_dtype
from ..epilogue import FROM_OUTPUT, Channels, Finish, activate_backward
from ..layout import Layout, dense
from ..moments import combine_slots
from ..planes import (
    PlaneTensor,
    common_planes,
    contiguous,
    dense_format,
    load_tile,
    load_vector,
    locate_tile,
    mergeable,
    tile_pointers,
)
from ..rounding import round_quotient
from .channels import load_scale

STRIDES = [f"{t}_stride_{d}" for t in ("dz", "y", "z", "residual", "dy", "dresidual") for d in "nlc"]


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


class NormalizeBackwardOperands(NamedTuple):
    """The same, and in training the sums of g and of g * xhat, [C], over so many rows as `total` [1] says, by default
    dz's; the results dy and dresidual are of dz's shape.
    """

    dz: torch.Tensor
    y: torch.Tensor | None
    z: torch.Tensor | None
    residual: torch.Tensor | None
    mean: torch.Tensor
    var: torch.Tensor
    gamma: torch.Tensor | None
    beta: torch.Tensor | None
    sum_g: torch.Tensor | None
    sum_gx: torch.Tensor | None
    total: torch.Tensor | None
    dy: torch.Tensor | None
    dresidual: torch.Tensor | None


@triton.jit
@no_type_check
def load_gradient(dz, y, z, residual, of_channels, invstd, scale, slope, at, e: tl.constexpr):
    """(g, xhat) of a tile. Without y nobody needs xhat, and g stands in its place. Where z is given, the activation's
    derivative follows from it; else the activation's argument is computed again.
    """
    ACC: tl.constexpr = tl.float64 if e.double else tl.float32
    ACTIVATION: tl.constexpr = e.activation
    gradient = load_tile(dz, at, ACC)
    centred = gradient
    xhat = gradient
    if y.ptr is not None:
        centred = load_tile(y, at, ACC)
        centred = centred - load_vector(of_channels.mean, at.c, at.c_ok, ACC)[None, :]
        xhat = centred * invstd[None, :]
    if ACTIVATION is not None:
        if z.ptr is not None:
            u = load_tile(z, at, ACC)
        else:
            u = centred * scale[None, :]
            if of_channels.beta is not None:
                u = u + load_vector(of_channels.beta, at.c, at.c_ok, ACC)[None, :]
            if residual.ptr is not None:
                u = u + load_tile(residual, at, ACC)
        gradient = activate_backward(gradient, u, tl.full((), slope, ACC), ACTIVATION)
    return gradient, xhat


@triton.jit(do_not_specialize=["L", *STRIDES])
@no_type_check
def gradient_sums_kernel(
    dz_ptr, y_ptr, z_ptr, residual_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr, slots_ptr, slope: tl.float64, L,
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
    of_channels = Channels(None, mean_ptr, var_ptr, gamma_ptr, beta_ptr)
    invstd = tl.zeros((BLOCK_C,), ACC)
    scale = invstd
    if var_ptr is not None:
        invstd, scale = load_scale(of_channels, at, e)
        invstd = tl.where(invstd == float("inf"), 1.0, invstd)
    dz = PlaneTensor(dz_ptr, dz_stride_n, dz_stride_l, dz_stride_c, g.ALIGN)
    y = PlaneTensor(y_ptr, y_stride_n, y_stride_l, y_stride_c, g.ALIGN)
    z = PlaneTensor(z_ptr, z_stride_n, z_stride_l, z_stride_c, g.ALIGN)
    residual = PlaneTensor(residual_ptr, residual_stride_n, residual_stride_l, residual_stride_c, g.ALIGN)
    gradient, xhat = load_gradient(dz, y, z, residual, of_channels, invstd, scale, slope, at, e)
    slot = slots_ptr + at.number.to(tl.int64) * QUANTITIES * g.C + at.c
    tl.store(slot, tl.sum(tl.where(at.l_ok[:, None], gradient, 0.0), 0), mask=at.c_ok)
    if QUANTITIES == 2:
        tl.store(slot + g.C, tl.sum(tl.where(at.l_ok[:, None], gradient * xhat, 0.0), 0), mask=at.c_ok)


@triton.jit(do_not_specialize=["L", "rows", *STRIDES])
@no_type_check
def normalize_backward_kernel(
    dz_ptr, y_ptr, z_ptr, residual_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr, sum_g_ptr, sum_gx_ptr,
    total_ptr, dy_ptr, dresidual_ptr, slope: tl.float64, L, rows,
    dz_stride_n, dz_stride_l, dz_stride_c, y_stride_n, y_stride_l, y_stride_c,
    z_stride_n, z_stride_l, z_stride_c, residual_stride_n, residual_stride_l, residual_stride_c,
    dy_stride_n, dy_stride_l, dy_stride_c, dresidual_stride_n, dresidual_stride_l, dresidual_stride_c,
    g: tl.constexpr, e: tl.constexpr,
):  # fmt: skip
    """One tile of dy and dresidual, each if asked for; the sums [C] are given in training.

    g: PlaneGeometry; e: Finish.
    """
    ACC: tl.constexpr = tl.float64 if e.double else tl.float32
    at = locate_tile(L, g)
    of_channels = Channels(None, mean_ptr, var_ptr, gamma_ptr, beta_ptr)
    invstd, scale = load_scale(of_channels, at, e)
    dz = PlaneTensor(dz_ptr, dz_stride_n, dz_stride_l, dz_stride_c, g.ALIGN)
    y = PlaneTensor(y_ptr, y_stride_n, y_stride_l, y_stride_c, g.ALIGN)
    z = PlaneTensor(z_ptr, z_stride_n, z_stride_l, z_stride_c, g.ALIGN)
    residual = PlaneTensor(residual_ptr, residual_stride_n, residual_stride_l, residual_stride_c, g.ALIGN)
    gradient, xhat = load_gradient(dz, y, z, residual, of_channels, invstd, scale, slope, at, e)
    if dresidual_ptr is not None:
        dresidual = PlaneTensor(dresidual_ptr, dresidual_stride_n, dresidual_stride_l, dresidual_stride_c, g.ALIGN)
        tl.store(tile_pointers(dresidual, at), gradient.to(dresidual_ptr.dtype.element_ty), mask=at.mask)
    if dy_ptr is not None:
        if sum_g_ptr is not None:
            count = rows.to(ACC) if total_ptr is None else tl.load(total_ptr).to(ACC)
            mean_g = round_quotient(load_vector(sum_g_ptr, at.c, at.c_ok, ACC), count)
            mean_gx = round_quotient(load_vector(sum_gx_ptr, at.c, at.c_ok, ACC), count)
            gradient = gradient - mean_g[None, :] - xhat * mean_gx[None, :]
        dy = (gradient * scale[None, :]).to(dy_ptr.dtype.element_ty)
        dy_tensor = PlaneTensor(dy_ptr, dy_stride_n, dy_stride_l, dy_stride_c, g.ALIGN)
        tl.store(tile_pointers(dy_tensor, at), dy, mask=at.mask)


Shape = tuple[int, ...]


def strides(*operands: torch.Tensor | None) -> tuple[Shape | None, ...]:
    return tuple([None if t is None else t.stride() for t in operands])  # a generator would be entered once a tensor


def _finish(eps: float, activation: str | None, dtype: torch.dtype) -> Finish:
    return Finish(eps, activation, dtype == torch.float64)


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
        gradient_sums_kernel, planes.grid, slope, planes.units, *chain(*planes.strides),
        QUANTITIES=quantities, e=_finish(eps, activation, dtype), **planes.constants,
    )  # fmt: skip
    return run, dense((planes.tiles, quantities, planes.C), accumulator_dtype(dtype))


@launch.planned
def plan_backward(
    shape: Shape,
    strides: tuple[Shape | None, ...],
    like: Shape,
    dtype: torch.dtype,
    eps: float,
    activation: str | None,
    slope: float,
    need_dy: bool,
    need_dresidual: bool,
) -> tuple[launch.Launch[NormalizeBackwardOperands], Layout]:
    dy = dense(shape, dtype, dense_format(Layout(shape, like, dtype)))
    results = dy.strides if need_dy else None, dy.strides if need_dresidual else None
    planes = common_planes(shape, (*strides, *results), dtype)
    run = launch.Launch(
        normalize_backward_kernel, planes.grid, slope, planes.units, planes.rows, *chain(*planes.strides),
        e=_finish(eps, activation, dtype), **planes.constants,
    )  # fmt: skip
    return run, dy


def normalize_backward(
    dz: torch.Tensor,
    y: torch.Tensor | None,
    z: torch.Tensor | None,
    mean: torch.Tensor,
    var: torch.Tensor,
    gamma: torch.Tensor | None,
    beta: torch.Tensor | None,
    residual: torch.Tensor | None,
    eps: float,
    activation: str | None,
    slope: float,
    training: bool,
    needs: tuple[bool, bool, bool, bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """(dy, dgamma, dbeta, dresidual) of `normalize`, None where `needs` is false. `training`: mean and var are y's own.

    z, the result of normalize, spares the activations of FROM_OUTPUT computing their argument again; None is allowed.
    y may be None where xhat is not needed either: frozen statistics, no dgamma.
    dy and dresidual have y's dtype and memory format, dgamma and dbeta the dtypes of gamma and beta (without one: of
    mean). Without an activation dresidual is dz itself, not a copy.
    """
    need_dy, need_dgamma, need_dbeta, need_dresidual = needs
    dresidual = None
    if need_dresidual and activation is None:
        dresidual, need_dresidual = dz, False
    if activation not in FROM_OUTPUT or activation is None or (activation == "leaky_relu" and slope <= 0):
        z = None
    recompute = activation is not None and z is None
    given = dz if y is None else y
    like = given.stride()  # of which `mergeable` may make a copy of another format
    argument = mergeable(residual) if recompute else None
    dz, y, z = mergeable(dz), mergeable(y), mergeable(z)
    vectors: Any = contiguous(mean, var, gamma, beta)
    mean, var, gamma, beta = vectors

    sum_g = sum_gx = dgamma = dbeta = None
    need_sum_gx = need_dgamma or (training and need_dy)
    if need_sum_gx or need_dbeta:
        used = y if need_sum_gx or recompute else None
        run, layout = plan_sums(
            dz.shape, strides(dz, used, z, argument), dz.dtype, eps, activation, slope, 2 if need_sum_gx else 1
        )
        slots = memory.empty(layout, given)
        run(GradientSumsOperands(dz, used, z, argument, mean, var, gamma, beta, slots))
        # in training PyTorch allows no eps of 0, without which no invstd is infinite
        sum_g, sum_gx = combine_slots(slots) if training or not need_dgamma else combine_slots(slots, var, eps)
        if need_dgamma:
            assert sum_gx is not None
            dgamma = sum_gx.to((mean if gamma is None else gamma).dtype)
        if need_dbeta:
            dbeta = sum_g.to((mean if beta is None else beta).dtype)

    dy = None
    if need_dy or need_dresidual:
        sums = (sum_g, sum_gx) if training else (None, None)
        used = y if recompute or (training and need_dy) else None
        run, layout = plan_backward(
            dz.shape, strides(dz, used, z, argument), like, dz.dtype, eps, activation, slope, need_dy, need_dresidual
        )
        dy = memory.empty(layout, given) if need_dy else None
        own = memory.empty(layout, given) if need_dresidual else None
        run(NormalizeBackwardOperands(dz, used, z, argument, mean, var, gamma, beta, *sums, None, dy, own))
        dresidual = own if need_dresidual else dresidual
    return dy, dgamma, dbeta, dresidual


def channel_sum(dy: torch.Tensor) -> torch.Tensor:
    """The sum over all axes but channels of dy [N, C, *spatial]: [C], of dy's dtype. Zero if there are no rows."""
    dy = mergeable(dy)
    run, layout = plan_sums(dy.shape, strides(dy, None, None, None), dy.dtype, 0.0, None, 0.0, 1)
    slots = memory.empty(layout, dy)
    run(GradientSumsOperands(dy, None, None, None, None, None, None, None, slots))
    return combine_slots(slots)[0].to(dy.dtype)
