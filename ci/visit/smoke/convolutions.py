"""Convolutions to try, by every family of kernels: forward with what may follow it, both gradients, by a matrix of
columns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cnnfast_kernels import devices
from cnnfast_kernels.choosing import default_tile
from cnnfast_kernels.conv import conv_dgrad, conv_fprop, conv_fprop_words, conv_stats, conv_wgrad
from cnnfast_kernels.epilogue import NO_NORM, BatchNorm, Epilogue
from cnnfast_kernels.layout import layout_of
from cnnfast_kernels.packed_tiles import choose_packed_tile
from cnnfast_kernels.questions import Geometry, Question, Tile, dgrad_question, fprop_question, wgrad_question
from cnnfast_kernels.tiling import choose_tile
from cnnfast_kernels.tma.tiles import candidate_boxes
from cnnfast_kernels.words import unpack_words

from .trial import HALF, LAST, NCHW, SINGLE, SmokeTrial, Tensors, integers


@dataclass(frozen=True)
class SmokeConvolution:
    """x [N, C, size, size + 1] and square filters, so that rows and columns cannot be taken for one another."""

    N: int
    C: int
    size: int
    K: int
    window: int
    stride: int = 1
    pad: int = 1
    dilation: int = 1
    groups: int = 1
    dtype: torch.dtype = HALF
    fmt: torch.memory_format = LAST

    def __str__(self) -> str:
        told = f"{self.N}x{self.C}x{self.size}x{self.size + 1} > {self.K}, {self.window}x{self.window}/{self.stride}"
        told += f" dilated {self.dilation}" * (self.dilation > 1) + f" groups {self.groups}" * (self.groups > 1)
        return f"{told} {str(self.dtype).removeprefix('torch.')}{' NCHW' * (self.fmt == NCHW)}"

    @property
    def geometry(self) -> Geometry:
        return Geometry((self.stride,) * 2, (self.pad,) * 4, (self.dilation,) * 2, self.groups)

    @property
    def x_shape(self) -> tuple[int, int, int, int]:
        return self.N, self.C, self.size, self.size + 1

    @property
    def w_shape(self) -> tuple[int, int, int, int]:
        return self.K, self.C // self.groups, self.window, self.window

    @property
    def y_shape(self) -> tuple[int, int, int, int]:
        g = self.geometry.problem(self.x_shape, self.w_shape)
        return g.N, g.K, g.P, g.Q

    def x(self, device: torch.device) -> Tensor:
        return integers(self.x_shape, 2, device, self.dtype, self.fmt)

    def w(self, device: torch.device) -> Tensor:
        return integers(self.w_shape, 1, device, self.dtype, self.fmt)

    def dy(self, device: torch.device) -> Tensor:
        return integers(self.y_shape, 1, device, self.dtype, self.fmt)

    def vector(self, device: torch.device, most: int = 3) -> Tensor:
        return integers((self.K,), most, device, SINGLE)

    def convolve(self, x: Tensor, w: Tensor) -> Tensor:
        return F.conv2d(x, w, None, self.stride, self.pad, self.dilation, self.groups)


def gather_tile(q: Question) -> Tile:
    """The tile that the kernels which load by pointers would choose by default."""
    return (
        default_tile(q)
        if q.problem.is_depthwise
        else choose_tile(q.problem, q.operation, q.precision, q.adjacent, q.gpu.arch)
    )


def packed_tile(q: Question) -> Tile:
    """The tile of the same kernels on a packed image."""
    return choose_packed_tile(*q.packed_how)


def box_tile(q: Question) -> Tile:
    """The first tile of the kernels that load by tensor maps."""
    return next(candidate_boxes(q.boxed, q.operation, q.activation, q.gpu.arch))


def row_tile(q: Question) -> Tile:
    """The first of them whose boxes are one long row."""
    tiles = candidate_boxes(q.boxed, q.operation, q.activation, q.gpu.arch)
    return next(tile for tile in tiles if tile.TILE_W == tile.pixels)


def split_tile(q: Question) -> Tile:
    """The default tile with the gradient in three partial sums, which a kernel of their own adds."""
    return replace(gather_tile(q), SPLIT_K=3)


ChooseTile = Callable[[Question], Tile]


def fprop(c: SmokeConvolution, tile: ChooseTile) -> SmokeTrial:
    """A convolution with everything that may follow: norm, addition, activation. The scale, weight / sqrt(var), is 2
    everywhere.
    """

    def ours(x: Tensor, w: Tensor, residual: Tensor, mean: Tensor, shift: Tensor) -> Tensors:
        gpu, fused = devices.gpu(x.device), {"residual_strides": residual.stride(), "activation": "relu"}
        q = fprop_question(layout_of(x), layout_of(w), c.geometry, gpu, statistics="norm", **fused)
        var, weight = torch.full_like(mean, 0.25), torch.ones_like(mean)
        epilogue = Epilogue(None, BatchNorm(mean, var, weight, shift, 0.0), residual, "relu")
        return (conv_fprop(x, w, c.geometry, epilogue, tile=tile(q)),)

    def exact(x: Tensor, w: Tensor, residual: Tensor, mean: Tensor, shift: Tensor) -> Tensors:
        mean, shift = mean.view(-1, 1, 1), shift.view(-1, 1, 1)
        return (torch.relu((c.convolve(x, w) - mean) * 2 + shift + residual),)

    return SmokeTrial(f"fprop {c}", lambda d: (c.x(d), c.w(d), c.dy(d), c.vector(d), c.vector(d, 2)), ours, exact)


def joined(c: SmokeConvolution, tile: ChooseTile) -> SmokeTrial:
    """The end of a residual block, which leaves its result and words of bits of it."""

    def ours(x: Tensor, w: Tensor, residual: Tensor) -> Tensors:
        gpu, fused = devices.gpu(x.device), {"residual_strides": residual.stride(), "activation": "relu"}
        q = fprop_question(layout_of(x), layout_of(w), c.geometry, gpu, **fused)
        z, words = conv_fprop_words(x, w, c.geometry, Epilogue(None, NO_NORM, residual, "relu"), tile=tile(q))
        return z, unpack_words(words, z)

    def exact(x: Tensor, w: Tensor, residual: Tensor) -> Tensors:
        z = torch.relu(c.convolve(x, w) + residual)
        return z, (z > 0).double()

    return SmokeTrial(f"joined {c}", lambda d: (c.x(d), c.w(d), c.dy(d)), ours, exact)


def stats(c: SmokeConvolution, tile: ChooseTile) -> SmokeTrial:
    """Mean and variance from the kernel's own moments: their sums are not of powers of two."""

    def ours(x: Tensor, w: Tensor) -> Tensors:
        q = fprop_question(layout_of(x), layout_of(w), c.geometry, devices.gpu(x.device), statistics="stats")
        return conv_stats(x, w, c.geometry, tile=tile(q))

    def exact(x: Tensor, w: Tensor) -> Tensors:
        y = c.convolve(x, w)
        var, mean = torch.var_mean(y, (0, 2, 3), unbiased=False)
        return y, mean, var

    return SmokeTrial(f"stats {c}", lambda d: (c.x(d), c.w(d)), ours, exact, tolerance=2.0**-18)


def dgrad(c: SmokeConvolution, tile: ChooseTile) -> SmokeTrial:
    def ours(dy: Tensor, w: Tensor) -> Tensors:
        q = dgrad_question(layout_of(dy), layout_of(w), c.x_shape, c.fmt, c.geometry, devices.gpu(dy.device))
        return (conv_dgrad(dy, w, c.x_shape, c.geometry, fmt=c.fmt, tile=tile(q)),)

    def exact(dy: Tensor, w: Tensor) -> Tensors:
        x = torch.zeros(c.x_shape, dtype=dy.dtype, requires_grad=True)
        return torch.autograd.grad(c.convolve(x, w), x, dy)

    return SmokeTrial(f"dgrad {c}", lambda d: (c.dy(d), c.w(d)), ours, exact)


def wgrad(c: SmokeConvolution, tile: ChooseTile) -> SmokeTrial:
    def ours(x: Tensor, dy: Tensor) -> Tensors:
        q = wgrad_question(layout_of(x), layout_of(dy), c.w_shape, c.fmt, c.geometry, devices.gpu(x.device))
        return (conv_wgrad(x, dy, c.w_shape, c.geometry, fmt=c.fmt, tile=tile(q)),)

    def exact(x: Tensor, dy: Tensor) -> Tensors:
        w = torch.zeros(c.w_shape, dtype=dy.dtype, requires_grad=True)
        return torch.autograd.grad(c.convolve(x, w), w, dy)

    return SmokeTrial(f"wgrad {c}", lambda d: (c.x(d), c.dy(d)), ours, exact)


def im2col(c: SmokeConvolution) -> SmokeTrial:
    """Forward and both gradients by im2col."""

    def ours(x: Tensor, w: Tensor, dy: Tensor) -> Tensors:
        how: dict[str, Any] = {"algorithm": "im2col"}
        y = conv_fprop(x, w, c.geometry, **how)
        dx = conv_dgrad(dy, w, c.x_shape, c.geometry, fmt=c.fmt, **how)
        return y, dx, conv_wgrad(x, dy, c.w_shape, c.geometry, fmt=c.fmt, **how)

    def exact(x: Tensor, w: Tensor, dy: Tensor) -> Tensors:
        x, w = x.requires_grad_(), w.requires_grad_()
        y = c.convolve(x, w)
        return y.detach(), *torch.autograd.grad(y, (x, w), dy)

    return SmokeTrial(f"im2col {c}", lambda d: (c.x(d), c.w(d), c.dy(d)), ours, exact)


BODY = SmokeConvolution(2, 32, 8, 64, 3)
RAGGED = SmokeConvolution(3, 17, 10, 9, 4, 2, 1, dtype=SINGLE)
GROUPED = SmokeConvolution(2, 24, 7, 12, 3, 1, 2, 2, 2, HALF, NCHW)
GENERAL = (BODY, RAGGED, GROUPED)
DEPTHWISE = (SmokeConvolution(2, 64, 9, 64, 3, groups=64), SmokeConvolution(1, 17, 11, 34, 5, 2, 2, 1, 17, SINGLE))
ONE_ROW = SmokeConvolution(3, 64, 7, 32, 1, 1, 0)  # of pixels
BOXES = (BODY, SmokeConvolution(1, 40, 11, 72, 3, 2, 1), ONE_ROW)
STEM = (SmokeConvolution(2, 3, 32, 16, 7, 2, 3), SmokeConvolution(1, 3, 19, 24, 3, 2, 1))
