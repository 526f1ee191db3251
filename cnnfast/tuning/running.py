"""A convolution on random operands: by our kernels with a given tile, by the library, and by PyTorch in any dtype, by
which both are judged.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cnnfast_kernels import conv, devices
from cnnfast_kernels.dtypes import accumulator_dtype
from cnnfast_kernels.epilogue import NO_NORM, BatchNorm, Epilogue
from cnnfast_kernels.layout import Layout
from cnnfast_kernels.questions import Tile

from ..activations import activate
from ..checking.judge import compare
from ..dtypes import name_of
from ..ops import library_convolution as library
from ..ops import serving
from ..precision import allow_tf32, float32_products, nearest_tf32
from .capture import FORWARD, Convolution

Arguments = dict[str, Any]
Results = tuple[Tensor, ...]

RESULTS = ("result", "mean", "variance")  # of an operator, in this order
POSITIVE = ("var", "gamma")
VECTORS = ("mean", "var", "gamma", "beta")
MULTIPLIED = ("x", "w", "dy")


def operands(convolution: Convolution, device: torch.device, seed: int = 0) -> Arguments:
    """Arguments for the convolution: tensors of random numbers, laid out as those of the call that was seen. On the
    meta device they have no numbers.
    """
    generator = None if device.type == "meta" else torch.Generator(device).manual_seed(seed)

    def filled(name: str, layout: Layout) -> Tensor:
        if generator is None:
            return torch.empty_strided(*layout[:2], dtype=layout.dtype, device=device)
        span = 1 + sum((size - 1) * stride for size, stride in zip(layout.shape, layout.strides, strict=True))
        numbers = torch.randn(max(span, 0), device=device, generator=generator)
        numbers = numbers.abs() + 0.5 if name in POSITIVE else numbers
        return numbers.to(layout.dtype).as_strided(layout.shape, layout.strides)

    return {name: filled(name, value) if isinstance(value, Layout) else value for name, value in convolution.arguments}


def _epilogue(a: Arguments) -> Epilogue:
    if "activation" not in a:
        return Epilogue(a["bias"])
    norm = BatchNorm(a["mean"], a["var"], a["gamma"], a["beta"], a["eps"]) if "mean" in a else NO_NORM
    return Epilogue(a["bias"], norm, a["residual"], a["activation"], a["slope"], a["slopes"])


def ours(convolution: Convolution, a: Arguments, tile: Tile) -> Results:
    """By our kernels with this tile."""
    how: Any = {"tf32": _in_tf32(a), "tile": tile}
    match convolution.operator:
        case "conv_dgrad":
            bias, fmt = a["bias"], convolution.format
            return (conv.conv_dgrad(a["dy"], a["w"], a["x_shape"], convolution.geometry, bias=bias, fmt=fmt, **how),)
        case "conv_wgrad":
            return (
                conv.conv_wgrad(a["x"], a["dy"], a["w_shape"], convolution.geometry, fmt=convolution.format, **how),
            )
        case "conv_stats":
            return conv.conv_stats(a["x"], a["w"], convolution.geometry, bias=a["bias"], **how)
        case _:
            return (conv.conv_fprop(a["x"], a["w"], convolution.geometry, _epilogue(a), **how),)


def _in_tf32(a: Arguments) -> bool:
    """Whether products are rounded to TF32, as the operator would ask it."""
    return allow_tf32(a["dy"] if "dy" in a else a["x"])


@functools.lru_cache
def _decision(convolution: Convolution) -> serving.Decision:
    return serving.by_library(convolution.question(tf32=False, gpu=devices.NO_GPU))


def by_library(convolution: Convolution, a: Arguments) -> Results:
    """By the library, as the operator would call it."""
    geometry, decision = convolution.geometry, _decision(convolution)
    match convolution.operator:
        case "conv_dgrad":
            return (library.dgrad(a["dy"], a["w"], a["x_shape"], geometry, a["bias"], decision),)
        case "conv_wgrad":
            return (library.wgrad(a["x"], a["dy"], a["w_shape"], geometry, decision),)
        case "conv_stats":
            return library.stats(a["x"], a["w"], geometry, a["bias"], decision)
        case "conv_act" | "conv_bn_act":
            return (library.with_epilogue(a["x"], a["w"], geometry, _epilogue(a), decision),)
        case _:
            return (library.fprop(a["x"], a["w"], geometry, a["bias"], decision),)


# ----------------------------------------------------------------------------------------------------------------------
# Judgement


def by_pytorch(convolution: Convolution, a: Arguments, dtype: torch.dtype | None = None) -> Results:
    """By PyTorch's own functions and gradients, in `dtype`, or in the dtype of the arguments."""
    a = {name: t.to(dtype) if dtype and isinstance(t, Tensor) else t for name, t in a.items()}
    stride, (top, bottom, left, right), dilation, groups = convolution.geometry

    def convolve(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
        if (top, left) == (bottom, right):
            return F.conv2d(x, w, bias, stride, (top, left), dilation, groups)
        return F.conv2d(F.pad(x, (left, right, top, bottom)), w, bias, stride, 0, dilation, groups)

    if convolution.operator not in FORWARD:
        name = "x" if convolution.operator == "conv_dgrad" else "w"
        with torch.enable_grad():
            wanted = torch.zeros(a[f"{name}_shape"], dtype=a["dy"].dtype, device=a["dy"].device, requires_grad=True)
            y = convolve(*(wanted if operand == name else a[operand] for operand in ("x", "w")))
            gradient = torch.autograd.grad(y, wanted, a["dy"])[0]
        bias = a.get("bias")
        return (gradient if bias is None else gradient + bias.view(-1, 1, 1),)
    y = convolve(a["x"], a["w"], a["bias"])
    vectors = accumulator_dtype(y.dtype)
    if convolution.operator == "conv_fprop":
        return (y,)
    if convolution.operator == "conv_stats":
        var, mean = torch.var_mean(y.to(vectors), (0, 2, 3), unbiased=False)
        return y, mean, var
    u = y
    if convolution.operator == "conv_bn_act":
        mean, var, gamma, beta = (None if a[name] is None else a[name].to(vectors) for name in VECTORS)
        u = F.batch_norm(y, mean, var, gamma, beta, False, 0.0, a["eps"])
    u = u if a["residual"] is None else u + a["residual"]
    return (activate(u, a["activation"], a["slope"] if a["slopes"] is None else a["slopes"]),)


class Judge:
    """Knows what is right for one set of operands, by the rule of checking/judge.py: beside the results in float64,
    with PyTorch's own error for a measure.

    How float32 is multiplied, TF32 or IEEE, counts as it is set while the judge is made.
    """

    def __init__(self, convolution: Convolution, a: Arguments) -> None:
        tf32 = _in_tf32(a)
        self.precision = name_of(convolution.dtype, tf32)
        self.theirs = by_pytorch(convolution, a)
        rounded = {name: nearest_tf32(t) if tf32 and name in MULTIPLIED else t for name, t in a.items()}
        with float32_products("ieee"):
            self.plain = by_pytorch(convolution, rounded, accumulator_dtype(convolution.dtype))
        self.exact = by_pytorch(convolution, a, torch.float64)

    def fault(self, results: Results) -> str:
        """What is wrong with results for these operands; the empty string if nothing is."""
        for name, result, *others in zip(RESULTS, results, self.theirs, self.plain, self.exact, strict=False):
            comparison = compare(name, result, *others, precision=self.precision)
            if not comparison.ok:
                return str(comparison)
        return ""
