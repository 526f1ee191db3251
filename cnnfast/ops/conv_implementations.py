"""What convolution's operators do, and the fakes that tell their results' shapes and layouts.

Every schema of a convolution ends with the five positions GEOMETRY, which `unpack` turns into what kernels take. With
algorithm="auto" serving.py decides whether the library's convolution serves or our kernels do; the decision and our
launch come from one plan (conv.py in cnnfast_kernels).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cnnfast_kernels import conv, memory
from cnnfast_kernels.dtypes import accumulator_dtype
from cnnfast_kernels.epilogue import NO_NORM, PLAIN, BatchNorm, Epilogue
from cnnfast_kernels.gradient_epilogue import GradientEpilogue
from cnnfast_kernels.keys import dgrad_key, fprop_key, wgrad_key
from cnnfast_kernels.layout import convolution_format
from cnnfast_kernels.problem import output_extent
from cnnfast_kernels.questions import Geometry

from ..precision import allow_tf32
from . import library_convolution
from .block_passes import fake_words
from .serving import library_serves

# Called `how` below: the positions that tell how the filters move over the image, and who computes it how.
GEOMETRY = "SymInt[2] stride, SymInt[4] padding, SymInt[2] dilation, int groups, str algorithm"


def unpack(how: tuple[Any, ...]) -> tuple[Geometry, Any]:
    """(geometry, algorithm) of the positions GEOMETRY."""
    return tuple.__new__(Geometry, how[:4]), how[4]  # in half the time that Geometry(*how[:4]) takes


def memory_format(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


def fprop(x: Tensor, w: Tensor, bias: Tensor | None, *how: Any) -> Tensor:
    if x.shape[1] == 0:
        return fake_fprop(x, w, bias, *how)
    geometry, algorithm = unpack(how)
    tf32, epilogue = allow_tf32(x), PLAIN if bias is None else Epilogue(bias)
    if algorithm != "auto":
        return conv.conv_fprop(x, w, geometry, epilogue, algorithm=algorithm, tf32=tf32)
    plan = conv.fprop_plan(fprop_key(x, w, geometry, epilogue, False, tf32, None))
    if decision := library_serves(plan, x.device):
        return library_convolution.fprop(x, w, geometry, bias, decision)
    return plan.run(x, w, epilogue)


def stats(x: Tensor, w: Tensor, bias: Tensor | None, *how: Any) -> tuple[Tensor, Tensor, Tensor]:
    geometry, algorithm = unpack(how)
    tf32 = allow_tf32(x)
    if algorithm != "auto":
        return conv.conv_stats(x, w, geometry, bias=bias, algorithm=algorithm, tf32=tf32)
    plan = conv.fprop_plan(fprop_key(x, w, geometry, PLAIN, True, tf32, None))
    if decision := library_serves(plan, x.device):
        return library_convolution.stats(x, w, geometry, bias, decision)
    return plan.run_with_statistics(x, w, bias)


def bn_act(
    x: Tensor, w: Tensor, bias, mean, var, gamma, beta, residual, eps: float, activation, slope, slopes, *how: Any
) -> Tensor:
    norm = tuple.__new__(BatchNorm, (mean, var, gamma, beta, eps))  # for the same reason as in unpack
    return _with_epilogue(x, w, Epilogue(bias, norm, residual, activation, slope, slopes), how)


def bn_act_words(
    x: Tensor, w: Tensor, bias, mean, var, gamma, beta, residual, eps: float, activation, slope, slopes, *how: Any
) -> tuple[Tensor, Tensor]:
    """(what bn_act gives, its words of bits). By our kernels always: the library's convolution leaves none."""
    geometry, algorithm = unpack(how)
    epilogue = Epilogue(bias, BatchNorm(mean, var, gamma, beta, eps), residual, activation, slope, slopes)
    return conv.conv_fprop_words(x, w, geometry, epilogue, algorithm=algorithm, tf32=allow_tf32(x))


def act(x: Tensor, w: Tensor, bias, residual, activation, slope: float, slopes, *how: Any) -> Tensor:
    return _with_epilogue(x, w, Epilogue(bias, NO_NORM, residual, activation, slope, slopes), how)


def _with_epilogue(x: Tensor, w: Tensor, epilogue: Epilogue, how: tuple[Any, ...]) -> Tensor:
    geometry, algorithm = unpack(how)
    tf32 = allow_tf32(x)
    if algorithm != "auto":
        return conv.conv_fprop(x, w, geometry, epilogue, algorithm=algorithm, tf32=tf32)
    plan = conv.fprop_plan(fprop_key(x, w, geometry, epilogue, False, tf32, None))
    if decision := library_serves(plan, x.device):
        return library_convolution.with_epilogue(x, w, geometry, epilogue, decision)
    return plan.run(x, w, epilogue)


def dgrad(dy: Tensor, w: Tensor, bias: Tensor | None, x_shape: Any, channels_last: bool, *how: Any) -> Tensor:
    geometry, algorithm = unpack(how)
    tf32, fmt = allow_tf32(dy), memory_format(channels_last)
    if algorithm != "auto":
        return conv.conv_dgrad(dy, w, x_shape, geometry, bias=bias, fmt=fmt, algorithm=algorithm, tf32=tf32)
    plan = conv.dgrad_plan(dgrad_key(dy, w, x_shape, fmt, geometry, tf32, None))
    if decision := library_serves(plan, dy.device):
        return library_convolution.dgrad(dy, w, x_shape, geometry, bias, decision)
    return plan.run(dy, w, bias)


def dgrad_below(
    dy: Tensor, w: Tensor, residual, y, words, mean, var, gamma, beta, eps: float, *rest: Any
) -> tuple[Tensor, ...]:
    """(g, the sum of g, the sum of g * xhat), g = (dx + residual) * act'(norm(y)), or masked by words of bits of the
    activation's result. Without y the second sum is empty, and without words too the first. By our kernels always: the
    library's convolution has no such end.
    """
    activation, slope, x_shape, channels_last, *how = rest
    (geometry, algorithm), fmt = unpack(tuple(how)), memory_format(channels_last)
    below = GradientEpilogue(residual, y, None, words, BatchNorm(mean, var, gamma, beta, eps), activation, slope)
    options: Any = {"fmt": fmt, "algorithm": algorithm, "tf32": allow_tf32(dy)}
    if y is None and words is None:
        g = conv.conv_dgrad(dy, w, x_shape, geometry, below, **options)
        return g, *(dy.new_empty(0, dtype=accumulator_dtype(dy.dtype)) for _ in range(2))
    g, sum_g, sum_gx = conv.conv_dgrad_sums(dy, w, x_shape, geometry, below, **options)
    return g, sum_g, sum_g.new_empty(0) if sum_gx is None else sum_gx


def wgrad(x: Tensor, dy: Tensor, w_shape: Any, channels_last: bool, *how: Any) -> Tensor:
    geometry, algorithm = unpack(how)
    tf32, fmt = allow_tf32(x), memory_format(channels_last)
    if algorithm != "auto":
        return conv.conv_wgrad(x, dy, w_shape, geometry, fmt=fmt, algorithm=algorithm, tf32=tf32)
    plan = conv.wgrad_plan(wgrad_key(x, dy, w_shape, fmt, geometry, tf32, None))
    if decision := library_serves(plan, x.device):
        return library_convolution.wgrad(x, dy, w_shape, geometry, decision)
    return plan.run(x, dy)


# ----------------------------------------------------------------------------------------------------------------------
# Fakes


def _fake_output(x: Tensor, w: Tensor, filters: Any, how: tuple[Any, ...]) -> Tensor:
    (stride, padding, dilation, _), _ = unpack(how)
    P = output_extent(x.shape[2], w.shape[2], stride[0], padding[0], padding[1], dilation[0])
    Q = output_extent(x.shape[3], w.shape[3], stride[1], padding[2], padding[3], dilation[1])
    return memory.empty((x.shape[0], filters, P, Q), x, convolution_format(x, w))


def fake_fprop(x: Tensor, w: Tensor, bias: Tensor | None, *how: Any) -> Tensor:
    """As PyTorch has it, without channels in there are none out."""
    return _fake_output(x, w, 0 if x.shape[1] == 0 else w.shape[0], how)


def fake_stats(x: Tensor, w: Tensor, bias: Tensor | None, *how: Any) -> tuple[Tensor, Tensor, Tensor]:
    statistic = x.new_empty(w.shape[0], dtype=accumulator_dtype(x.dtype))
    return _fake_output(x, w, w.shape[0], how), statistic, torch.empty_like(statistic)


def fake_bn_act(x: Tensor, w: Tensor, *rest: Any) -> Tensor:
    return _fake_output(x, w, w.shape[0], rest[-5:])


def fake_bn_act_words(x: Tensor, w: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    z = fake_bn_act(x, w, *rest)
    return z, fake_words(z)


def fake_dgrad(dy: Tensor, w: Tensor, bias: Tensor | None, x_shape: Any, channels_last: bool, *how: Any) -> Tensor:
    return memory.empty(x_shape, dy, memory_format(channels_last))


def fake_dgrad_below(dy: Tensor, w: Tensor, residual, y, words, *rest: Any) -> tuple[Tensor, ...]:
    x_shape, channels_last = rest[7:9]
    sizes = (0 if y is None and words is None else x_shape[1], 0 if y is None else x_shape[1])
    sums = (dy.new_empty(size, dtype=accumulator_dtype(dy.dtype)) for size in sizes)
    return memory.empty(x_shape, dy, memory_format(channels_last)), *sums


def fake_wgrad(x: Tensor, dy: Tensor, w_shape: Any, channels_last: bool, *how: Any) -> Tensor:
    return memory.empty(w_shape, x, memory_format(channels_last))
