"""Convolutions by oneDNN, with what follows them computed before the result is written, and by plain PyTorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..operators import OPERATORS
from ..plan import Step
from .activations import fused, in_place
from .products import pixelwise
from .routines import Lookup, Routine, Values, by_parameter

_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


def convolution(step: Step, lookup: Lookup, onednn: bool) -> Routine:
    given = by_parameter(step)
    if lookup.constant(given["weight"]) is None:  # a weight that is computed cannot be packed
        return plain(step, lookup)
    weight = lookup.constant(given["weight"])
    relu_after_sum = given["residual"] is not None and given["activation"] == "relu"
    assert weight is not None
    taps = weight.shape[2:].numel()
    moves = {*given["stride"], *given["dilation"], given["groups"]} != {1} or any(given["padding"])
    if taps == 1 and not moves and not (onednn and relu_after_sum):
        return pixelwise(step, lookup, onednn)
    return packed(step, lookup) if onednn and weight.dim() > 3 else plain(step, lookup)


def packed(step: Step, lookup: Lookup) -> Routine:
    given = by_parameter(step)
    weight, bias = lookup.constant(given["weight"]), lookup.constant(given["bias"])
    x, residual = lookup.number(given["x"]), lookup.optional_number(given["residual"])
    stride, padding, dilation = (list(given[name]) for name in ("stride", "padding", "dilation"))
    groups, activation, numbers = given["groups"], given["activation"], given["numbers"]
    operators = torch.ops.mkldnn
    shape = list(lookup.shape(given["x"]))
    weight = operators._reorder_convolution_weight(weight, padding, stride, dilation, groups, shape)
    where = (weight, bias, padding, stride, dilation, groups)
    name = "oneDNN convolution"

    if residual is None:
        last = fused(activation, numbers)
        pass_after = in_place(activation, numbers) if last is None else None
        attributes = last or ("none", [], "")
        convolve = operators._convolution_pointwise.default

        def compute(values: Values, out: None) -> Tensor:
            y = convolve(values[x], *where, *attributes)
            if pass_after is not None:
                pass_after(y)
            return y

        return Routine(name if activation is None or last is None else f"{name} + {activation}", compute)

    fuses_relu = activation == "relu"
    unary = ("relu" if fuses_relu else None, [], None)
    pass_after_sum = None if fuses_relu else in_place(activation, numbers)
    name = f"{name} + sum" + (" + relu" if fuses_relu else "")
    convolve_and_add = operators._convolution_pointwise.binary
    convolve_onto = operators._convolution_pointwise_.binary

    def add(values: Values, out: None) -> Tensor:
        y = convolve_and_add(values[x], values[residual], *where, "add", None, *unary)
        if pass_after_sum is not None:
            pass_after_sum(y)
        return y

    def add_in_place(values: Values, out: Tensor) -> Tensor:
        y = convolve_onto(out, values[x], *where, "add", None, *unary)
        if pass_after_sum is not None:
            pass_after_sum(y)
        return y

    if step.overwrites and step.overwrites == given["residual"].name:
        return Routine(name, add_in_place, takes_out=True)
    return Routine(name, add)


def plain(step: Step, lookup: Lookup) -> Routine:
    function: Any = OPERATORS[step.operator]
    arguments = by_parameter(step)
    weight = lookup.constant(arguments["weight"])
    parts = {name: lookup.fill(argument) for name, argument in arguments.items()}
    if weight is not None and weight.dim() in _FORMATS:
        weight = weight.contiguous(memory_format=_FORMATS[weight.dim()])
        parts["weight"] = lambda values: weight
    return Routine("PyTorch (convolution)", lambda values, out: function(**{k: f(values) for k, f in parts.items()}))
