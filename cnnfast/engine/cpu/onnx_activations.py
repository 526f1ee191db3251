"""Activations in ONNX."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from .onnx_elementwise import scaled
from .onnx_sizes import NoOnnxForm
from .onnx_writer import Number, OnnxValue, OnnxWriter


def silu(w: OnnxWriter, x: OnnxValue | str) -> str:
    return w.call("Mul", x, w.call("Sigmoid", x))


def softplus(w: OnnxWriter, x: OnnxValue, beta: float = 1, threshold: float = 20) -> str:
    """Above the threshold PyTorch gives x itself, which the logarithm equals there."""
    if beta * threshold < 15:
        raise NoOnnxForm(f"softplus with beta={beta} and threshold={threshold}")
    factor = w.number(float(beta), x.dtype)
    return w.call("Div", w.call("Softplus", w.call("Mul", x, factor)), factor) if beta != 1 else w.call("Softplus", x)


def gelu(w: OnnxWriter, x: OnnxValue | str, approximate: str = "none") -> str:
    return w.call("Gelu", x, approximate=approximate)


def elu(w: OnnxWriter, x: OnnxValue | str, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0) -> str:
    if scale != 1 or input_scale != 1:
        raise NoOnnxForm("elu with scales")
    return w.call("Elu", x, alpha=float(alpha))


def prelu(w: OnnxWriter, x: OnnxValue, slope: OnnxValue) -> str:
    """PyTorch's slope is one a channel, dimension 1; ONNX broadcasts from the right."""
    if slope.shape == (1,):
        return w.call("PRelu", x, slope)
    shape = [-1] + [1] * (len(x.shape) - 2)
    return w.call("PRelu", x, w.call("Reshape", slope, w.integers(shape)))


def threshold(w: OnnxWriter, x: OnnxValue, bound: float, value: float) -> str:
    above = w.call("Greater", x, w.number(bound, x.dtype))
    return w.call("Where", above, x, w.number(value, x.dtype))


def activate(w: OnnxWriter, x: OnnxValue | str, activation: str | None, numbers: Sequence[float] = ()) -> str:
    """activation(x), x in the dtype of the result; the activations of operators.ACTIVATIONS."""
    name = x.name if isinstance(x, OnnxValue) else x
    dtype = w.result.dtype
    match activation:
        case None:
            return name
        case "hardtanh":
            low, high = numbers or (-1.0, 1.0)
            return w.call("Clip", name, w.number(float(low), dtype), w.number(float(high), dtype))
        case "leaky_relu":
            return w.call("LeakyRelu", name, alpha=float(numbers[0]) if numbers else 0.01)
        case "silu":
            return silu(w, name)
        case "hardsigmoid":
            return w.call("HardSigmoid", name, alpha=1 / 6, beta=0.5)
        case "gelu":
            return gelu(w, name)
        case "gelu_tanh":
            return gelu(w, name, "tanh")
        case "elu":
            return elu(w, name, *numbers)
        case "relu" | "hardswish" | "mish" | "sigmoid" | "tanh":
            operator = {"hardswish": "HardSwish"}.get(activation, activation.capitalize())
            return w.call(operator, name)
        case _:
            raise NoOnnxForm(f"the activation {activation}")


def activation(name: str) -> Callable[..., str]:
    def form(w: OnnxWriter, x: OnnxValue, *numbers: float) -> str:
        return activate(w, w.cast(x, w.result.dtype), name, numbers)

    return form


def sum_of(w: OnnxWriter, x: Number, y: Number, name: str | None, numbers: Sequence[float]) -> str:
    return activate(w, scaled("Add")(w, x, y), name, numbers)


FORMS: dict[str, Callable[..., Any]] = {
    "cnnfast.sum": sum_of,
    **{f"aten.{name}.default": activation(name) for name in ("relu", "hardtanh", "leaky_relu", "silu", "hardswish")},
    **{f"aten.{name}.default": activation(name) for name in ("hardsigmoid", "mish", "sigmoid", "tanh")},
    "aten.gelu.default": gelu,
    "aten.elu.default": elu,
    "aten.celu.default": lambda w, x, alpha=1.0: w.call("Celu", x, alpha=float(alpha)),
    "aten.selu.default": lambda w, x: w.call("Selu", x),
    "aten.prelu.default": prelu,
    "aten.softplus.default": softplus,
    "aten.threshold.default": threshold,
    "aten.log_sigmoid.default": lambda w, x: w.call("Neg", w.call("Softplus", w.call("Neg", x))),
}
