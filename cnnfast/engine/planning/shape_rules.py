"""What shapes the commonest operators give, without asking PyTorch.

PyTorch's own rules for these are slow, being Python, and import its compiler when the first of them is asked, which a
process that only loads a network would have to wait for. PyTorch is asked for all other operators, and for arguments
that a rule does not know well.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..operators import OPERATORS, convolution

Given = Mapping[str, Any]  # the arguments of a call by name, with tensors on meta

# Element-wise operators that give booleans, or take them beside what is floating.
OF_BOOLEANS = re.compile(r"aten\.(eq|ne|lt|le|gt|ge|logical_\w+|is\w+|where|masked_fill)\.")


def given_by(operator: str, given: Given) -> Tensor | None:
    """The result on meta, of the right shape, dtype and order of strides; None if there is no rule. Raises ValueError
    where the arguments do not fit together.
    """
    return RULES[operator](given) if operator in RULES else None


def elementwise(given: Given) -> Tensor | None:
    """Of tensors of one floating dtype, where one has the shape of the result."""
    tensors = [value for value in given.values() if isinstance(value, Tensor)]
    if len({tensor.dtype for tensor in tensors}) != 1 or not tensors[0].is_floating_point():
        return None
    whole = max(tensors, key=lambda tensor: (tensor.dim(), tensor.numel()))
    fits = all(size in (1, wanted) for tensor in tensors for size, wanted in _from_behind(tensor, whole))
    return torch.empty_like(whole) if fits else None


def _from_behind(tensor: Tensor, whole: Tensor) -> zip[tuple[int, int]]:
    return zip(reversed(tensor.shape), reversed(whole.shape), strict=False)


def convolved(given: Given) -> Tensor:
    """Activations leave the shape, and the residual has it."""
    result = convolution(**{**given, "residual": None, "activation": None, "numbers": ()})
    residual = given["residual"]
    if residual is not None and (residual.shape, residual.dtype) != (result.shape, result.dtype):
        raise ValueError(f"the residual is {list(residual.shape)}, and the convolution gives {list(result.shape)}")
    return result


def affine(given: Given) -> Tensor | None:
    x = given["x"]
    result = elementwise(given)
    return result if result is not None and result.shape == x.shape else None


def product(given: Given) -> Tensor | None:
    x, weight = given["x"] if "x" in given else given["input"], given["weight"]
    if x.dim() < 2 or x.dtype != weight.dtype or weight.dim() != 2 or x.shape[-1] != weight.shape[1]:
        return None
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def concatenated(given: Given) -> Tensor | None:
    parts, dim = given["tensors"], given.get("dim", 0)
    first = parts[0]
    if not -first.dim() <= dim < first.dim():
        return None
    dim %= first.dim()
    frames = {(part.dtype, part.shape[:dim], part.shape[dim + 1 :], part.dim()) for part in parts}
    if len(frames) != 1:
        return None
    shape = list(first.shape)
    shape[dim] = sum(part.shape[dim] for part in parts)
    dense = (torch.empty_like(part) for part in parts)  # without the gaps of a part that is a slice itself
    image = len(shape) == 4 and all(part.is_contiguous(memory_format=torch.channels_last) for part in dense)
    layout = torch.channels_last if image else torch.contiguous_format
    return torch.empty(shape, dtype=first.dtype, device=first.device, memory_format=layout)


def reduced(given: Given) -> Tensor | None:
    x, dims = given["self"], given.get("dim")
    dims = dims or range(x.dim())
    if not x.is_floating_point() or given.get("dtype") is not None or 0 in x.shape:
        return None
    if not all(-x.dim() <= dim < x.dim() for dim in dims):
        return None
    over = {dim % x.dim() for dim in dims}
    if len(over) != len(dims):
        return None
    keep = given.get("keepdim", False)
    return x.new_empty([1 if i in over else n for i, n in enumerate(x.shape) if keep or i not in over])


def pooled_adaptively(given: Given) -> Tensor | None:
    x, size = given["self"], given["output_size"]
    if x.dim() != 4 or len(size) != 2 or 0 in x.shape or min(size) < 1 or not x.is_floating_point():
        return None
    return x.new_empty((*x.shape[:2], *size))


def batch_normed(given: Given) -> Tensor | None:
    x = given["input"]
    numbers = [given[name] for name in ("weight", "bias", "running_mean", "running_var")]
    fits = x.dim() >= 2 and all(n is None or n.shape == x.shape[1:2] for n in numbers)
    return torch.empty_like(x) if fits and not given["training"] else None


RULES: dict[str, Callable[[Given], Tensor | None]] = {
    **{
        name: elementwise
        for name, operator in OPERATORS.items()
        if torch.Tag.pointwise in getattr(operator, "tags", ()) and not OF_BOOLEANS.match(name)
    },
    "aten.hardswish.default": elementwise,
    "cnnfast.sum": elementwise,
    "cnnfast.affine": affine,
    "cnnfast.convolution": convolved,
    "cnnfast.linear": product,
    "aten.linear.default": product,
    "aten.cat.default": concatenated,
    "aten.mean.dim": reduced,
    "aten.adaptive_avg_pool2d.default": pooled_adaptively,
    "aten.batch_norm.default": batch_normed,
}
