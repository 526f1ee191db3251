"""What operators ask of their arguments beyond their schema, and do not find on meta tensors: there PyTorch computes
shapes, and leaves to the kernels to refuse the rest. What a file asks for is refused when it is planned.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..storage.schemas import schema

# All tensors that these take are floating, and of one dtype.
FLOATING = frozenset(
    (
        *("cnnfast.convolution", "cnnfast.linear", "cnnfast.affine", "cnnfast.sum"),
        *("aten.conv1d.default", "aten.conv2d.default", "aten.conv3d.default", "aten.linear.default"),
        *("aten.silu.default", "aten.hardswish.default", "aten.hardsigmoid.default"),
        "aten.hardtanh.default",
        *("aten.gelu.default", "aten.mish.default", "aten.leaky_relu.default", "aten.elu.default"),
        *("aten.avg_pool2d.default", "aten.adaptive_avg_pool2d.default", "aten.batch_norm.default"),
    )
)
# A split into parts of one element each would make as many tensors as there are elements. How many parts there are: of
# operators that take a list of lengths, it is as long as the list, and files have none of that length.
MOST_PARTS = 2**12
PARTS: dict[str, Callable[..., int]] = {
    "aten.chunk.default": lambda self, chunks, dim=0: min(chunks, self.shape[dim]),
    "aten.split.Tensor": lambda self, split_size, dim=0: self.shape[dim] // max(split_size, 1),
    "aten.tensor_split.sections": lambda self, sections, dim=0: sections,
    "aten.unbind.int": lambda self, dim=0: self.shape[dim],
}


def check_demands(operator: str, given: Mapping[str, Any]) -> None:
    """Raises ValueError where a kernel would refuse the call. given: the arguments by name, with tensors on meta."""
    dtypes = {value.dtype for value in given.values() if isinstance(value, Tensor)}
    if operator in FLOATING and (len(dtypes) > 1 or not all(dtype.is_floating_point for dtype in dtypes)):
        raise ValueError(f"takes tensors of one floating dtype, and gets {', '.join(sorted(map(str, dtypes)))}")
    _check_numbers(operator, given, dtypes)
    if operator in PARTS and PARTS[operator](**given) > MOST_PARTS:
        raise ValueError(f"makes more than {MOST_PARTS:,} parts")
    if operator in DEMANDS:
        DEMANDS[operator](given)


def _check_numbers(operator: str, given: Mapping[str, Any], dtypes: set[torch.dtype]) -> None:
    """Numbers that meet the elements of a tensor are converted to its dtype."""
    numbers: list[float] = list(given.get("numbers", []))
    for argument in schema(operator).arguments:
        value = given.get(argument.name)
        if str(argument.type) in ("number", "Optional[number]", "Tensor") and isinstance(value, int | float):
            numbers.append(value)
    for dtype in dtypes - {torch.bool}:
        limits = torch.finfo(dtype) if dtype.is_floating_point else torch.iinfo(dtype)
        for number in numbers:
            if math.isfinite(number) and not limits.min <= number <= limits.max:
                raise ValueError(f"takes the number {number}, which {dtype} does not have")


def _convolution(given: Mapping[str, Any]) -> None:
    x, weight, bias = given["x"] if "x" in given else given["input"], given["weight"], given.get("bias")
    dimensions = weight.dim() - 2
    if dimensions not in (1, 2, 3) or x.dim() != weight.dim() or 0 in weight.shape:
        raise ValueError(f"cannot convolve {list(x.shape)} with weights {list(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{weight.shape[0]} filters have a bias of shape {list(bias.shape)}")
    for name, least in (("stride", 1), ("padding", 0), ("dilation", 1)):
        numbers = given.get(name, [])
        numbers = [numbers] if isinstance(numbers, int) else numbers
        if len(numbers) not in (0, 1, dimensions) or any(number < least for number in numbers):
            raise ValueError(f"has {name} {list(numbers)} in {dimensions} dimensions")


def _linear(given: Mapping[str, Any]) -> None:
    weight, bias = given["weight"], given.get("bias")
    if weight.dim() != 2 or (bias is not None and bias.shape != weight.shape[:1]):
        raise ValueError(f"has weights {list(weight.shape)} and a bias of {bias if bias is None else list(bias.shape)}")


def _batch_norm(given: Mapping[str, Any]) -> None:
    """In training it would write into its statistics."""
    if given["training"] or given["running_mean"] is None or given["running_var"] is None or given["input"].dim() < 2:
        raise ValueError("takes the statistics of training, and an input with channels")


def _no_booleans(given: Mapping[str, Any]) -> None:
    if any(isinstance(value, Tensor) and value.dtype == torch.bool for value in given.values()):
        raise ValueError("takes no booleans")


def _division(given: Mapping[str, Any]) -> None:
    """Of integers, towards zero: dividing the least of them by -1 ends the process."""
    divisor = given["other"]
    is_safe = divisor not in (0, -1) if isinstance(divisor, int | float) else divisor.dtype.is_floating_point
    if given["rounding_mode"] == "trunc" and not given["self"].dtype.is_floating_point and not is_safe:
        raise ValueError("divides integers towards zero, by what may be 0 or -1")


def _attention(given: Mapping[str, Any]) -> None:
    if given.get("dropout_p", 0) != 0:
        raise ValueError("draws random numbers")


def _instance_norm(given: Mapping[str, Any]) -> None:
    """In training it would write into its statistics."""
    if given["use_input_stats"] and (given["running_mean"] is not None or given["running_var"] is not None):
        raise ValueError("writes into the statistics of training")


DEMANDS: dict[str, Callable[[Mapping[str, Any]], None]] = {
    "cnnfast.convolution": _convolution,
    "aten.conv1d.default": _convolution,
    "aten.conv2d.default": _convolution,
    "aten.conv3d.default": _convolution,
    "cnnfast.linear": _linear,
    "aten.linear.default": _linear,
    "aten.batch_norm.default": _batch_norm,
    "aten.div.Scalar_mode": _division,
    "aten.div.Tensor_mode": _division,
    "aten.instance_norm.default": _instance_norm,
    "aten.max_pool2d.default": _no_booleans,
    "aten.relu.default": _no_booleans,
    "aten.scaled_dot_product_attention.default": _attention,
    "aten.sub.Tensor": _no_booleans,
}
