"""Functions of numbers that ONNX has no operator for, made of those that it has."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from .onnx_elementwise import unary
from .onnx_writer import Number, OnnxValue, OnnxWriter


def truncated(w: OnnxWriter, x: OnnxValue | str) -> str:
    if not w.result.dtype.is_floating_point:
        return w.call("Identity", x)
    return w.call("Mul", w.call("Floor", w.call("Abs", x)), w.call("Sign", x))


def fraction(w: OnnxWriter, x: OnnxValue) -> str:
    return w.call("Sub", x, truncated(w, x))


def float_remainder(w: OnnxWriter, x: Number, y: Number) -> str:
    """With the sign of x, as C's fmod."""
    dtype = w.result.dtype
    return w.call("Mod", w.cast(x, dtype), w.cast(y, dtype), fmod=1)


def with_product(operator: str) -> Callable[..., str]:
    """x + value * first * second, or x + value * (first / second)."""

    def form(w: OnnxWriter, x: OnnxValue, first: OnnxValue, second: OnnxValue, value: Number = 1) -> str:
        dtype = w.result.dtype
        product = w.call(operator, w.cast(first, dtype), w.cast(second, dtype))
        if value != 1:
            product = w.call("Mul", product, w.cast(value, dtype))
        return w.call("Add", w.cast(x, dtype), product)

    return form


def between(w: OnnxWriter, x: OnnxValue, end: OnnxValue, weight: Number) -> str:
    """From the nearer end, as PyTorch computes it: weight 1 gives `end` exactly."""
    dtype = w.result.dtype
    share = w.cast(weight, dtype)
    way = w.call("Sub", end, x)
    rest = w.call("Sub", w.number(1.0, dtype), share)
    from_start = w.call("Add", x, w.call("Mul", share, way))
    from_end = w.call("Sub", end, w.call("Mul", way, rest))
    near = w.call("Less", w.call("Abs", share), w.number(0.5, dtype))
    return w.call("Where", near, from_start, from_end)


def reciprocal_root(w: OnnxWriter, x: OnnxValue) -> str:
    return w.call("Reciprocal", w.call("Sqrt", w.cast(x, w.result.dtype)))


def logarithm(base: float) -> Callable[..., str]:
    def form(w: OnnxWriter, x: OnnxValue) -> str:
        dtype = w.result.dtype
        return w.call("Mul", w.call("Log", w.cast(x, dtype)), w.number(1 / math.log(base), dtype))

    return form


def near_zero(w: OnnxWriter, x: str, close: str, far: str) -> str:
    near = w.call("Less", w.call("Abs", x), w.number(0.5, w.result.dtype))
    return w.call("Where", near, close, far)


def log_of_1_plus(w: OnnxWriter, x: OnnxValue) -> str:
    """log(1 + x), for small x by Kahan: x * log(u) / (u - 1) where u is 1 + x, rounded; x itself where u is 1."""
    dtype = w.result.dtype
    y, one = w.cast(x, dtype), w.number(1.0, dtype)
    u = w.call("Add", y, one)
    logarithm_of_u = w.call("Log", u)
    close = w.call("Div", w.call("Mul", y, logarithm_of_u), w.call("Sub", u, one))
    return near_zero(w, y, w.call("Where", w.call("Equal", u, one), y, close), logarithm_of_u)


def exponential_minus_1(w: OnnxWriter, x: OnnxValue) -> str:
    """exp(x) - 1, for small x by Kahan: (u - 1) * x / log(u) where u is exp(x), rounded; x itself where u is 1."""
    dtype = w.result.dtype
    y, one = w.cast(x, dtype), w.number(1.0, dtype)
    u = w.call("Exp", y)
    above = w.call("Sub", u, one)
    close = w.call("Div", w.call("Mul", above, y), w.call("Log", u))
    return near_zero(w, y, w.call("Where", w.call("Equal", u, one), y, close), above)


def log_of_exponentials(w: OnnxWriter, x: OnnxValue, y: OnnxValue) -> str:
    """log(exp(x) + exp(y)) = max(x, y) + log(1 + exp(-|x - y|)); two infinities of one sign are 0 apart."""
    dtype = w.result.dtype
    apart = w.call("Where", w.call("Equal", x, y), w.number(0.0, dtype), w.call("Abs", w.call("Sub", x, y)))
    return w.call("Add", w.call("Max", x, y), w.call("Softplus", w.call("Neg", apart)))


def logit(w: OnnxWriter, x: OnnxValue, eps: float | None = None) -> str:
    dtype, one = w.result.dtype, w.number(1.0, w.result.dtype)
    p = w.cast(x, dtype)
    if eps is not None:
        p = w.call("Clip", p, w.number(eps, dtype), w.number(1 - eps, dtype))
    return w.call("Log", w.call("Div", p, w.call("Sub", one, p)))


def angle(w: OnnxWriter, y: OnnxValue, x: OnnxValue) -> str:
    """atan2(y, x). A zero counts as positive."""
    dtype, zero = w.result.dtype, w.number(0.0, w.result.dtype)
    y_, x_ = w.cast(y, dtype), w.cast(x, dtype)
    half = w.call("Atan", w.call("Div", y_, x_))
    turn = w.call("Where", w.call("Less", y_, zero), w.number(-math.pi, dtype), w.number(math.pi, dtype))
    left = w.call("Where", w.call("Less", x_, zero), w.call("Add", half, turn), half)
    on_axis = w.call("Mul", w.call("Sign", y_), w.number(math.pi / 2, dtype))
    return w.call("Where", w.call("Equal", x_, zero), on_axis, left)


def is_nan(w: OnnxWriter, x: OnnxValue) -> str:
    return w.call("IsNaN", x if x.dtype.is_floating_point else w.cast(x, torch.float32))


def is_infinite(w: OnnxWriter, x: OnnxValue) -> str:
    return w.call("IsInf", x if x.dtype.is_floating_point else w.cast(x, torch.float32))


def is_finite(w: OnnxWriter, x: OnnxValue) -> str:
    return w.call("Not", w.call("Or", is_nan(w, x), is_infinite(w, x)))


def without_nan(
    w: OnnxWriter, x: OnnxValue, nan: float | None = None, above: float | None = None, below: float | None = None
) -> str:
    if not x.dtype.is_floating_point:
        return w.call("Identity", x)
    limits = torch.finfo(x.dtype)
    y = w.call("Where", w.call("IsNaN", x), w.number(nan or 0.0, x.dtype), x)
    for infinity, given, limit in ((math.inf, above, limits.max), (-math.inf, below, limits.min)):
        found = w.call("Equal", y, w.number(infinity, x.dtype))
        y = w.call("Where", found, w.number(limit if given is None else given, x.dtype), y)
    return y


def hard_shrink(w: OnnxWriter, x: OnnxValue, bound: float = 0.5) -> str:
    inside = w.call("LessOrEqual", w.call("Abs", x), w.number(float(bound), x.dtype))
    return w.call("Where", inside, w.number(0.0, x.dtype), x)


def soft_shrink(w: OnnxWriter, x: OnnxValue, bound: float = 0.5) -> str:
    limits = w.number(-float(bound), x.dtype), w.number(float(bound), x.dtype)
    return w.call("Sub", x, w.call("Clip", x, *limits))


def gated(w: OnnxWriter, x: OnnxValue, dim: int = -1) -> str:
    """glu: the first half times the sigmoid of the second."""
    half = x.size(dim) // 2
    first, second = w.calls("Split", x, w.integers([half, half]), outputs=2, axis=dim)
    return w.call("Mul", first, w.call("Sigmoid", second))


FORMS: dict[str, Callable[..., Any]] = {
    "aten.trunc.default": truncated,
    "aten.frac.default": fraction,
    **{f"aten.fmod.{kind}": float_remainder for kind in ("Scalar", "Tensor")},
    "aten.addcmul.default": with_product("Mul"),
    "aten.addcdiv.default": with_product("Div"),
    **{f"aten.lerp.{kind}": between for kind in ("Scalar", "Tensor")},
    "aten.rsqrt.default": reciprocal_root,
    "aten.log.default": unary("Log"),
    "aten.log2.default": logarithm(2),
    "aten.log10.default": logarithm(10),
    "aten.log1p.default": log_of_1_plus,
    "aten.exp2.default": lambda w, x: w.call("Pow", w.number(2.0, w.result.dtype), w.cast(x, w.result.dtype)),
    "aten.expm1.default": exponential_minus_1,
    "aten.logaddexp.default": log_of_exponentials,
    "aten.logit.default": logit,
    "aten.atan2.default": angle,
    "aten.isnan.default": is_nan,
    "aten.isinf.default": is_infinite,
    "aten.isfinite.default": is_finite,
    "aten.nan_to_num.default": without_nan,
    "aten.hardshrink.default": hard_shrink,
    "aten.softshrink.default": soft_shrink,
    "aten.glu.default": gated,
}
