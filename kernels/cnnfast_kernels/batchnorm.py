"""Batch normalisation: statistics, normalise-activate(-add), its derivatives, running statistics; and the sum over all
but channels.

    z = act((y - mean) * scale + bias + residual),  scale = weight * invstd,  invstd = 1 / sqrt(var + eps)

With g = dz * act'(u), u the argument of act, and xhat = (y - mean) * invstd, in training:

    dbias = sum g,  dweight = sum g * xhat,  dresidual = g,  dy = scale * (g - dbias / rows - xhat * dweight / rows)

with frozen statistics dy = scale * g. Sums over rows take two stages: every program reduces its tile into partials
[tiles, quantities, C], which partials.py combines. Everything is computed in float32, or float64 for float64 tensors.
"""

from __future__ import annotations

from itertools import chain
from typing import no_type_check

import torch
import triton
import triton.language as tl

from . import launch, memory
from .dtypes import KERNEL_DTYPES, accumulator_dtype
from .epilogue import FROM_OUTPUT, activate, activate_backward, tile_moments
from .layout import Laid, Layout, dense
from .partials import TileRows, combine
from .planes import common_planes, dense_format, load_channels, load_tile, locate_tile, mergeable, tile_pointers
from .rounding import round_quotient, round_root
from .tiling import cdiv

STRIDES = [f"{t}_stride_{d}" for t in ("y", "z", "residual", "dz", "dy", "dresidual") for d in "nlc"]

# ----------------------------------------------------------------------------------------------------------------------
# Statistics


@triton.jit(do_not_specialize=["L", *STRIDES])
@no_type_check
def batch_moments_kernel(
    y_ptr, partials_ptr, L, y_stride_n, y_stride_l, y_stride_c,
    C: tl.constexpr, ALIGN: tl.constexpr, L_ALIGN: tl.constexpr, ACC: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Mean and biased variance of one tile: partials [tiles, 2, C]."""
    tile, n, l, c, l_ok, c_ok = locate_tile(L, C, L_ALIGN, BLOCK_L, BLOCK_C)
    y = load_tile(y_ptr, y_stride_n, y_stride_l, y_stride_c, n, l, c, l_ok[:, None] & c_ok[None, :], ALIGN, ACC)
    mean, variance = tile_moments((y,), (l_ok,))
    row = partials_ptr + tile.to(tl.int64) * 2 * C + c
    tl.store(row, mean, mask=c_ok)
    tl.store(row + C, variance, mask=c_ok)


def combine_moments(
    partials: torch.Tensor, rows_per_partial: int, total_rows: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and biased variance [C] from partials [T, 2, C] of (mean, biased variance), float32 or float64.

    Partial t stands for rows [t, t + 1) * rows_per_partial of `total_rows`; the last one may be shorter.
    """
    if partials.shape[0] != cdiv(total_rows, rows_per_partial):
        raise ValueError(f"{partials.shape[0]} partials of {rows_per_partial} rows do not make {total_rows} rows")
    mean, var = combine(partials, TileRows(max(1, partials.shape[0]), total_rows, rows_per_partial))
    assert var is not None
    return mean, var


@launch.planned
def _plan_moments(shape, strides, dtype) -> tuple[launch.Launch, Layout, TileRows]:
    planes = common_planes(shape, (strides,), dtype)
    acc = accumulator_dtype(dtype)
    run = launch.Launch(
        batch_moments_kernel,
        planes.grid,
        planes.units,
        *planes.strides[0],
        ACC=KERNEL_DTYPES[acc],
        **planes.constants,
    )
    rows = TileRows(max(1, planes.tiles_l), planes.L, planes.tile.BLOCK_L)
    return run, dense((planes.tiles, 2, planes.C), acc), rows


def batch_moments(y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and biased variance [C] over all other axes of y [N, C, *spatial]; float32, or float64 for float64. NaN if
    there are no rows.
    """
    y = mergeable(y)
    run, layout, rows = _plan_moments(y.shape, y.stride(), y.dtype)
    partials = memory.empty(layout, y)
    run((y, partials))
    mean, var = combine(partials, rows)
    assert var is not None
    return mean, var


# ----------------------------------------------------------------------------------------------------------------------
# Forward


@triton.jit
@no_type_check
def load_scale(var_ptr, weight_ptr, c, c_ok, EPS: tl.constexpr, ACC: tl.constexpr):
    """(invstd, weight * invstd) of channels c."""
    invstd = round_quotient(1.0, round_root(load_channels(var_ptr, c, c_ok, ACC) + EPS))
    scale = invstd
    if weight_ptr is not None:
        scale = load_channels(weight_ptr, c, c_ok, ACC) * invstd
    return invstd, scale


@triton.jit
@no_type_check
def scale_and_shift(centred, scale, bias_ptr, c, c_ok, ACC: tl.constexpr):
    u = centred * scale[None, :]
    if bias_ptr is not None:
        u = u + load_channels(bias_ptr, c, c_ok, ACC)[None, :]
    return u


@triton.jit(do_not_specialize=["L", *STRIDES])
@no_type_check
def normalize_kernel(
    y_ptr, mean_ptr, var_ptr, weight_ptr, bias_ptr, residual_ptr, z_ptr, slope: tl.float64, L,
    y_stride_n, y_stride_l, y_stride_c, residual_stride_n, residual_stride_l, residual_stride_c, z_stride_n, z_stride_l, z_stride_c,
    EPS: tl.constexpr, ACTIVATION: tl.constexpr,
    C: tl.constexpr, ALIGN: tl.constexpr, L_ALIGN: tl.constexpr, ACC: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One tile of z."""
    _, n, l, c, l_ok, c_ok = locate_tile(L, C, L_ALIGN, BLOCK_L, BLOCK_C)
    mask = l_ok[:, None] & c_ok[None, :]
    y = load_tile(y_ptr, y_stride_n, y_stride_l, y_stride_c, n, l, c, mask, ALIGN, ACC)
    _, scale = load_scale(var_ptr, weight_ptr, c, c_ok, EPS, ACC)
    u = scale_and_shift(y - load_channels(mean_ptr, c, c_ok, ACC)[None, :], scale, bias_ptr, c, c_ok, ACC)
    if residual_ptr is not None:
        u = u + load_tile(
            residual_ptr, residual_stride_n, residual_stride_l, residual_stride_c, n, l, c, mask, ALIGN, ACC
        )
    z = activate(u, tl.full((), slope, ACC), ACTIVATION)
    tl.store(
        tile_pointers(z_ptr, z_stride_n, z_stride_l, z_stride_c, n, l, c, ALIGN),
        z.to(z_ptr.dtype.element_ty),
        mask=mask,
    )


def contiguous(*vectors: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """Vectors over channels as kernels read them: what is a slice or an expanded number becomes a copy."""
    for v in vectors:
        if v is not None and not v.is_contiguous():
            return tuple(None if v is None else v.contiguous() for v in vectors)
    return vectors


@launch.planned
def _plan_normalize(
    shape, y_strides, residual_strides, like, dtype, eps, activation, slope
) -> tuple[launch.Launch, Layout]:
    z = dense(shape, dtype, dense_format(Layout(shape, like, dtype)))
    planes = common_planes(shape, (y_strides, residual_strides, z.strides), dtype)
    run = launch.Launch(
        normalize_kernel, planes.grid, slope, planes.units, *chain(*planes.strides),
        EPS=eps, ACTIVATION=activation, ACC=KERNEL_DTYPES[accumulator_dtype(dtype)], **planes.constants,
    )  # fmt: skip
    return run, z


def normalize(
    y: torch.Tensor,
    mean: torch.Tensor,
    var: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    eps: float,
    activation: str | None,
    slope: float,
    out_like: Laid | None = None,
) -> torch.Tensor:
    """z = act((y - mean) * weight / sqrt(var + eps) + bias + residual), of y's dtype, in the memory format of
    `out_like`, by default y.

    Shapes: y and residual [N, C, *spatial] in any layouts, the others [C] of any floating dtypes.
    """
    like = (y if out_like is None else out_like).stride()
    y, residual = mergeable(y), mergeable(residual)
    run, layout = _plan_normalize(
        y.shape, y.stride(), None if residual is None else residual.stride(), like, y.dtype, eps, activation, slope
    )
    z = memory.empty(layout, y)
    run((y, *contiguous(mean, var, weight, bias), residual, z))
    return z


# ----------------------------------------------------------------------------------------------------------------------
# Backward


@triton.jit
@no_type_check
def load_gradient(
    dz_ptr, y_ptr, z_ptr, residual_ptr, mean_ptr, bias_ptr, invstd, scale, slope,
    dz_stride_n, dz_stride_l, dz_stride_c, y_stride_n, y_stride_l, y_stride_c,
    z_stride_n, z_stride_l, z_stride_c, residual_stride_n, residual_stride_l, residual_stride_c,
    n, l, c, l_ok, c_ok, ACTIVATION: tl.constexpr, ALIGN: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """(g, xhat) of a tile; without y (nobody asks for xhat then) xhat is g. The activation's argument is z, or computed
    again.
    """
    mask = l_ok[:, None] & c_ok[None, :]
    g = load_tile(dz_ptr, dz_stride_n, dz_stride_l, dz_stride_c, n, l, c, mask, ALIGN, ACC)
    centred = g
    xhat = g
    if y_ptr is not None:
        y = load_tile(y_ptr, y_stride_n, y_stride_l, y_stride_c, n, l, c, mask, ALIGN, ACC)
        centred = y - load_channels(mean_ptr, c, c_ok, ACC)[None, :]
        xhat = centred * invstd[None, :]
    if ACTIVATION is not None:
        if z_ptr is not None:
            u = load_tile(z_ptr, z_stride_n, z_stride_l, z_stride_c, n, l, c, mask, ALIGN, ACC)
        else:
            u = scale_and_shift(centred, scale, bias_ptr, c, c_ok, ACC)
            if residual_ptr is not None:
                u = u + load_tile(
                    residual_ptr, residual_stride_n, residual_stride_l, residual_stride_c, n, l, c, mask, ALIGN, ACC
                )
        g = activate_backward(g, u, tl.full((), slope, ACC), ACTIVATION)
    return g, xhat


@triton.jit(do_not_specialize=["L", *STRIDES])
@no_type_check
def gradient_sums_kernel(
    dz_ptr, y_ptr, z_ptr, residual_ptr, mean_ptr, var_ptr, weight_ptr, bias_ptr, partials_ptr, slope: tl.float64, L,
    dz_stride_n, dz_stride_l, dz_stride_c, y_stride_n, y_stride_l, y_stride_c,
    z_stride_n, z_stride_l, z_stride_c, residual_stride_n, residual_stride_l, residual_stride_c,
    EPS: tl.constexpr, ACTIVATION: tl.constexpr, QUANTITIES: tl.constexpr,
    C: tl.constexpr, ALIGN: tl.constexpr, L_ALIGN: tl.constexpr, ACC: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Sums of g and, of two QUANTITIES, of g * xhat over the rows of one tile: partials [tiles, QUANTITIES, C].

    A channel whose invstd is infinite (variance and eps 0) sums g * (y - mean) instead; the last level of `combine`
    multiplies that.
    """
    tile, n, l, c, l_ok, c_ok = locate_tile(L, C, L_ALIGN, BLOCK_L, BLOCK_C)
    invstd = tl.zeros((BLOCK_C,), ACC)
    scale = invstd
    if var_ptr is not None:
        invstd, scale = load_scale(var_ptr, weight_ptr, c, c_ok, EPS, ACC)
        invstd = tl.where(invstd == float("inf"), 1.0, invstd)
    g, xhat = load_gradient(
        dz_ptr, y_ptr, z_ptr, residual_ptr, mean_ptr, bias_ptr, invstd, scale, slope,
        dz_stride_n, dz_stride_l, dz_stride_c, y_stride_n, y_stride_l, y_stride_c,
        z_stride_n, z_stride_l, z_stride_c, residual_stride_n, residual_stride_l, residual_stride_c,
        n, l, c, l_ok, c_ok, ACTIVATION, ALIGN, ACC,
    )  # fmt: skip
    row = partials_ptr + tile.to(tl.int64) * QUANTITIES * C + c
    tl.store(row, tl.sum(tl.where(l_ok[:, None], g, 0.0), 0), mask=c_ok)
    if QUANTITIES == 2:
        tl.store(row + C, tl.sum(tl.where(l_ok[:, None], g * xhat, 0.0), 0), mask=c_ok)


@triton.jit(do_not_specialize=["L", "rows", *STRIDES])
@no_type_check
def normalize_backward_kernel(
    dz_ptr, y_ptr, z_ptr, residual_ptr, mean_ptr, var_ptr, weight_ptr, bias_ptr, sum_g_ptr, sum_gx_ptr, dy_ptr, dresidual_ptr,
    slope: tl.float64, L, rows,
    dz_stride_n, dz_stride_l, dz_stride_c, y_stride_n, y_stride_l, y_stride_c,
    z_stride_n, z_stride_l, z_stride_c, residual_stride_n, residual_stride_l, residual_stride_c,
    dy_stride_n, dy_stride_l, dy_stride_c, dresidual_stride_n, dresidual_stride_l, dresidual_stride_c,
    EPS: tl.constexpr, ACTIVATION: tl.constexpr,
    C: tl.constexpr, ALIGN: tl.constexpr, L_ALIGN: tl.constexpr, ACC: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One tile of dy and dresidual, each if asked for; the sums [C] are given in training."""
    _, n, l, c, l_ok, c_ok = locate_tile(L, C, L_ALIGN, BLOCK_L, BLOCK_C)
    mask = l_ok[:, None] & c_ok[None, :]
    invstd, scale = load_scale(var_ptr, weight_ptr, c, c_ok, EPS, ACC)
    g, xhat = load_gradient(
        dz_ptr, y_ptr, z_ptr, residual_ptr, mean_ptr, bias_ptr, invstd, scale, slope,
        dz_stride_n, dz_stride_l, dz_stride_c, y_stride_n, y_stride_l, y_stride_c,
        z_stride_n, z_stride_l, z_stride_c, residual_stride_n, residual_stride_l, residual_stride_c,
        n, l, c, l_ok, c_ok, ACTIVATION, ALIGN, ACC,
    )  # fmt: skip
    if dresidual_ptr is not None:
        pointers = tile_pointers(
            dresidual_ptr, dresidual_stride_n, dresidual_stride_l, dresidual_stride_c, n, l, c, ALIGN
        )
        tl.store(pointers, g.to(dresidual_ptr.dtype.element_ty), mask=mask)
    if dy_ptr is not None:
        if sum_g_ptr is not None:
            mean_g = round_quotient(load_channels(sum_g_ptr, c, c_ok, ACC), rows.to(ACC))
            mean_gx = round_quotient(load_channels(sum_gx_ptr, c, c_ok, ACC), rows.to(ACC))
            g = g - mean_g[None, :] - xhat * mean_gx[None, :]
        dy = (g * scale[None, :]).to(dy_ptr.dtype.element_ty)
        tl.store(tile_pointers(dy_ptr, dy_stride_n, dy_stride_l, dy_stride_c, n, l, c, ALIGN), dy, mask=mask)


def strides(*operands: torch.Tensor | None) -> tuple[tuple[int, ...] | None, ...]:
    return tuple(None if t is None else t.stride() for t in operands)


@launch.planned
def _plan_sums(shape, strides, dtype, eps, activation, slope, quantities) -> tuple[launch.Launch, Layout]:
    planes = common_planes(shape, strides, dtype)
    acc = accumulator_dtype(dtype)
    run = launch.Launch(
        gradient_sums_kernel, planes.grid, slope, planes.units, *chain(*planes.strides),
        QUANTITIES=quantities, EPS=eps, ACTIVATION=activation, ACC=KERNEL_DTYPES[acc], **planes.constants,
    )  # fmt: skip
    return run, dense((planes.tiles, quantities, planes.C), acc)


@launch.planned
def _plan_backward(
    shape, strides, like, dtype, eps, activation, slope, need_dy, need_dresidual
) -> tuple[launch.Launch, Layout]:
    dy = dense(shape, dtype, dense_format(Layout(shape, like, dtype)))
    results = dy.strides if need_dy else None, dy.strides if need_dresidual else None
    planes = common_planes(shape, (*strides, *results), dtype)
    run = launch.Launch(
        normalize_backward_kernel, planes.grid, slope, planes.units, planes.rows, *chain(*planes.strides),
        EPS=eps, ACTIVATION=activation, ACC=KERNEL_DTYPES[accumulator_dtype(dtype)], **planes.constants,
    )  # fmt: skip
    return run, dy


def normalize_backward(
    dz: torch.Tensor,
    y: torch.Tensor | None,
    z: torch.Tensor | None,
    mean: torch.Tensor,
    var: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    eps: float,
    activation: str | None,
    slope: float,
    training: bool,
    needs: tuple[bool, bool, bool, bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """(dy, dweight, dbias, dresidual) of `normalize`, None where `needs` is false. `training`: mean and var are y's
    own.

    z, the result of normalize, spares the activations of FROM_OUTPUT computing their argument again; None is allowed.
    y may be None where xhat is not needed either: frozen statistics, no dweight (dz stands in for it below).
    dy and dresidual have y's dtype and memory format, dweight and dbias the dtypes of weight and bias (without one: of
    mean). Without an activation dresidual is dz itself, not a copy.
    """
    need_dy, need_dweight, need_dbias, need_dresidual = needs
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
    mean, var, weight, bias = contiguous(mean, var, weight, bias)

    sum_g = sum_gx = None
    need_sum_gx = need_dweight or (training and need_dy)
    if need_sum_gx or need_dbias:
        used = y if need_sum_gx or recompute else None
        run, layout = _plan_sums(
            dz.shape, strides(dz, used, z, argument), dz.dtype, eps, activation, slope, 2 if need_sum_gx else 1
        )
        partials = memory.empty(layout, given)
        run((dz, used, z, argument, mean, var, weight, bias, partials))
        sum_g, sum_gx = combine(partials, None, *(() if training or not need_dweight else (var, eps)))

    dy = None
    if need_dy or need_dresidual:
        sums = (sum_g, sum_gx) if training else (None, None)
        used = y if recompute or (training and need_dy) else None
        run, layout = _plan_backward(
            dz.shape, strides(dz, used, z, argument), like, dz.dtype, eps, activation, slope, need_dy, need_dresidual
        )
        dy = memory.empty(layout, given) if need_dy else None
        own = memory.empty(layout, given) if need_dresidual else None
        run((dz, used, z, argument, mean, var, weight, bias, *sums, dy, own))
        dresidual = own if need_dresidual else dresidual

    dweight = sum_gx.to((mean if weight is None else weight).dtype) if need_dweight else None
    dbias = sum_g.to((mean if bias is None else bias).dtype) if need_dbias else None
    return dy, dweight, dbias, dresidual


def channel_sum(dy: torch.Tensor) -> torch.Tensor:
    """The sum over all axes but channels of dy [N, C, *spatial]: [C], of dy's dtype. Zero if there are no rows."""
    dy = mergeable(dy)
    run, layout = _plan_sums(dy.shape, strides(dy, None, None, None), dy.dtype, 0.0, None, 0.0, 1)
    partials = memory.empty(layout, dy)
    run((dy, *[None] * 7, partials))
    return combine(partials)[0].to(dy.dtype)


# ----------------------------------------------------------------------------------------------------------------------
# Running statistics


@triton.jit(do_not_specialize=["mean_stride", "var_stride", "count"])
@no_type_check
def update_running_kernel(
    running_mean_ptr, running_var_ptr, mean_ptr, var_ptr, momentum: tl.float64, mean_stride, var_stride, count,
    C: tl.constexpr, ACC: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_ok = c < C
    keep = tl.full((), 1.0 - momentum, ACC)
    take = tl.full((), momentum, ACC)
    unbiased = load_channels(var_ptr, c, c_ok, ACC) * round_quotient(count.to(ACC), (count - 1).to(ACC))
    running_mean = load_channels(running_mean_ptr, c * mean_stride, c_ok, ACC)
    running_var = load_channels(running_var_ptr, c * var_stride, c_ok, ACC)
    running_mean = keep * running_mean + take * load_channels(mean_ptr, c, c_ok, ACC)
    running_var = keep * running_var + take * unbiased
    tl.store(running_mean_ptr + c * mean_stride, running_mean.to(running_mean_ptr.dtype.element_ty), mask=c_ok)
    tl.store(running_var_ptr + c * var_stride, running_var.to(running_var_ptr.dtype.element_ty), mask=c_ok)


@launch.planned
def _plan_update(C, mean_stride, var_stride, momentum, count, wide) -> launch.Launch:
    return launch.Launch(
        update_running_kernel, (cdiv(C, 128),), momentum, mean_stride, var_stride, count,
        C=C, ACC=tl.float64 if wide else tl.float32, BLOCK_C=128, num_warps=4,
    )  # fmt: skip


def update_running(
    running_mean: torch.Tensor,
    running_var: torch.Tensor,
    mean: torch.Tensor,
    var: torch.Tensor,
    momentum: float,
    count: int,
) -> None:
    """In place running = (1 - momentum) * running + momentum * batch. All [C], of any floating dtypes.

    `var` is biased; running_var takes the unbiased var * count / (count - 1) of `count` rows, at least 2.
    """
    if count < 2:
        raise ValueError(f"the unbiased variance needs at least 2 values per channel, not {count}")
    wide = torch.float64 in (running_mean.dtype, mean.dtype)
    run = _plan_update(running_mean.shape[0], running_mean.stride(0), running_var.stride(0), momentum, count, wide)
    run((running_mean, running_var, *contiguous(mean, var)))
