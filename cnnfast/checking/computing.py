"""The three ways to compute a captured call: PyTorch's own functions, ours, and the reference's formulas."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F

from .. import functional, reference
from ..activations import LEAKY_SLOPE, activate
from .capture import Captured, for_torch
from .tf32 import rounded_products

# the arguments of each, in the order of PyTorch's functions
CONVOLUTION = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
NORM = ("running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
NORM_OF_A_CONVOLUTION = ("running_mean", "running_var", "bn_weight", "bn_bias", "training", "momentum", "eps")


def by_pytorch(call: Captured, arguments: dict[str, Any]) -> Any:
    a = for_torch(arguments)
    match call.operation:
        case "global_avg_pool2d":
            y = F.adaptive_avg_pool2d(a["input"], 1)
            return y if a["keepdim"] else y.flatten(-3)
        case "conv_bn_act":
            y = F.batch_norm(_convolved(a), *(a[name] for name in NORM_OF_A_CONVOLUTION))
        case "conv_act":
            y = _convolved(a)
        case "bn_act":
            y = F.batch_norm(a["input"], *(a[name] for name in NORM))
        case _:
            return getattr(F, call.operation)(**a)
    y = y if a["residual"] is None else y + a["residual"]
    return activate(y, a["activation"], LEAKY_SLOPE if a["activation_arg"] is None else a["activation_arg"])


def _convolved(a: dict[str, Any]) -> Any:
    return F.conv2d(*(a[name] for name in CONVOLUTION))


def by_us(call: Captured, arguments: dict[str, Any]) -> Any:
    return getattr(functional, call.operation)(**arguments)


def by_reference(call: Captured, arguments: dict[str, Any]) -> Any:
    return getattr(reference, call.operation)(
        **{name: value for name, value in arguments.items() if name != "algorithm"}
    )


def by_reference_in_tf32(call: Captured, arguments: dict[str, Any]) -> Any:
    with rounded_products():
        return by_reference(call, arguments)
