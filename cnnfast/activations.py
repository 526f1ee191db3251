"""The activations by name, in plain PyTorch: what the fused kernels compute, for the paths that PyTorch takes."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Real
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from .spelling import fold, quoted, unknown_value, word_for

ActivationName = Literal[
    "relu", "leaky_relu", "relu6", "gelu", "gelu_tanh", "silu", "hardswish", "mish", "hardsigmoid", "prelu"
]
ACTIVATION_NAMES: tuple[ActivationName | None, ...] = (None, *get_args(ActivationName))
# What other libraries call them, and what they have that no kernel computes, as spelling.py folds words.
OTHER_ACTIVATION_NAMES: dict[str, ActivationName | None] = {
    **dict.fromkeys(("", "none", "linear", "identity"), None),
    **dict.fromkeys(("leaky", "lrelu"), "leaky_relu"),
    **dict.fromkeys(("geluerf", "geluexact"), "gelu"),
    **dict.fromkeys(("geluapproximate", "gelufast", "gelunew", "gelupytorchtanh"), "gelu_tanh"),
    **dict.fromkeys(("swish", "swishme"), "silu"),
    **dict.fromkeys(("hswish", "hardswishme"), "hardswish"),
    "hsigmoid": "hardsigmoid",
}
NOT_COMPUTED = (
    *("celu", "elu", "glu", "hardshrink", "hardtanh", "logsigmoid", "quickgelu", "relu2", "rrelu", "selu", "sigmoid"),
    *("softmax", "softmin", "softplus", "softshrink", "softsign", "swiglu", "tanh", "tanhshrink", "threshold"),
)

LEAKY_SLOPE = 0.01

# of an argument and a slope: a number for leaky_relu, a tensor [1] or [C] for prelu, and for the others ignored
ACTIVATIONS: dict[ActivationName | None, Callable[[Tensor, Any], Tensor]] = {
    None: lambda u, slope: u,
    "relu": lambda u, slope: F.relu(u),
    "leaky_relu": F.leaky_relu,
    "relu6": lambda u, slope: F.relu6(u),
    "gelu": lambda u, slope: F.gelu(u),
    "gelu_tanh": lambda u, slope: F.gelu(u, approximate="tanh"),
    "silu": lambda u, slope: F.silu(u),
    "hardswish": lambda u, slope: F.hardswish(u),
    "mish": lambda u, slope: F.mish(u),
    "hardsigmoid": lambda u, slope: F.hardsigmoid(u),
    "prelu": F.prelu,
}


def activate(u: Tensor, activation: ActivationName | None, slope: float | Tensor = LEAKY_SLOPE) -> Tensor:
    return ACTIVATIONS[activation](u, slope)


def slopes_of(activation: ActivationName | None, activation_arg: float | Tensor | None) -> tuple[float, Tensor | None]:
    """(leaky_relu's slope, prelu's slopes) of what check_activation has let pass."""
    if activation == "prelu":
        assert isinstance(activation_arg, Tensor)
        return LEAKY_SLOPE, activation_arg
    return LEAKY_SLOPE if activation_arg is None else float(activation_arg), None


def check_slopes(function: str, slopes: Tensor, channels: int, dtype: torch.dtype) -> None:
    """Raises ValueError, in the name of `function`, for slopes that prelu does not take of so many channels."""
    if slopes.shape not in ((1,), (channels,)):
        raise ValueError(
            f"{function}(): activation_arg must be prelu's slope for all channels, of size [1], or one for each, of "
            f"size [{channels}], but got {list(slopes.shape)}"
        )
    if slopes.dtype != dtype:
        raise ValueError(
            f"{function}(): activation_arg, prelu's slope, must have the result's dtype {dtype}, but got {slopes.dtype}"
        )


def check_activation(function: str, activation: ActivationName | None, activation_arg: float | Tensor | None) -> None:
    """Raises, in the name of `function`, ValueError for an unknown activation or an argument that it does not take, and
    TypeError for a slope of another type than its activation has.
    """
    if activation not in ACTIVATION_NAMES:
        raise _unknown_activation(function, activation)
    if activation == "prelu":
        if not isinstance(activation_arg, Tensor):
            raise TypeError(
                f"{function}(): activation_arg must be prelu's slope, a tensor of size [1] or of one value a channel, "
                f"but got activation_arg={activation_arg!r}"
            )
    elif activation_arg is not None and activation != "leaky_relu":
        raise ValueError(
            f"{function}(): activation_arg is leaky_relu's slope, or prelu's, "
            f"but got activation_arg={activation_arg} for {activation!r}"
        )
    elif activation_arg is not None and not isinstance(activation_arg, Real | torch.SymFloat):
        raise TypeError(
            f"{function}(): activation_arg must be leaky_relu's slope, a number (a tensor of slopes is for prelu), "
            f"but got activation_arg={activation_arg!r}"
        )


def _unknown_activation(function: str, activation: object) -> ValueError:
    """The error for what is no name of an activation. Whoever gives a module, a class or a function is told the name
    that stands for it.
    """
    if fold(word_for(activation)) in NOT_COMPUTED:
        given = f"activation={activation!r}, which no kernel computes: give None, and apply it to the result"
        return ValueError(f"{function}(): activation must be {quoted(ACTIVATION_NAMES)}, but got {given}")
    if getattr(activation, "approximate", "none") == "tanh":
        return unknown_value(function, "activation", activation, ACTIVATION_NAMES, {"gelu": "gelu_tanh"})
    return unknown_value(function, "activation", activation, ACTIVATION_NAMES, OTHER_ACTIVATION_NAMES)
