"""The families of kernels, and for each a few calls on a small problem and on a ragged one: what the smoke part runs.

Operands are small integers, so that every sum is exact in any order and every result fits the dtype: ours must equal PyTorch's float64 to
the bit. Where a mean is taken that is not of a power of two, the trial says how far off it may be. A test holds that every kernel of the
package belongs to a family.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cnnfast_kernels import batchnorm, launch, pooling
from cnnfast_kernels.choosing import Geometry, Question, Tile, ask_dgrad, ask_fprop, ask_wgrad, default_tile
from cnnfast_kernels.conv import conv_dgrad, conv_fprop, conv_stats, conv_wgrad
from cnnfast_kernels.epilogue import BatchNorm, Epilogue
from cnnfast_kernels.problem import PoolProblem
from cnnfast_kernels.tiling import choose_tile
from cnnfast_kernels.tma.tiles import candidate_boxes

Tensors = tuple[Tensor, ...]
LAST, NCHW = torch.channels_last, torch.contiguous_format
HALF, SINGLE = torch.bfloat16, torch.float32


@dataclass(frozen=True)
class Trial:
    """One call: `ours` of the operands on the GPU, `exact` of the same in float64 on the CPU. Results may differ by `tolerance`, relative
    to the largest of them."""

    name: str
    operands: Callable[[torch.device], Tensors]
    ours: Callable[..., Tensors]
    exact: Callable[..., Tensors]
    tolerance: float = 0.0


@dataclass(frozen=True)
class Family:
    """`kernels` are the names of those that the trials launch and that no other family answers for."""

    kernels: tuple[str, ...]
    trials: tuple[Trial, ...]
    tensor_maps: bool = False


def integers(shape: tuple[int, ...], most: int, device: torch.device, dtype: torch.dtype, fmt: torch.memory_format = NCHW) -> Tensor:
    """From -most to most, the same for a shape in every run."""
    if device.type == "meta":
        return torch.empty(shape, dtype=dtype, device=device, memory_format=fmt)
    numbers = torch.randint(-most, most + 1, shape, generator=torch.Generator().manual_seed(sum(shape)))
    return numbers.to(device, dtype).contiguous(memory_format=fmt)


# ----------------------------------------------------------------------------------------------------------------------
# Convolutions


@dataclass(frozen=True)
class Convolution:
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
    """Of the kernels that load by pointers, whoever would serve by default."""
    return default_tile(q) if q.problem.is_depthwise else choose_tile(q.problem, q.operation, q.precision, q.adjacent, q.gpu.arch)


def box_tile(q: Question) -> Tile:
    """The first of the kernels that load by tensor maps."""
    return next(candidate_boxes(q.boxed, q.operation, q.activation, q.gpu.arch))


def split_tile(q: Question) -> Tile:
    """The same with three partial sums of the gradient, which a kernel of their own adds."""
    return replace(gather_tile(q), SPLIT_K=3)


ChooseTile = Callable[[Question], Tile]


def fprop(c: Convolution, tile: ChooseTile) -> Trial:
    """With everything that may follow: norm, addition, activation. Its scale, weight / sqrt(var), is 2 everywhere."""

    def ours(x: Tensor, w: Tensor, residual: Tensor, mean: Tensor, shift: Tensor) -> Tensors:
        q = ask_fprop(launch.layout(x), launch.layout(w), residual.stride(), c.geometry, "norm", "relu", False, launch.gpu(x.device), True)
        var, weight = torch.full_like(mean, 0.25), torch.ones_like(mean)
        epilogue = Epilogue(None, BatchNorm(mean, var, weight, shift, 0.0), residual, "relu")
        return (conv_fprop(x, w, c.geometry, epilogue, tile=tile(q)),)

    def exact(x: Tensor, w: Tensor, residual: Tensor, mean: Tensor, shift: Tensor) -> Tensors:
        mean, shift = mean.view(-1, 1, 1), shift.view(-1, 1, 1)
        return (torch.relu((c.convolve(x, w) - mean) * 2 + shift + residual),)

    return Trial(f"fprop {c}", lambda d: (c.x(d), c.w(d), c.dy(d), c.vector(d), c.vector(d, 2)), ours, exact)


def stats(c: Convolution, tile: ChooseTile) -> Trial:
    """Mean and variance from the kernel's own moments: their sums are not of powers of two."""

    def ours(x: Tensor, w: Tensor) -> Tensors:
        q = ask_fprop(launch.layout(x), launch.layout(w), None, c.geometry, "stats", None, False, launch.gpu(x.device), True)
        return conv_stats(x, w, c.geometry, tile=tile(q))

    def exact(x: Tensor, w: Tensor) -> Tensors:
        y = c.convolve(x, w)
        var, mean = torch.var_mean(y, (0, 2, 3), unbiased=False)
        return y, mean, var

    return Trial(f"stats {c}", lambda d: (c.x(d), c.w(d)), ours, exact, tolerance=2.0**-18)


def dgrad(c: Convolution, tile: ChooseTile) -> Trial:
    def ours(dy: Tensor, w: Tensor) -> Tensors:
        q = ask_dgrad(launch.layout(dy), launch.layout(w), c.x_shape, c.fmt, c.geometry, False, launch.gpu(dy.device), True)
        return (conv_dgrad(dy, w, c.x_shape, c.geometry, fmt=c.fmt, tile=tile(q)),)

    def exact(dy: Tensor, w: Tensor) -> Tensors:
        x = torch.zeros(c.x_shape, dtype=dy.dtype, requires_grad=True)
        return torch.autograd.grad(c.convolve(x, w), x, dy)

    return Trial(f"dgrad {c}", lambda d: (c.dy(d), c.w(d)), ours, exact)


def wgrad(c: Convolution, tile: ChooseTile) -> Trial:
    def ours(x: Tensor, dy: Tensor) -> Tensors:
        q = ask_wgrad(launch.layout(x), launch.layout(dy), c.w_shape, c.fmt, c.geometry, False, launch.gpu(x.device), True)
        return (conv_wgrad(x, dy, c.w_shape, c.geometry, fmt=c.fmt, tile=tile(q)),)

    def exact(x: Tensor, dy: Tensor) -> Tensors:
        w = torch.zeros(c.w_shape, dtype=dy.dtype, requires_grad=True)
        return torch.autograd.grad(c.convolve(x, w), w, dy)

    return Trial(f"wgrad {c}", lambda d: (c.x(d), c.dy(d)), ours, exact)


def im2col(c: Convolution) -> Trial:
    """All three operations by a matrix of columns."""

    def ours(x: Tensor, w: Tensor, dy: Tensor) -> Tensors:
        how: dict[str, Any] = {"algorithm": "im2col"}
        y = conv_fprop(x, w, c.geometry, **how)
        dx = conv_dgrad(dy, w, c.x_shape, c.geometry, fmt=c.fmt, **how)
        return y, dx, conv_wgrad(x, dy, c.w_shape, c.geometry, fmt=c.fmt, **how)

    def exact(x: Tensor, w: Tensor, dy: Tensor) -> Tensors:
        x, w = x.requires_grad_(), w.requires_grad_()
        y = c.convolve(x, w)
        return y.detach(), *torch.autograd.grad(y, (x, w), dy)

    return Trial(f"im2col {c}", lambda d: (c.x(d), c.w(d), c.dy(d)), ours, exact)


BODY = Convolution(2, 32, 8, 64, 3)
RAGGED = Convolution(3, 17, 10, 9, 4, 2, 1, dtype=SINGLE)
GROUPED = Convolution(2, 24, 7, 12, 3, 1, 2, 2, 2, HALF, NCHW)
GENERAL = (BODY, RAGGED, GROUPED)
DEPTHWISE = (Convolution(2, 64, 9, 64, 3, groups=64), Convolution(1, 17, 11, 34, 5, 2, 2, 1, 17, SINGLE))
BOXES = (BODY, Convolution(1, 40, 11, 72, 3, 2, 1), Convolution(3, 64, 7, 32, 1, 1, 0))  # the last is one row of pixels
STEM = (Convolution(2, 3, 32, 16, 7, 2, 3), Convolution(1, 3, 19, 24, 3, 2, 1))


# ----------------------------------------------------------------------------------------------------------------------
# Batch norm: scale, weight / sqrt(var), is a power of two


def moments(shape: tuple[int, ...], dtype: torch.dtype, fmt: torch.memory_format) -> Trial:
    count = shape[0] * shape[2] * shape[3]

    def ours(y: Tensor) -> Tensors:
        mean, var = batchnorm.batch_moments(y)
        running_mean, running_var = torch.zeros_like(mean), torch.ones_like(var)
        batchnorm.update_running(running_mean, running_var, mean, var, 0.5, count)
        return mean, var, running_mean, running_var

    def exact(y: Tensor) -> Tensors:
        var, mean = torch.var_mean(y, (0, 2, 3), unbiased=False)
        return mean, var, mean / 2, 0.5 + var * count / (count - 1) / 2

    return Trial(f"moments {shape}", lambda d: (integers(shape, 8, d, dtype, fmt),), ours, exact, tolerance=2.0**-18)


def normalize(shape: tuple[int, ...], dtype: torch.dtype, fmt: torch.memory_format, gradients: bool) -> Trial:
    """z = leaky_relu((y - mean) * 2 + bias + residual), or the gradients of y, weight, bias and residual with given statistics."""
    C, slope = shape[1], 0.5

    def ours(y: Tensor, residual: Tensor, dz: Tensor, mean: Tensor, bias: Tensor) -> Tensors:
        var, weight = torch.full_like(mean, 0.25), torch.ones_like(mean)
        z = batchnorm.normalize(y, mean, var, weight, bias, residual, 0.0, "leaky_relu", slope)
        if not gradients:
            return (z,)
        found = batchnorm.normalize_backward(
            dz, y, z, mean, var, weight, bias, residual, 0.0, "leaky_relu", slope, False, (True, True, True, True)
        )
        return (*(t for t in found if t is not None), batchnorm.channel_sum(dz))

    def exact(y: Tensor, residual: Tensor, dz: Tensor, mean: Tensor, bias: Tensor) -> Tensors:
        weight = torch.ones(C, dtype=torch.float64)
        leaves = [t.requires_grad_() for t in (y, weight, bias, residual)]
        centred = (y - mean.view(-1, 1, 1)) * 2
        z = F.leaky_relu(centred * weight.view(-1, 1, 1) + bias.view(-1, 1, 1) + residual, slope)
        return (*torch.autograd.grad(z, leaves, dz), dz.sum((0, 2, 3))) if gradients else (z.detach(),)

    def operands(device: torch.device) -> Tensors:
        images = [integers(shape, most, device, dtype, fmt) for most in (4, 3)]
        # The gradients' sums over channels are left in float32.
        dz = 2 * integers(shape, 1, device, dtype, fmt)
        return *images, dz, integers((C,), 2, device, SINGLE), integers((C,), 3, device, SINGLE)

    return Trial(f"{'gradients' if gradients else 'normalize'} {shape}", operands, ours, exact)


PLANES = (((4, 32, 8, 8), HALF, LAST), ((3, 17, 5, 6), SINGLE, NCHW))


# ----------------------------------------------------------------------------------------------------------------------
# Pooling


def pool(shape: tuple[int, ...], window: int, stride: int, pad: int) -> PoolProblem:
    return PoolProblem.of(shape, (window, window), (stride, stride), (pad, pad))  # type: ignore[arg-type]


def max_pool(shape: tuple[int, ...], window: int, stride: int, pad: int, dtype: torch.dtype, fmt: torch.memory_format) -> Trial:
    g = pool(shape, window, stride, pad)

    def ours(x: Tensor, dy: Tensor) -> Tensors:
        y, taps = pooling.max_pool(g, x, with_taps=True)
        assert taps is not None
        return y, pooling.max_pool_indices(g, taps), pooling.max_pool_backward(g, dy, taps, fmt)

    def exact(x: Tensor, dy: Tensor) -> Tensors:
        y, indices = F.max_pool2d(x.requires_grad_(), window, stride, pad, return_indices=True)
        return y.detach(), indices, *torch.autograd.grad(y, x, dy)

    def operands(device: torch.device) -> Tensors:
        return integers(shape, 100, device, dtype, fmt), integers((g.N, g.C, g.P, g.Q), 3, device, dtype, fmt)

    return Trial(f"max pool {shape} {window}x{window}/{stride}", operands, ours, exact)


def average(shape: tuple[int, ...], window: int, stride: int, pad: int, dtype: torch.dtype, fmt: torch.memory_format) -> Trial:
    """Sums of windows are divided by 4, and of the adaptive windows of two by two too."""
    g, size = pool(shape, window, stride, pad), (shape[2] // 2, shape[3] // 2)

    def ours(x: Tensor, dy: Tensor, dz: Tensor) -> Tensors:
        y, dx = pooling.avg_pool(g, x, False, 4), pooling.avg_pool_backward(g, dy, False, 4, fmt)
        return y, dx, pooling.adaptive_avg_pool(x, *size), pooling.adaptive_avg_pool_backward(dz, shape, fmt)  # type: ignore[arg-type]

    def exact(x: Tensor, dy: Tensor, dz: Tensor) -> Tensors:
        y, z = F.avg_pool2d(x.requires_grad_(), window, stride, pad, divisor_override=4), F.adaptive_avg_pool2d(x, size)
        return y.detach(), *torch.autograd.grad(y, x, dy), z.detach(), *torch.autograd.grad(z, x, dz)

    def operands(device: torch.device) -> Tensors:
        gradients = [integers((g.N, g.C, *extent), 3, device, dtype, fmt) for extent in ((g.P, g.Q), size)]
        return integers(shape, 7, device, dtype, fmt), *gradients

    return Trial(f"average pool {shape} {window}x{window}/{stride}", operands, ours, exact)


def plane_mean(shape: tuple[int, ...], dtype: torch.dtype, fmt: torch.memory_format) -> Trial:
    return Trial(
        f"global average pool {shape}",
        lambda d: (shape[2] * shape[3] // 64 * integers(shape, 1, d, dtype, fmt),),  # means are multiples of 1/64
        lambda x: (pooling.global_avg_pool(x),),
        lambda x: (x.mean((2, 3), keepdim=True),),
    )


# ----------------------------------------------------------------------------------------------------------------------


def of_all(trial: Callable[..., Trial], convolutions: tuple[Convolution, ...], tile: ChooseTile) -> tuple[Trial, ...]:
    return tuple(map(partial(trial, tile=tile), convolutions))


FAMILIES: dict[str, Family] = {
    "fprop": Family(("conv_fprop_kernel",), (*of_all(fprop, GENERAL, gather_tile), stats(BODY, gather_tile))),
    "dgrad": Family(("conv_dgrad_kernel",), of_all(dgrad, GENERAL, gather_tile)),
    "wgrad": Family(("conv_wgrad_kernel", "conv_wgrad_reduce_kernel"), (*of_all(wgrad, GENERAL, split_tile), wgrad(BODY, gather_tile))),
    "im2col": Family(("im2col_kernel", "col2im_kernel"), (im2col(BODY), im2col(RAGGED))),
    "depthwise-fprop": Family(
        ("depthwise_fprop_kernel",), (*of_all(fprop, DEPTHWISE, gather_tile), stats(DEPTHWISE[0], gather_tile))
    ),
    "depthwise-dgrad": Family(("depthwise_dgrad_kernel",), of_all(dgrad, DEPTHWISE, gather_tile)),
    "depthwise-wgrad": Family(("depthwise_wgrad_kernel",), of_all(wgrad, DEPTHWISE, gather_tile)),
    "tma-fprop": Family(("tma_fprop_kernel",), (*of_all(fprop, BOXES, box_tile), stats(BODY, box_tile)), tensor_maps=True),
    "tma-dgrad": Family(("tma_dgrad_kernel",), of_all(dgrad, BOXES, box_tile), tensor_maps=True),
    "tma-wgrad": Family(("tma_wgrad_kernel",), of_all(wgrad, BOXES, box_tile), tensor_maps=True),
    "tma-stem": Family(
        ("pack_pixels_kernel",), (*of_all(fprop, STEM, box_tile), *of_all(wgrad, STEM, box_tile)), tensor_maps=True
    ),
    "moments": Family(
        ("batch_moments_kernel", "combine_kernel", "update_running_kernel"),
        (*(moments(*planes) for planes in PLANES), moments((64, 8, 64, 64), HALF, LAST)),
    ),
    "normalize": Family(("normalize_kernel",), tuple(normalize(*planes, gradients=False) for planes in PLANES)),
    "normalize-gradients": Family(
        ("gradient_sums_kernel", "normalize_backward_kernel"), tuple(normalize(*planes, gradients=True) for planes in PLANES)
    ),
    "max-pool": Family(
        ("max_pool_kernel", "max_pool_indices_kernel", "max_pool_backward_kernel"),
        (max_pool((2, 32, 8, 8), 2, 2, 0, HALF, LAST), max_pool((3, 17, 9, 11), 3, 2, 1, SINGLE, NCHW)),
    ),
    "average-pool": Family(
        ("avg_pool_kernel", "avg_pool_backward_kernel"),
        (average((2, 32, 8, 8), 2, 2, 0, HALF, LAST), average((3, 17, 6, 10), 3, 2, 1, SINGLE, NCHW)),
    ),
    "global-pool": Family(
        ("plane_mean_kernel",),
        (plane_mean((2, 32, 8, 8), HALF, LAST), plane_mean((1, 17, 128, 128), SINGLE, NCHW)),  # the second is cut into parts
    ),
}  # fmt: skip
