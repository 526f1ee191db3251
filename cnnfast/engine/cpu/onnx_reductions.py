"""Reductions in ONNX: sums, means, largest values and where they are."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .onnx_shapes import in_shape
from .onnx_writer import NoOnnxForm, OnnxValue, OnnxWriter


def reduced(operator: str, whole: bool = False) -> Callable[..., str]:
    """Over given dimensions, none of which means all; whole: an operator without arguments."""

    def form(
        w: OnnxWriter, x: OnnxValue, dim: Sequence[int] | int | None = None, keepdim: bool = False, *_: Any
    ) -> str:
        rank, dtype = len(x.shape), w.result.dtype
        if whole:
            dim, keepdim = None, False
        given = [dim] if isinstance(dim, int) else dim or range(rank)
        axes = sorted(d % rank for d in given) if rank else []
        if dtype == torch.bool:
            answer = w.call(operator, w.cast(x, torch.int32), w.integers(axes), keepdims=int(keepdim))
            return w.call("Cast", answer, to=w.element(torch.bool))
        y = w.cast(x, dtype)
        if operator == "ReduceMean" and rank >= 3 and axes == list(range(2, rank)):
            y = w.call("GlobalAveragePool", y)  # the spelling that runtimes are fast with
            return y if keepdim else in_shape(w, y)
        return w.call(operator, y, w.integers(axes), keepdims=int(keepdim))

    return form


def with_index(operator: str, of_index: str) -> Callable[..., list[str]]:
    """The largest and where it is, as torch.max(x, dim) gives both."""

    def form(w: OnnxWriter, x: OnnxValue, dim: int, keepdim: bool = False) -> list[str]:
        largest = w.call(operator, x, w.integers([dim]), keepdims=int(keepdim))
        return [largest, w.call(of_index, x, axis=dim, keepdims=int(keepdim))]

    return form


def place_of(operator: str) -> Callable[..., str]:
    def form(w: OnnxWriter, x: OnnxValue, dim: int | None = None, keepdim: bool = False) -> str:
        if dim is not None:
            return w.call(operator, x, axis=dim, keepdims=int(keepdim))
        flat = w.call("Reshape", x, w.integers([-1]))
        return in_shape(w, w.call(operator, flat, axis=0, keepdims=0))

    return form


def variance(root: bool) -> Callable[..., str]:
    def form(
        w: OnnxWriter,
        x: OnnxValue,
        dim: Sequence[int] | None = None,
        *,
        correction: float | None = None,
        keepdim: bool = False,
    ) -> str:
        axes = sorted(d % len(x.shape) for d in dim or range(len(x.shape)))
        count = math.prod(x.sizes(*axes))
        centred = w.call("Sub", x, w.call("ReduceMean", x, w.integers(axes), keepdims=1))
        y = w.call("ReduceSum", w.call("Mul", centred, centred), w.integers(axes), keepdims=int(keepdim))
        y = w.call("Mul", y, w.number(1 / (count - (1 if correction is None else correction)), x.dtype))
        return w.call("Sqrt", y) if root else y

    return form


def vector_norm(w: OnnxWriter, x: OnnxValue, ord: float = 2, dim: Any = None, keepdim: bool = False, *_: Any) -> str:
    if ord not in (1, 2):
        raise NoOnnxForm(f"a norm of order {ord}")
    return reduced(f"ReduceL{int(ord)}")(w, x, dim, keepdim)


def cumulated(w: OnnxWriter, x: OnnxValue, dim: int, dtype: Any = None) -> str:
    return w.call("CumSum", w.cast(x, w.result.dtype), w.number(dim, torch.int64))


REDUCTIONS = {
    **dict.fromkeys(("mean.dim", "mean.default"), "ReduceMean"),
    **dict.fromkeys(("sum.dim_IntList", "sum.default"), "ReduceSum"),
    **dict.fromkeys(("amax.default", "max.default"), "ReduceMax"),
    **dict.fromkeys(("amin.default", "min.default"), "ReduceMin"),
    **dict.fromkeys(("prod.dim_int", "prod.default"), "ReduceProd"),
    **dict.fromkeys(("any.dim", "any.dims", "any.default"), "ReduceMax"),
    **dict.fromkeys(("all.dim", "all.dims", "all.default"), "ReduceMin"),
    "logsumexp.default": "ReduceLogSumExp",
}
WHOLE = ("mean.default", "sum.default", "max.default", "min.default", "prod.default", "any.default", "all.default")
FORMS: dict[str, Callable[..., Any]] = {
    **{f"aten.{name}": reduced(operator, name in WHOLE) for name, operator in REDUCTIONS.items()},
    "aten.max.dim": with_index("ReduceMax", "ArgMax"),
    "aten.min.dim": with_index("ReduceMin", "ArgMin"),
    "aten.argmax.default": place_of("ArgMax"),
    "aten.argmin.default": place_of("ArgMin"),
    "aten.var.correction": variance(root=False),
    "aten.std.correction": variance(root=True),
    "aten.linalg_vector_norm.default": vector_norm,
    "aten.norm.ScalarOpt_dim": vector_norm,
    "aten.cumsum.default": cumulated,
}
