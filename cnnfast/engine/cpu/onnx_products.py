"""Matrix products, softmax and attention in ONNX."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .onnx_activations import activate
from .onnx_sizes import NoOnnxForm
from .onnx_writer import OnnxValue, OnnxWriter


def unless_zero(bias: OnnxValue | None) -> OnnxValue | None:
    """A bias of zeros, as a network that was not trained has them, costs onnxruntime time."""
    return None if bias is None or (bias.value is not None and not bias.value.any()) else bias


def linear(
    w: OnnxWriter,
    x: OnnxValue,
    weight: OnnxValue,
    bias: OnnxValue | None,
    activation: str | None = None,
    numbers: Sequence[float] = (),
) -> str:
    """A Gemm of matrices; of more dimensions a product with the transposed weight."""
    bias = unless_zero(bias)
    if len(x.shape) == 2 and len(weight.shape) == 2:
        return activate(w, w.call("Gemm", x, weight, bias, transB=1), activation, numbers)
    if weight.value is not None:
        turned: OnnxValue | str = w.turned(weight)
    else:
        turned = w.call("Transpose", weight, perm=[1, 0]) if len(weight.shape) == 2 else weight
    y = w.call("MatMul", x, turned)
    return activate(w, y if bias is None else w.call("Add", y, bias), activation, numbers)


def added_product(w: OnnxWriter, c: OnnxValue, x: OnnxValue, y: OnnxValue, beta: float = 1, alpha: float = 1) -> str:
    """beta * c + alpha * x @ y."""
    if len(x.shape) == 2:
        return w.call("Gemm", x, y, c, alpha=float(alpha), beta=float(beta))
    product = w.call("MatMul", x, y)
    if alpha != 1:
        product = w.call("Mul", product, w.number(float(alpha), x.dtype))
    addend: OnnxValue | str = c if beta == 1 else w.call("Mul", c, w.number(float(beta), x.dtype))
    return w.call("Add", product, addend)


def softmax(operator: str) -> Callable[..., str]:
    def form(w: OnnxWriter, x: OnnxValue, dim: int, dtype: Any = None) -> str:
        return w.call(operator, w.cast(x, w.result.dtype), axis=dim)

    return form


def attention(
    w: OnnxWriter,
    query: OnnxValue,
    key: OnnxValue,
    value: OnnxValue,
    mask: OnnxValue | None = None,
    dropout: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> str:
    """softmax(query @ key.T * scale + mask) @ value. A mask of truth values says who may be seen."""
    if dropout or enable_gqa:
        raise NoOnnxForm("attention with dropout" if dropout else "attention with grouped queries")
    dtype, rank = query.dtype, len(key.shape)
    scale = 1 / math.sqrt(query.size(-1)) if scale is None else scale
    turned = w.call("Transpose", key, perm=[*range(rank - 2), rank - 1, rank - 2])
    scores = w.call("Mul", w.call("MatMul", query, turned), w.number(scale, dtype))
    hidden = w.number(-math.inf, dtype)
    if is_causal:
        seen = w.tensor(torch.ones(query.size(-2), key.size(-2), dtype=torch.bool).tril())
        scores = w.call("Where", seen, scores, hidden)
    if mask is not None:
        masked = mask.dtype == torch.bool
        scores = w.call("Where", mask, scores, hidden) if masked else w.call("Add", scores, w.cast(mask, dtype))
    return w.call("MatMul", w.call("Softmax", scores, axis=-1), value)


def einsum(w: OnnxWriter, equation: str, tensors: Sequence[OnnxValue], path: Any = None) -> str:
    return w.call("Einsum", *tensors, equation=equation.replace(" ", ""))


def bilinear(w: OnnxWriter, x: OnnxValue, y: OnnxValue, weight: OnnxValue, bias: OnnxValue | None = None) -> str:
    """x [..., I] and y [..., J] with weight [K, I, J]."""
    z = w.call("Einsum", x, weight, y, equation="...i,kij,...j->...k")
    return z if bias is None else w.call("Add", z, bias)


FORMS: dict[str, Callable[..., Any]] = {
    "cnnfast.linear": linear,
    "aten.linear.default": linear,
    **{f"aten.{name}.default": lambda w, x, y: w.call("MatMul", x, y) for name in ("matmul", "bmm", "mm", "mv", "dot")},
    "aten.addmm.default": added_product,
    "aten.baddbmm.default": added_product,
    "aten.einsum.default": einsum,
    "aten.bilinear.default": bilinear,
    "aten.softmax.int": softmax("Softmax"),
    "aten.log_softmax.int": softmax("LogSoftmax"),
    "aten.scaled_dot_product_attention.default": attention,
}
