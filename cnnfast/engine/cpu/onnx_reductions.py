"""Reductions in ONNX: sums, means, largest values and where they are."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .onnx_shapes import in_shape
from .onnx_sizes import NoOnnxForm
from .onnx_writer import OnnxValue, OnnxWriter


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


def spread(
    w: OnnxWriter, x: OnnxValue, dim: Sequence[int] | None, correction: float, keepdim: bool, root: bool
) -> tuple[str, str]:
    """The variance or its root, and the mean."""
    axes = sorted(d % len(x.shape) for d in dim or range(len(x.shape)))
    count = math.prod(x.sizes(*axes))
    mean = w.call("ReduceMean", x, w.integers(axes), keepdims=1)
    centred = w.call("Sub", x, mean)
    y = w.call("ReduceSum", w.call("Mul", centred, centred), w.integers(axes), keepdims=int(keepdim))
    y = w.call("Div", y, w.number(float(count - correction), x.dtype))
    return w.call("Sqrt", y) if root else y, mean if keepdim else w.call("Squeeze", mean, w.integers(axes))


def variance(root: bool, with_mean: bool = False) -> Callable[..., Any]:
    def form(
        w: OnnxWriter, x: OnnxValue, dim: Any = None, correction: float | None = None, keepdim: bool = False
    ) -> Any:
        given = [dim] if isinstance(dim, int) else dim
        both = spread(w, x, given, 1 if correction is None else float(correction), keepdim, root)
        return both if with_mean else both[0]

    return form


def sorted_along(w: OnnxWriter, x: OnnxValue, dim: int = -1, descending: bool = False) -> list[str]:
    return topmost(w, x, x.size(dim), dim, descending)


def topmost(
    w: OnnxWriter, x: OnnxValue, k: int, dim: int = -1, largest: bool = True, is_sorted: bool = True
) -> list[str]:
    return w.calls("TopK", x, w.integers([k]), outputs=2, axis=dim, largest=int(largest), sorted=int(is_sorted))


def median(w: OnnxWriter, x: OnnxValue, dim: int, keepdim: bool = False) -> list[str]:
    """The lower one of two in the middle."""
    middle = w.integers([(x.size(dim) - 1) // 2])
    found = [w.call("Gather", each, middle, axis=dim) for each in sorted_along(w, x, dim)]
    return found if keepdim else [w.call("Squeeze", each, w.integers([dim])) for each in found]


def median_of_all(w: OnnxWriter, x: OnnxValue) -> str:
    count = math.prod(x.sizes(*range(len(x.shape))))
    flat = OnnxValue(w.call("Reshape", x, w.integers([-1])), (count,), x.dtype)
    return median(w, flat, 0)[0]


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
    **dict.fromkeys(("any.dim", "any.default"), "ReduceMax"),
    **dict.fromkeys(("all.dim", "all.default"), "ReduceMin"),
    "logsumexp.default": "ReduceLogSumExp",
}
WHOLE = ("mean.default", "sum.default", "max.default", "min.default", "prod.default", "any.default", "all.default")
FORMS: dict[str, Callable[..., Any]] = {
    **{f"aten.{name}": reduced(operator, name in WHOLE) for name, operator in REDUCTIONS.items()},
    "aten.max.dim": with_index("ReduceMax", "ArgMax"),
    "aten.min.dim": with_index("ReduceMin", "ArgMin"),
    "aten.argmax.default": place_of("ArgMax"),
    "aten.argmin.default": place_of("ArgMin"),
    **{f"aten.{name}.{kind}": variance(name == "std") for name in ("var", "std") for kind in ("correction", "dim")},
    "aten.var.default": lambda w, x, unbiased=True: variance(root=False)(w, x, None, unbiased),
    "aten.std.default": lambda w, x, unbiased=True: variance(root=True)(w, x, None, unbiased),
    **{f"aten.{name}_mean.correction": variance(name == "std", with_mean=True) for name in ("var", "std")},
    **dict.fromkeys(("aten.linalg_vector_norm.default", "aten.norm.ScalarOpt_dim", "aten.norm.Scalar"), vector_norm),
    "aten.cumsum.default": cumulated,
    "aten.sort.default": sorted_along,
    "aten.argsort.default": lambda w, x, dim=-1, descending=False: sorted_along(w, x, dim, descending)[1],
    "aten.topk.default": topmost,
    "aten.median.dim": median,
    "aten.median.default": median_of_all,
}
