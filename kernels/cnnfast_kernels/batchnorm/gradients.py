"""The derivatives of normalise-activate(-add).

With g = dz * act'(u), u the argument of act, and xhat = (y - mean) * invstd, in training:

    dbeta = sum g,  dgamma = sum g * xhat,  dresidual = g,  dy = scale * (g - dbeta / rows - xhat * dgamma / rows)

with frozen statistics dy = scale * g, without any dy = g.
"""

from __future__ import annotations

from itertools import chain
from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl

from .. import launch, memory
from ..activations import FROM_OUTPUT
from ..dtypes import accumulator_dtype
from ..epilogue import Channels, finish_of
from ..layout import Layout, dense
from ..moments import combine_slots
from ..planes import (
    PlaneTensor,
    common_planes,
    contiguous,
    dense_format,
    load_vector,
    locate_tile,
    mergeable,
    tile_pointers,
)
from ..rounding import round_quotient
from .channels import load_scale
from .masked import masked_gradient
from .sums import GradientSumsOperands, Shape, load_gradient, plan_sums, strides

STRIDES = [f"{t}_stride_{d}" for t in ("dz", "y", "z", "residual", "dy", "dresidual") for d in "nlc"]


class NormalizeBackwardOperands(NamedTuple):
    """Those of GradientSumsOperands, and in training the sums of g and of g * xhat, [C], over so many rows as `total`
    [1] says, by default dz's; the results dy and dresidual are of dz's shape.
    """

    dz: torch.Tensor
    y: torch.Tensor | None
    z: torch.Tensor | None
    residual: torch.Tensor | None
    mean: torch.Tensor | None
    var: torch.Tensor | None
    gamma: torch.Tensor | None
    beta: torch.Tensor | None
    sum_g: torch.Tensor | None
    sum_gx: torch.Tensor | None
    total: torch.Tensor | None
    dy: torch.Tensor | None
    dresidual: torch.Tensor | None
    slots: torch.Tensor | None = None  # [tiles, 1, C], if the sums of g are to come from the same pass


@triton.jit(do_not_specialize=["L", "rows", *STRIDES])
@no_type_check
def normalize_backward_kernel(
    dz_ptr, y_ptr, z_ptr, residual_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr, sum_g_ptr, sum_gx_ptr,
    total_ptr, dy_ptr, dresidual_ptr, slots_ptr, L, rows,
    dz_stride_n, dz_stride_l, dz_stride_c, y_stride_n, y_stride_l, y_stride_c,
    z_stride_n, z_stride_l, z_stride_c, residual_stride_n, residual_stride_l, residual_stride_c,
    dy_stride_n, dy_stride_l, dy_stride_c, dresidual_stride_n, dresidual_stride_l, dresidual_stride_c,
    g: tl.constexpr, e: tl.constexpr,
):  # fmt: skip
    """One tile of dy and dresidual, each if asked for, and its slot in slots [tiles, 1, C], if there are any: the sums
    of g over its rows. The sums [C] of all tiles are given in training.

    g: PlaneGeometry; e: Finish.
    """
    ACC: tl.constexpr = tl.float64 if e.double else tl.float32
    at = locate_tile(L, g)
    of_channels = Channels(None, mean_ptr, var_ptr, gamma_ptr, beta_ptr, None)
    invstd = None
    scale = None
    if var_ptr is not None:
        invstd, scale = load_scale(of_channels, at, e)
    dz = PlaneTensor(dz_ptr, dz_stride_n, dz_stride_l, dz_stride_c, g.ALIGN)
    y = PlaneTensor(y_ptr, y_stride_n, y_stride_l, y_stride_c, g.ALIGN)
    z = PlaneTensor(z_ptr, z_stride_n, z_stride_l, z_stride_c, g.ALIGN)
    residual = PlaneTensor(residual_ptr, residual_stride_n, residual_stride_l, residual_stride_c, g.ALIGN)
    gradient, xhat = load_gradient(dz, y, z, residual, of_channels, invstd, scale, at, e)
    if slots_ptr is not None:
        slot = slots_ptr + at.number.to(tl.int64) * g.C + at.c
        tl.store(slot, tl.sum(tl.where(at.l_ok[:, None], gradient, 0.0), 0), mask=at.c_ok)
    if dresidual_ptr is not None:
        dresidual = PlaneTensor(dresidual_ptr, dresidual_stride_n, dresidual_stride_l, dresidual_stride_c, g.ALIGN)
        tl.store(tile_pointers(dresidual, at), gradient.to(dresidual_ptr.dtype.element_ty), mask=at.mask)
    if dy_ptr is not None:
        if sum_g_ptr is not None:
            count = rows.to(ACC) if total_ptr is None else tl.load(total_ptr).to(ACC)
            mean_g = round_quotient(load_vector(sum_g_ptr, at.c, at.c_ok, ACC), count)
            mean_gx = round_quotient(load_vector(sum_gx_ptr, at.c, at.c_ok, ACC), count)
            gradient = gradient - mean_g[None, :] - xhat * mean_gx[None, :]
        if var_ptr is not None:
            gradient = gradient * scale[None, :]
        dy_tensor = PlaneTensor(dy_ptr, dy_stride_n, dy_stride_l, dy_stride_c, g.ALIGN)
        tl.store(tile_pointers(dy_tensor, at), gradient.to(dy_ptr.dtype.element_ty), mask=at.mask)


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
) -> tuple[launch.Launch[NormalizeBackwardOperands], Layout, Layout]:
    """The launch, the layout of dy and dresidual, and that of the slots, if it shall leave sums."""
    dy = dense(shape, dtype, dense_format(Layout(shape, like, dtype)))
    results = dy.strides if need_dy else None, dy.strides if need_dresidual else None
    planes = common_planes(shape, (*strides, *results), dtype)
    run = launch.Launch(
        normalize_backward_kernel, planes.grid, planes.units, planes.rows, *chain(*planes.strides),
        e=finish_of(dtype, eps, activation, slope), **planes.constants,
    )  # fmt: skip
    return run, dy, dense((planes.tiles, 1, planes.C), accumulator_dtype(dtype))


def normalize_backward(
    dz: torch.Tensor,
    y: torch.Tensor | None,
    z: torch.Tensor | None,
    mean: torch.Tensor | None,
    var: torch.Tensor | None,
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

    z, the result of normalize, spares the activations of FROM_OUTPUT computing their argument again; without it, None,
    every gradient has the same bits, and where there is no residual a tensor less is read.
    y may be None where xhat is not needed either: frozen statistics or none, no dgamma.
    dy and dresidual have y's dtype and memory format, dgamma and dbeta the dtypes of gamma and beta (without one: of
    mean, or of dz). Without an activation dresidual is dz itself, not a copy. Raises ValueError for prelu, whose
    gradient, and that of its slopes, is left to PyTorch.
    """
    if activation == "prelu":
        raise ValueError(
            "normalize_backward(): prelu has no gradient here: apply PyTorch's prelu to the result instead"
        )
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
    mean, var, gamma, beta = contiguous(mean, var, gamma, beta)
    of = dz if mean is None else mean

    sum_g = sum_gx = dgamma = None
    need_sum_gx = need_dgamma or (training and need_dy)
    # Where dy needs no sums, dbeta comes from the pass that computes dy.
    of_one_pass = need_dbeta and not need_sum_gx and (need_dy or need_dresidual)
    if need_sum_gx or (need_dbeta and not of_one_pass):
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
            dgamma = sum_gx.to((of if gamma is None else gamma).dtype)

    dy = None
    if need_dy or need_dresidual:
        sums = (sum_g, sum_gx) if training else (None, None)
        used = y if recompute or (training and need_dy) else None
        run, layout, of_slots = plan_backward(
            dz.shape, strides(dz, used, z, argument), like, dz.dtype, eps, activation, slope, need_dy, need_dresidual
        )
        dy = memory.empty(layout, given) if need_dy else None
        own = memory.empty(layout, given) if need_dresidual else None
        slots = memory.empty(of_slots, given) if of_one_pass else None
        run(NormalizeBackwardOperands(dz, used, z, argument, mean, var, gamma, beta, *sums, None, dy, own, slots))
        if slots is not None:
            sum_g = combine_slots(slots)[0]
        dresidual = own if need_dresidual else dresidual

    dbeta = None
    if need_dbeta:
        assert sum_g is not None
        dbeta = sum_g.to((of if beta is None else beta).dtype)
    return dy, dgamma, dbeta, dresidual


def activation_backward(
    dz: torch.Tensor,
    z: torch.Tensor | None,
    activation: str | None,
    slope: float,
    words: torch.Tensor | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """(dz * act', its sum over all axes but channels [C] in float32, or float64 for float64), where act' can be told
    from the result z, or, where they are given, from its words of bits (words.py), and z is not read. Without an
    activation the gradient is dz itself, and None is returned in its place.

    Raises ValueError where words do not fit dz, or do not tell act'.
    """
    if activation is None:
        dz = mergeable(dz)
        run, layout = plan_sums(dz.shape, strides(dz, None, None, None), dz.dtype, 0.0, None, 0.0, 1)
        slots = memory.empty(layout, dz)
        run(GradientSumsOperands(dz, None, None, None, None, None, None, None, slots))
        return None, combine_slots(slots)[0]
    if words is not None:
        g, sums = masked_gradient(dz, words, activation, slope, sums=True)
        assert sums is not None
        return g, sums
    like, dz, z = dz.stride(), mergeable(dz), mergeable(z)
    of = strides(dz, None, z, None)
    run, layout, of_slots = plan_backward(dz.shape, of, like, dz.dtype, 0.0, activation, slope, True, False)
    g, slots = memory.empty(layout, dz), memory.empty(of_slots, dz)
    nothing = None, None, None, None, None, None, None, None
    run(NormalizeBackwardOperands(dz, None, z, *nothing, g, None, slots))
    return g, combine_slots(slots)[0]
