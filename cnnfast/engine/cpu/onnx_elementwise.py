"""Arithmetic and comparisons in ONNX, with PyTorch's rules for mixed dtypes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .onnx_writer import Number, OnnxValue, OnnxWriter


def common_dtype(*operands: Number) -> torch.dtype:
    """In which PyTorch computes with these: a tensor's number of dimensions counts, and a number's kind."""

    def stand_in(operand: Number) -> Any:
        if not isinstance(operand, OnnxValue):
            return operand
        return torch.empty([1] * len(operand.shape), dtype=operand.dtype, device="meta")

    first, *others = operands
    dtype = first.dtype if isinstance(first, OnnxValue) else torch.result_type(torch.empty(()), first)
    for other in others:
        dtype = torch.result_type(stand_in(first), stand_in(other))
    return dtype


def binary(operator: str) -> Callable[..., str]:
    """Of two operands, in the dtype of the result."""

    def form(w: OnnxWriter, x: Number, y: Number) -> str:
        dtype = w.result.dtype
        return w.call(operator, w.cast(x, dtype), w.cast(y, dtype))

    return form


def scaled(operator: str, swapped: bool = False) -> Callable[..., str]:
    """x + alpha * y, or x - alpha * y; swapped: y - alpha * x, as rsub has it."""

    def form(w: OnnxWriter, x: Number, y: Number, alpha: Number = 1) -> str:
        dtype = w.result.dtype
        if swapped:
            x, y = y, x
        right = w.cast(y, dtype)
        if alpha != 1:
            right = w.call("Mul", right, w.cast(alpha, dtype))
        return w.call(operator, w.cast(x, dtype), right)

    return form


def unary(operator: str, **attributes: Any) -> Callable[..., str]:
    """Of x in the dtype of the result: the sine of an integer is floating."""

    def form(w: OnnxWriter, x: OnnxValue) -> str:
        return w.call(operator, w.cast(x, w.result.dtype), **attributes)

    return form


def comparison(operator: str, negated: bool = False) -> Callable[..., str]:
    def form(w: OnnxWriter, x: Number, y: Number) -> str:
        dtype = common_dtype(x, y)
        if dtype == torch.bool and operator != "Equal":
            dtype = torch.uint8
        answer = w.call(operator, w.cast(x, dtype), w.cast(y, dtype))
        return w.call("Not", answer) if negated else answer

    return form


def logical(operator: str) -> Callable[..., str]:
    """Of truth values; numbers that are not zero are true."""

    def form(w: OnnxWriter, *operands: Number) -> str:
        return w.call(operator, *(w.cast(operand, torch.bool) for operand in operands))

    return form


def bitwise(of_bool: str, of_integers: str) -> Callable[..., str]:
    def form(w: OnnxWriter, *operands: Number) -> str:
        dtype = w.result.dtype
        operator = of_bool if dtype == torch.bool else of_integers
        return w.call(operator, *(w.cast(operand, dtype) for operand in operands))

    return form


def floor_division(w: OnnxWriter, x: Number, y: Number) -> str:
    """Rounded towards minus infinity: ONNX rounds the quotient of integers towards zero, but has Python's remainder."""
    dtype = w.result.dtype
    left, right = w.cast(x, dtype), w.cast(y, dtype)
    if dtype.is_floating_point:
        return w.call("Floor", w.call("Div", left, right))
    return w.call("Div", w.call("Sub", left, w.call("Mod", left, right, fmod=0)), right)


def division(w: OnnxWriter, x: Number, y: Number, rounding_mode: str | None = None) -> str:
    if rounding_mode == "floor":
        return floor_division(w, x, y)
    dtype = w.result.dtype
    quotient = w.call("Div", w.cast(x, dtype), w.cast(y, dtype))
    if rounding_mode is None or not dtype.is_floating_point:
        return quotient
    return w.call("Mul", w.call("Floor", w.call("Abs", quotient)), w.call("Sign", quotient))


def remainder(w: OnnxWriter, x: Number, y: Number) -> str:
    """With the sign of y. ONNX has it for integers only."""
    dtype = w.result.dtype
    left, right = w.cast(x, dtype), w.cast(y, dtype)
    if not dtype.is_floating_point:
        return w.call("Mod", left, right, fmod=0)
    return w.call("Sub", left, w.call("Mul", w.call("Floor", w.call("Div", left, right)), right))


def power(w: OnnxWriter, x: Number, y: Number) -> str:
    dtype = w.result.dtype
    if y == 2:
        base = w.cast(x, dtype)
        return w.call("Mul", base, base)
    if y == 0.5:
        return w.call("Sqrt", w.cast(x, dtype))
    return w.call("Pow", w.cast(x, dtype), w.cast(y, dtype))


def clamp(w: OnnxWriter, x: OnnxValue, low: Number | None = None, high: Number | None = None) -> str:
    """PyTorch's bounds may be tensors that are broadcast; Clip takes scalars. Where low > high, both give high."""
    dtype = w.result.dtype
    if not any(isinstance(bound, OnnxValue) for bound in (low, high)):
        bounds = [None if bound is None else w.number(bound, dtype) for bound in (low, high)]
        return w.call("Clip", w.cast(x, dtype), *bounds)
    y = w.cast(x, dtype)
    if low is not None:
        y = w.call("Max", y, w.cast(low, dtype))
    return y if high is None else w.call("Min", y, w.cast(high, dtype))


def where(w: OnnxWriter, condition: OnnxValue, x: Number, y: Number) -> str:
    dtype = w.result.dtype
    return w.call("Where", w.cast(condition, torch.bool), w.cast(x, dtype), w.cast(y, dtype))


def masked_fill(w: OnnxWriter, x: OnnxValue, mask: OnnxValue, value: Number) -> str:
    return where(w, mask, value, x)


UNARY = {
    **{name: name.capitalize() for name in ("neg", "abs", "exp", "sqrt", "sin", "cos", "tan", "atan", "erf", "floor")},
    **{name: name.capitalize() for name in ("ceil", "round", "sign", "reciprocal", "sinh", "cosh", "asin", "acos")},
}
COMPARISONS = {"eq": "Equal", "lt": "Less", "gt": "Greater", "le": "LessOrEqual", "ge": "GreaterOrEqual"}
FORMS: dict[str, Callable[..., Any]] = {
    **{f"aten.{name}.default": unary(operator) for name, operator in UNARY.items()},
    "aten.add.Tensor": scaled("Add"),
    "aten.sub.Tensor": scaled("Sub"),
    **{f"aten.rsub.{kind}": scaled("Sub", swapped=True) for kind in ("Tensor", "Scalar")},
    "aten.mul.Tensor": binary("Mul"),
    **{f"aten.div.{kind}": division for kind in ("Tensor", "Tensor_mode", "Scalar_mode")},
    **{f"aten.floor_divide.{kind}": floor_division for kind in ("default", "Scalar")},
    **{f"aten.remainder.{kind}": remainder for kind in ("Tensor", "Scalar")},
    **{f"aten.pow.{kind}": power for kind in ("Tensor_Scalar", "Tensor_Tensor", "Scalar")},
    **dict.fromkeys(("aten.maximum.default", "aten.max.other"), binary("Max")),
    **dict.fromkeys(("aten.minimum.default", "aten.min.other"), binary("Min")),
    **dict.fromkeys(("aten.clamp.default", "aten.clamp.Tensor", "aten.clamp_min.Tensor"), clamp),
    "aten.clamp_max.Tensor": lambda w, x, high: clamp(w, x, None, high),
    **{
        f"aten.{name}.{kind}": comparison(operator)
        for name, operator in COMPARISONS.items()
        for kind in ("Tensor", "Scalar")
    },
    **{f"aten.ne.{kind}": comparison("Equal", negated=True) for kind in ("Tensor", "Scalar")},
    **{f"aten.logical_{name}.default": logical(name.capitalize()) for name in ("and", "or", "xor", "not")},
    **{
        f"aten.bitwise_{name}.Tensor": bitwise(name.capitalize(), f"Bitwise{name.capitalize()}")
        for name in ("and", "or", "xor")
    },
    "aten.bitwise_not.default": bitwise("Not", "BitwiseNot"),
    **{f"aten.where.{kind}": where for kind in ("self", "ScalarOther", "ScalarSelf", "Scalar")},
    **{f"aten.masked_fill.{kind}": masked_fill for kind in ("Scalar", "Tensor")},
    "aten.to.dtype": lambda w, x, *_: w.cast(x, w.result.dtype),
    **{f"python.{name}": binary(name.capitalize()) for name in ("add", "sub", "mul", "max", "min")},
    "python.floordiv": floor_division,
    "python.mod": remainder,
    "python.neg": unary("Neg"),
}
