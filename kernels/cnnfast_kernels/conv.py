"""Convolution: forward and gradients, by the family of kernels and the tile that choosing.py picks.

Tensors are of logical shape x [N, C, H, W], w [K, C / groups, R, S], y [N, K, P, Q], in any memory layout; `padding` is
(top, bottom, left, right). Arguments are taken to be consistent: cnnfast.functional checks what users pass. `tile`
replaces the choice for the direct kernels, and its type tells the family; im2col chooses for each piece of its
workspace.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Literal

import torch

from . import launch, memory
from .batchnorm import batch_moments, contiguous, pack_words
from .dgrad_plans import DgradPlan
from .dtypes import accumulator_dtype
from .epilogue import PLAIN, BatchNorm, Epilogue
from .fprop_plans import FpropPlan
from .gather.depthwise.tiles import StripTile
from .gather.depthwise.wgrad import plan_depthwise_wgrad
from .gather.im2col import im2col_dgrad, im2col_fprop, im2col_wgrad
from .gather.stem import plan_stem_wgrad
from .gather.wgrad import plan_wgrad
from .gradient_epilogue import NO_EPILOGUE, GradientEpilogue, check_gradient_epilogue
from .gradient_passes import apply_epilogue, sum_gradient
from .keys import DgradKey, FpropKey, WgradKey, dgrad_key, fprop_key, wgrad_key
from .layout import convolution_format
from .operands import WgradOperands
from .packing import PackedWgradLaunches
from .plans import ConvolutionPlan
from .questions import Geometry, Tile, precision_of
from .slots import WgradLaunches
from .tiling import PackedTile
from .tma.stem import plan_tma_stem_wgrad
from .tma.tiles import BoxTile
from .tma.wgrad import plan_tma_wgrad

Algorithm = Literal["auto", "direct", "im2col"]

# ----------------------------------------------------------------------------------------------------------------------
# Plans: all of a call but its tensors


class WgradPlan(ConvolutionPlan):
    @cached_property
    def prepared(self) -> WgradLaunches | PackedWgradLaunches:
        q, tile = self.question, self.tile
        if isinstance(tile, StripTile):
            return plan_depthwise_wgrad(q.problem, tile, q.x, q.y, q.w)
        if isinstance(tile, BoxTile):
            plan = plan_tma_stem_wgrad if q.packed else plan_tma_wgrad
            return plan(q.problem, tile, q.x, q.y, q.w)
        if isinstance(tile, PackedTile):
            return plan_stem_wgrad(q.problem, tile, q.precision, q.x, q.y, q.w)
        return plan_wgrad(q.problem, tile, q.precision, q.x, q.y, q.w)

    def run(self, x: torch.Tensor, dy: torch.Tensor) -> torch.Tensor:
        dw = memory.empty(self.result, x)
        if dy.numel() == 0 or x.numel() == 0:
            return dw.zero_()
        self.prepared(WgradOperands(x, dy, dw))
        return dw


fprop_plan: Callable[[FpropKey], FpropPlan] = launch.planned(FpropPlan)
dgrad_plan: Callable[[DgradKey], DgradPlan] = launch.planned(DgradPlan)
wgrad_plan: Callable[[WgradKey], WgradPlan] = launch.planned(WgradPlan)

# ----------------------------------------------------------------------------------------------------------------------
# Calls


def conv_fprop(
    x: torch.Tensor,
    w: torch.Tensor,
    geometry: Geometry,
    epilogue: Epilogue = PLAIN,
    *,
    algorithm: Algorithm = "auto",
    tf32: bool = False,
    tile: Tile | None = None,
) -> torch.Tensor:
    """What `epilogue` makes of conv(x, w), in one kernel. By im2col it takes one, and a copy, for each piece of the
    workspace.
    """
    if algorithm != "im2col":
        return fprop_plan(fprop_key(x, w, geometry, epilogue, False, tf32, tile)).run(x, w, epilogue)
    g = geometry.problem(x.shape, w.shape)
    y = memory.empty((g.N, g.K, g.P, g.Q), x, convolution_format(x, w))
    bias, norm, residual, activation, slope, slopes = epilogue
    bias, mean, var, gamma, beta, slopes = contiguous(bias, *norm[:4], slopes)
    epilogue = Epilogue(bias, BatchNorm(mean, var, gamma, beta, norm.eps), residual, activation, slope, slopes)
    im2col_fprop(g, precision_of(x.dtype, tf32), x, w, y, epilogue)
    return y


def conv_fprop_words(
    x: torch.Tensor,
    w: torch.Tensor,
    geometry: Geometry,
    epilogue: Epilogue = PLAIN,
    *,
    algorithm: Algorithm = "auto",
    tf32: bool = False,
    tile: Tile | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(z, its words of bits [ceil(N * P * Q / 32), K], see words.py) of what `epilogue` makes of conv(x, w). The kernel
    of a 1x1 convolution of channels_last images in half precision leaves both; elsewhere the words are a pass of their
    own over z.
    """
    if algorithm == "im2col":
        z = conv_fprop(x, w, geometry, epilogue, algorithm=algorithm, tf32=tf32)
        return z, pack_words(z)
    return fprop_plan(fprop_key(x, w, geometry, epilogue, False, tf32, tile, True)).run_with_words(x, w, epilogue)


def conv_stats(
    x: torch.Tensor,
    w: torch.Tensor,
    geometry: Geometry,
    *,
    bias: torch.Tensor | None = None,
    algorithm: Algorithm = "auto",
    tf32: bool = False,
    tile: Tile | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(y, mean [K], biased variance [K]). By im2col the statistics are a pass of their own over y."""
    if algorithm == "im2col":
        y = conv_fprop(x, w, geometry, Epilogue(bias), algorithm=algorithm, tf32=tf32)
        return y, *batch_moments(y)
    return fprop_plan(fprop_key(x, w, geometry, PLAIN, True, tf32, tile)).run_with_statistics(x, w, bias)


def conv_dgrad(
    dy: torch.Tensor,
    w: torch.Tensor,
    x_shape: Sequence[int],
    geometry: Geometry,
    epilogue: GradientEpilogue = NO_EPILOGUE,
    *,
    bias: torch.Tensor | None = None,
    fmt: torch.memory_format = torch.contiguous_format,
    algorithm: Algorithm = "auto",
    tf32: bool = False,
    tile: Tile | None = None,
) -> torch.Tensor:
    """Gradient of sum(dy * conv(x, w)) with respect to x, plus `bias` [C]: the transposed convolution of dy; and what
    `epilogue` makes of it. Raises ValueError where the epilogue does not fit x.
    """
    if algorithm != "im2col":
        return dgrad_plan(dgrad_key(dy, w, x_shape, fmt, geometry, tf32, tile, epilogue)).run(dy, w, bias, epilogue)
    if epilogue is not NO_EPILOGUE:
        check_gradient_epilogue(epilogue, x_shape, dy.dtype, False)
    dx = memory.empty(x_shape, dy, fmt)
    (bias,) = contiguous(bias)
    im2col_dgrad(geometry.problem(x_shape, w.shape), precision_of(dy.dtype, tf32), dy, w, dx, bias)
    return apply_epilogue(dx, epilogue)


def conv_dgrad_sums(
    dy: torch.Tensor,
    w: torch.Tensor,
    x_shape: Sequence[int],
    geometry: Geometry,
    epilogue: GradientEpilogue,
    *,
    fmt: torch.memory_format = torch.contiguous_format,
    algorithm: Algorithm = "auto",
    tf32: bool = False,
    tile: Tile | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(g, the sum of g [C], the sum of g * xhat [C] or, without y, None) of what `epilogue` makes of the gradient with
    respect to x: those of the rounded g, in the accumulator's dtype. xhat is (y - mean) / sqrt(var + eps), without a
    norm y. The first sum is the gradient of beta, and the second that of gamma. By im2col the sums are passes of their
    own over g.
    """
    if algorithm != "im2col":
        key = dgrad_key(dy, w, x_shape, fmt, geometry, tf32, tile, epilogue, True)
        return dgrad_plan(key).run_with_sums(dy, w, None, epilogue)
    check_gradient_epilogue(epilogue, x_shape, dy.dtype, True)
    dx = conv_dgrad(dy, w, x_shape, geometry, fmt=fmt, algorithm=algorithm, tf32=tf32)
    g = apply_epilogue(dx, epilogue)
    return g, *sum_gradient(g, epilogue)


def conv_wgrad(
    x: torch.Tensor,
    dy: torch.Tensor,
    w_shape: Sequence[int],
    geometry: Geometry,
    *,
    fmt: torch.memory_format = torch.contiguous_format,
    algorithm: Algorithm = "auto",
    tf32: bool = False,
    tile: Tile | None = None,
    wide: bool = False,
) -> torch.Tensor:
    """Gradient of sum(dy * conv(x, w)) with respect to w. wide: in the dtype of its sums, not in that of x."""
    if algorithm != "im2col":
        return wgrad_plan(wgrad_key(x, dy, w_shape, fmt, geometry, tf32, tile, wide)).run(x, dy)
    dw = memory.empty(w_shape, x, fmt, accumulator_dtype(x.dtype) if wide else None)
    if dy.numel() == 0 or x.numel() == 0:
        return dw.zero_()
    im2col_wgrad(geometry.problem(x.shape, w_shape), precision_of(x.dtype, tf32), x, dy, dw)
    return dw
