"""Convolutions by oneDNN, with what follows them computed before the result is written, and by plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..operators import OPERATORS
from ..plan import Ref, Step
from .activations import fused, in_place
from .elementwise import by_pytorch
from .products import pixelwise
from .routines import Lookup, Routine, Values, by_parameter

_FORMATS = {3: torch.contiguous_format, 4: torch.channels_last, 5: torch.channels_last_3d}


def convolution(step: Step, lookup: Lookup, onednn: bool) -> Routine:
    given = by_parameter(step)
    if lookup.is_computed(given["weight"]) or lookup.is_computed(given["bias"]):
        return by_pytorch(step, lookup)  # there is nothing to pack before a run
    taps = lookup.shape(given["weight"])[2:]
    moves = {*taps, *given["stride"], *given["dilation"], given["groups"]} != {1} or any(given["padding"])
    # oneDNN's product adds a residual and its convolution a residual and then ReLU, without another pass over memory.
    relu_after_sum = given["residual"] is not None and given["activation"] == "relu"
    if not moves and not (onednn and relu_after_sum):
        return pixelwise(step, lookup, onednn)
    return packed(step, lookup) if onednn else plain(step, lookup)


def packed(step: Step, lookup: Lookup) -> Routine:
    """By oneDNN, which has convolutions of images and of volumes: one dimension is an image of one row."""
    given = by_parameter(step)
    weight, bias = lookup.constant(given["weight"]), lookup.constant(given["bias"])
    assert weight is not None
    stride, padding, dilation = (list(given[name]) for name in ("stride", "padding", "dilation"))
    shape = list(lookup.shape(given["x"]))
    tensors = 1 if given["residual"] is None else 2
    operator = _operator(step)
    if weight.dim() == 3:
        weight, stride, padding, dilation = weight.unsqueeze(2), [1, *stride], [0, *padding], [1, *dilation]
        shape.insert(2, 1)
        operator = _of_one_row(operator, tensors)
    reorder = torch.ops.mkldnn._reorder_convolution_weight
    groups: int = given["groups"]
    packed_weight = reorder(weight.contiguous(), padding, stride, dilation, groups, shape)
    arguments = (packed_weight, bias, padding, stride, dilation, groups)
    return (_alone if tensors == 1 else _adding)(step, lookup, operator, arguments)


def _operator(step: Step) -> Callable[..., Tensor]:
    given = by_parameter(step)
    if given["residual"] is None:
        return torch.ops.mkldnn._convolution_pointwise.default
    if _adds_in_place(step):
        return torch.ops.mkldnn._convolution_pointwise_.binary
    return torch.ops.mkldnn._convolution_pointwise.binary


def _adds_in_place(step: Step) -> bool:
    return bool(step.overwrites) and by_parameter(step)["residual"] == Ref(step.overwrites)


def _of_one_row(operator: Callable[..., Tensor], tensors: int) -> Callable[..., Tensor]:
    """The operator, for tensors [N, C, L] where it has images: its first arguments, as many as `tensors`."""

    def convolve(*arguments: Any) -> Tensor:
        images = [row.unsqueeze(2) for row in arguments[:tensors]]
        return operator(*images, *arguments[tensors:]).squeeze(2)

    return convolve


def _alone(step: Step, lookup: Lookup, convolve: Callable[..., Tensor], arguments: tuple[Any, ...]) -> Routine:
    given = by_parameter(step)
    x, activation = lookup.number(given["x"]), given["activation"]
    last = fused(activation, given["numbers"])
    arguments += last or ("none", [], "")
    activate = in_place(activation, given["numbers"]) if last is None else None

    def compute(values: Values, out: None) -> Tensor:
        y = convolve(values[x], *arguments)
        if activate is not None:
            activate(y)
        return y

    return Routine("oneDNN convolution" + (f" + {activation}" if last and activation else ""), compute)


def _adding(step: Step, lookup: Lookup, convolve: Callable[..., Tensor], arguments: tuple[Any, ...]) -> Routine:
    given = by_parameter(step)
    x, residual = lookup.number(given["x"]), lookup.number(given["residual"])
    is_relu = given["activation"] == "relu"  # the only one that oneDNN's operators fuse after a sum
    arguments += ("add", None, "relu" if is_relu else None, [], None)
    activate = None if is_relu else in_place(given["activation"], given["numbers"])
    in_place_of_residual = _adds_in_place(step)

    def compute(values: Values, out: Tensor | None) -> Tensor:
        if in_place_of_residual:
            y = convolve(out, values[x], *arguments)
        else:
            y = convolve(values[x], values[residual], *arguments)
        if activate is not None:
            activate(y)
        return y

    name = "oneDNN convolution + sum" + (" + relu" if is_relu else "")
    return Routine(name, compute, takes_out=in_place_of_residual)


def plain(step: Step, lookup: Lookup) -> Routine:
    """By PyTorch's convolution, with the weight laid out once."""
    function: Any = OPERATORS[step.operator]
    given = by_parameter(step)
    parts = {name: lookup.fill(argument) for name, argument in given.items() if name != "weight"}
    weight = lookup.constant(given["weight"])
    assert weight is not None
    weight = weight.contiguous(memory_format=_FORMATS[weight.dim()])

    def compute(values: Values, out: None) -> Tensor:
        return function(weight=weight, **{name: part(values) for name, part in parts.items()})

    return Routine("PyTorch (convolution)", compute)
