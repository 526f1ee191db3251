"""Passes over memory to try: batch norm's statistics, the pass and its gradients; pooling, forward and backward."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cnnfast_kernels import batchnorm, pooling
from cnnfast_kernels.gram import gram_gradients, gram_statistics
from cnnfast_kernels.problem import PoolProblem
from cnnfast_kernels.words import unpack_words

from .trial import HALF, LAST, NCHW, SINGLE, SmokeTrial, Tensors, integers

# ----------------------------------------------------------------------------------------------------------------------
# Batch norm: scale, weight / sqrt(var), is a power of two


def moments(shape: tuple[int, ...], dtype: torch.dtype, fmt: torch.memory_format) -> SmokeTrial:
    count = shape[0] * shape[2] * shape[3]

    def ours(y: Tensor) -> Tensors:
        mean, var = batchnorm.batch_moments(y)
        running_mean, running_var = torch.zeros_like(mean), torch.ones_like(var)
        batchnorm.update_running(running_mean, running_var, mean, var, 0.5, count)
        return mean, var, running_mean, running_var

    def exact(y: Tensor) -> Tensors:
        var, mean = torch.var_mean(y, (0, 2, 3), unbiased=False)
        return mean, var, mean / 2, 0.5 + var * count / (count - 1) / 2

    return SmokeTrial(
        f"moments {shape}", lambda d: (integers(shape, 8, d, dtype, fmt),), ours, exact, tolerance=2.0**-18
    )


def ranks(counts: tuple[int, ...], C: int) -> SmokeTrial:
    """The statistics of a batch of which each rank has so many rows; a rank without rows has no mean."""

    def ours(gathered: Tensor) -> Tensors:
        running_mean, running_var = torch.zeros_like(gathered[0, :C]), torch.ones_like(gathered[0, :C])
        found = batchnorm.combine_ranks(gathered, running_mean, running_var, 0.5)
        return *found, running_mean, running_var

    def exact(gathered: Tensor) -> Tensors:
        means, variances, count = gathered.nan_to_num().split((C, C, 1), 1)
        total = count.sum(0)
        mean = (count * means).sum(0) / total
        var = (count * (variances + (means - mean).square())).sum(0) / total
        return mean, var, total, mean / 2, 0.5 + var * total / (total - 1) / 2

    def operands(device: torch.device) -> Tensors:
        gathered = integers((len(counts), 2 * C + 1), 4, device, SINGLE).abs()
        gathered[:, 2 * C] = torch.tensor(counts, dtype=SINGLE)
        gathered[[n == 0 for n in counts], : 2 * C] = float("nan")
        return (gathered,)

    return SmokeTrial(f"{len(counts)} ranks, {C} channels", operands, ours, exact, tolerance=2.0**-18)


def normalize(shape: tuple[int, ...], dtype: torch.dtype, fmt: torch.memory_format, gradients: bool) -> SmokeTrial:
    """z = leaky_relu((y - mean) * 2 + bias + residual), and without the residual, with its mean; or the gradients of y,
    weight, bias and residual with given statistics.
    """
    C, slope = shape[1], 0.5

    def ours(y: Tensor, residual: Tensor, dz: Tensor, mean: Tensor, bias: Tensor) -> Tensors:
        var, weight = torch.full_like(mean, 0.25), torch.ones_like(mean)
        z = batchnorm.normalize(y, mean, var, weight, bias, residual, 0.0, "leaky_relu", slope)
        if not gradients:
            return z, *batchnorm.normalize_mean(y, mean, var, weight, bias, 0.0, "leaky_relu", slope)
        found = batchnorm.normalize_backward(
            dz, y, z, mean, var, weight, bias, residual, 0.0, "leaky_relu", slope, False, (True, True, True, True)
        )
        return (*(t for t in found if t is not None), batchnorm.channel_sum(dz))

    def exact(y: Tensor, residual: Tensor, dz: Tensor, mean: Tensor, bias: Tensor) -> Tensors:
        weight = torch.ones(C, dtype=torch.float64)
        leaves = [t.requires_grad_() for t in (y, weight, bias, residual)]
        centred = (y - mean.view(-1, 1, 1)) * 2
        u = centred * weight.view(-1, 1, 1) + bias.view(-1, 1, 1)
        z = F.leaky_relu(u + residual, slope)
        if gradients:
            return *torch.autograd.grad(z, leaves, dz), dz.sum((0, 2, 3))
        alone = F.leaky_relu(u, slope).detach()
        return z.detach(), alone, alone.mean((0, 2, 3))

    def operands(device: torch.device) -> Tensors:
        images = [integers(shape, most, device, dtype, fmt) for most in (4, 3)]
        # The gradients' sums over channels are left in float32.
        dz = 2 * integers(shape, 1, device, dtype, fmt)
        return *images, dz, integers((C,), 2, device, SINGLE), integers((C,), 3, device, SINGLE)

    return SmokeTrial(f"{'gradients' if gradients else 'normalize'} {shape}", operands, ours, exact)


def bits(shape: tuple[int, ...], dtype: torch.dtype, fmt: torch.memory_format) -> SmokeTrial:
    """Words of bits of z = relu(y + residual), from the pass that computes z and from z, and the gradient by them."""

    def ours(y: Tensor, residual: Tensor, dz: Tensor) -> Tensors:
        nothing = None, None, None, None
        z, words = batchnorm.normalize_words(y, *nothing, residual, 0.0, "relu", 0.0)
        g, sums = batchnorm.activation_backward(dz, None, "relu", 0.0, words)
        assert g is not None
        return z, unpack_words(words, z), unpack_words(batchnorm.pack_words(z), z), g, sums

    def exact(y: Tensor, residual: Tensor, dz: Tensor) -> Tensors:
        z = torch.relu(y + residual)
        positive = (z > 0).double()
        return z, positive, positive, dz * positive, (dz * positive).sum((0, 2, 3))

    def operands(device: torch.device) -> Tensors:
        y, residual, dz = (integers(shape, most, device, dtype, fmt) for most in (4, 3, 2))
        return y, residual, dz

    return SmokeTrial(f"words of bits {shape}", operands, ours, exact)


PLANES = (((4, 32, 8, 8), HALF, LAST), ((3, 17, 5, 6), SINGLE, NCHW))


def gram(shape: tuple[int, ...], K: int, stride: int, dtype: torch.dtype) -> SmokeTrial:
    """Statistics of a 1x1 convolution from its input's Gram matrix, and the gradients behind its batch norm, which
    rounding moves.
    """
    C, eps, steps = shape[1], 0.5, (stride, stride)

    def ours(x: Tensor, w: Tensor, g: Tensor, gamma: Tensor) -> Tensors:
        mean, var, mu, products = gram_statistics(x, w, None, steps)
        sums = g.float().sum((0, 2, 3))
        dx, dw, dgamma = gram_gradients(g, sums, x, w, mu, products, var, gamma, eps, steps, (True, True))
        assert dx is not None
        assert dw is not None
        return mean, var, dx, dw, dgamma

    def exact(x: Tensor, w: Tensor, g: Tensor, gamma: Tensor) -> Tensors:
        leaves = [t.requires_grad_() for t in (x, w, gamma)]
        y = F.conv2d(x, w, None, stride)
        z = F.batch_norm(y, None, None, gamma, None, True, eps=eps)
        var, mean = torch.var_mean(y.detach(), (0, 2, 3), unbiased=False)
        return mean, var, *torch.autograd.grad(z, leaves, g)

    def operands(device: torch.device) -> Tensors:
        N, _, H, W = shape
        g = integers((N, K, (H - 1) // stride + 1, (W - 1) // stride + 1), 3, device, dtype, LAST)
        x, w = integers(shape, 2, device, dtype, LAST), integers((K, C, 1, 1), 2, device, dtype)
        return x, w, g, integers((K,), 2, device, SINGLE)

    return SmokeTrial(f"gram {shape} to {K}/{stride}", operands, ours, exact, tolerance=2.0**-6)


# ----------------------------------------------------------------------------------------------------------------------
# Pooling


def normalised_max_pool(
    shape: tuple[int, ...], window: int, stride: int, pad: int, dtype: torch.dtype, fmt: torch.memory_format
) -> SmokeTrial:
    """max_pool(relu((y - mean) * 2)), and its gradient by sums that are given."""
    g = pool(shape, window, stride, pad)

    def ours(y: Tensor, dz: Tensor, mean: Tensor) -> Tensors:
        norm = mean, torch.full_like(mean, 0.25), None, None
        z, taps, at_max = pooling.normalised_max_pool(g, y, *norm, 0.0, "relu", 0.0)
        sums = torch.zeros(2, shape[1], device=y.device)
        return z, at_max, pooling.normalised_max_pool_backward(g, dz, taps, y, *norm, sums, 0.0, "relu", 0.0)

    def exact(y: Tensor, dz: Tensor, mean: Tensor) -> Tensors:
        u = torch.relu((y.requires_grad_() - mean.view(-1, 1, 1)) * 2)
        z, winners = F.max_pool2d(u, window, stride, pad, return_indices=True)
        at_max = y.detach().flatten(2).gather(2, winners.flatten(2)).view_as(z)
        return z.detach(), at_max, *torch.autograd.grad(z, y, dz)

    def operands(device: torch.device) -> Tensors:
        gradients = integers((g.N, g.C, g.P, g.Q), 3, device, dtype, fmt)
        return integers(shape, 100, device, dtype, fmt), gradients, integers(shape[1:2], 2, device, SINGLE) - 100

    return SmokeTrial(f"norm, max pool {shape} {window}x{window}/{stride}", operands, ours, exact)


def pool(shape: tuple[int, ...], window: int, stride: int, pad: int) -> PoolProblem:
    return PoolProblem.of(shape, (window, window), (stride, stride), (pad, pad))  # type: ignore[arg-type]


def max_pool(
    shape: tuple[int, ...], window: int, stride: int, pad: int, dtype: torch.dtype, fmt: torch.memory_format
) -> SmokeTrial:
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

    return SmokeTrial(f"max pool {shape} {window}x{window}/{stride}", operands, ours, exact)


def average(
    shape: tuple[int, ...], window: int, stride: int, pad: int, dtype: torch.dtype, fmt: torch.memory_format
) -> SmokeTrial:
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

    return SmokeTrial(f"average pool {shape} {window}x{window}/{stride}", operands, ours, exact)


def plane_mean(shape: tuple[int, ...], dtype: torch.dtype, fmt: torch.memory_format) -> SmokeTrial:
    return SmokeTrial(
        f"global average pool {shape}",
        lambda d: (shape[2] * shape[3] // 64 * integers(shape, 1, d, dtype, fmt),),  # means are multiples of 1/64
        lambda x: (pooling.global_avg_pool(x),),
        lambda x: (x.mean((2, 3), keepdim=True),),
    )
