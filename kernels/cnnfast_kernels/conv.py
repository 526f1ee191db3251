"""Convolution: the one place that picks a family of kernels and a tile.

Tensors are of logical shape x [N, C, H, W], w [K, C / groups, R, S], y [N, K, P, Q], in any memory layout; `padding` is
(top, bottom, left, right). Arguments are taken to be consistent: cnnfast.functional checks what users pass. `tile`
replaces the choice for the direct kernels; im2col chooses for each piece of its workspace.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch

from . import launch
from .batchnorm import batch_moments, combine_moments
from .epilogue import PLAIN, Epilogue
from .gather.dgrad import dgrad
from .gather.fprop import fprop
from .gather.im2col import im2col_dgrad, im2col_fprop, im2col_wgrad
from .gather.wgrad import wgrad
from .problem import ConvProblem
from .tiling import Operation, Precision, TileConfig, cdiv, choose_tile, precision_class

Algorithm = Literal["auto", "direct", "im2col"]


class Geometry(NamedTuple):
    """How the filters move over the image."""

    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    dilation: tuple[int, int]
    groups: int

    def problem(self, x_shape: Sequence[int], w_shape: Sequence[int]) -> ConvProblem:
        return ConvProblem.of(tuple(x_shape), tuple(w_shape), *self)


def _plan(
    operation: Operation, problem: ConvProblem, tf32: bool, tile: TileConfig | None, *operands: torch.Tensor
) -> tuple[TileConfig, Precision]:
    precision = precision_class(str(operands[0].dtype).removeprefix("torch."), tf32)
    adjacent = all(t.stride(1) == 1 or t.shape[1] == 1 for t in operands)
    arch = launch.architecture(operands[0].device)
    return tile or choose_tile(problem, operation, precision, adjacent, arch), precision


def conv_fprop(
    x: torch.Tensor,
    w: torch.Tensor,
    geometry: Geometry,
    epilogue: Epilogue = PLAIN,
    *,
    algorithm: Algorithm = "auto",
    tf32: bool = False,
    tile: TileConfig | None = None,
) -> torch.Tensor:
    """What `epilogue` makes of conv(x, w), in one kernel (im2col: one for each piece of the workspace, and its copies)."""
    problem = geometry.problem(x.shape, w.shape)
    tile, precision = _plan("fprop", problem, tf32, tile, x, w)
    y = launch.empty((problem.N, problem.K, problem.P, problem.Q), x, launch.memory_format(x, w))
    if algorithm == "im2col":
        im2col_fprop(problem, precision, x, w, y, epilogue)
    else:
        fprop(problem, tile, precision, x, w, y, epilogue)
    return y


def conv_stats(
    x: torch.Tensor,
    w: torch.Tensor,
    geometry: Geometry,
    *,
    bias: torch.Tensor | None = None,
    algorithm: Algorithm = "auto",
    tf32: bool = False,
    tile: TileConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(y, mean [K], biased variance [K]): the convolution's kernel leaves the moments of its tiles, a small one combines them."""
    problem = geometry.problem(x.shape, w.shape)
    if algorithm == "im2col":
        y = conv_fprop(x, w, geometry, Epilogue(bias), algorithm=algorithm, tf32=tf32, tile=tile)
        return y, *batch_moments(y)
    tile, precision = _plan("fprop", problem, tf32, tile, x, w)
    pixels = problem.N * problem.P * problem.Q
    y = launch.empty((problem.N, problem.K, problem.P, problem.Q), x, launch.memory_format(x, w))
    moments = launch.empty((cdiv(pixels, tile.BLOCK_M), 2, problem.K), x, dtype=launch.accumulator_dtype(x.dtype))
    fprop(problem, tile, precision, x, w, y, Epilogue(bias), moments)
    return y, *combine_moments(moments, tile.BLOCK_M, pixels)


def conv_dgrad(
    dy: torch.Tensor,
    w: torch.Tensor,
    x_shape: Sequence[int],
    geometry: Geometry,
    *,
    bias: torch.Tensor | None = None,
    fmt: torch.memory_format = torch.contiguous_format,
    algorithm: Algorithm = "auto",
    tf32: bool = False,
    tile: TileConfig | None = None,
) -> torch.Tensor:
    """Gradient of sum(dy * conv(x, w)) with respect to x, plus `bias` [C]: the transposed convolution of dy."""
    problem = geometry.problem(x_shape, w.shape)
    tile, precision = _plan("dgrad", problem, tf32, tile, dy, w)
    dx = launch.empty(x_shape, dy, fmt)
    if algorithm == "im2col":
        im2col_dgrad(problem, precision, dy, w, dx, bias)
    else:
        dgrad(problem, tile, precision, dy, w, dx, bias)
    return dx


def conv_wgrad(
    x: torch.Tensor,
    dy: torch.Tensor,
    w_shape: Sequence[int],
    geometry: Geometry,
    *,
    fmt: torch.memory_format = torch.contiguous_format,
    algorithm: Algorithm = "auto",
    tf32: bool = False,
    tile: TileConfig | None = None,
) -> torch.Tensor:
    """Gradient of sum(dy * conv(x, w)) with respect to w."""
    problem = geometry.problem(x.shape, w_shape)
    tile, precision = _plan("wgrad", problem, tf32, tile, x, dy)
    dw = launch.empty(w_shape, x, fmt)
    if dy.numel() == 0 or x.numel() == 0:
        return dw.zero_()
    if algorithm == "im2col":
        im2col_wgrad(problem, precision, x, dy, dw)
    else:
        wgrad(problem, tile, precision, x, dy, dw)
    return dw
