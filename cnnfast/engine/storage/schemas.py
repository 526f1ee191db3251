"""What an operator takes and gives, and whether the arguments of a call are that."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from ..operators import ACTIVATIONS, OPERATORS, OURS
from .plain_data import shortened

# What arithmetic on sizes takes: Scalar stands for a size.
PYTHON = {
    "getitem": "(Tensor[] values, int index) -> Tensor",
    **dict.fromkeys(("add", "sub", "mul", "floordiv", "mod", "max", "min"), "(int a, int b) -> int"),
    "neg": "(int a) -> int",
}
# Every word that an argument of a name may be.
WORDS: dict[str, Sequence[str]] = {
    "activation": tuple(ACTIVATIONS),
    "approximate": ("none", "tanh"),
    "rounding_mode": ("floor", "trunc"),
    "mode": ("constant", "reflect", "replicate", "circular"),
}
# Of einsum, which has a letter for each dimension.
EQUATION = re.compile("[a-zA-Z,.> -]{1,200}")
# Where and how tensors are made is the runner's affair.
MADE_WITH = ("device", "layout", "pin_memory", "memory_format")
# Of sizes, counts and places. Some kernels take no more, and no tensor of more elements than this is convolved.
LARGEST_NUMBER = 2**31 - 1
LARGEST_FLOAT = torch.finfo(torch.float32).max
TO_THE_END = 2**63 - 1  # what PyTorch has for the end of a slice that has none


@functools.cache
def schema(operator: str) -> torch.FunctionSchema:
    """Of a name in operators.OPERATORS."""
    kind, _, name = operator.partition(".")
    if kind == "aten":
        return OPERATORS[operator]._schema  # type: ignore[attr-defined]
    if kind == "python":
        return torch._C.parse_schema(f"python::{name}{PYTHON[name]}")
    return torch._C.parse_schema(torch.library.infer_schema(OURS[name], mutates_args=(), op_name=f"cnnfast::{name}"))


def gives(operator: str) -> str:
    """ "tensor", "number", or "tensors", of which getitem takes one."""
    returns = schema(operator).returns
    if len(returns) > 1 or returns[0].type.kind() == "ListType":
        return "tensors"
    return "tensor" if returns[0].type.kind() == "TensorType" else "number"


def by_name(operator: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call under their names. Raises ValueError for one too many, one that is missing or unknown."""
    takes = schema(operator).arguments
    positional = [argument.name for argument in takes if not argument.kwarg_only]
    if len(args) > len(positional):
        raise ValueError(f"{operator} takes {len(positional)} arguments, and gets {len(args)}")
    given = dict(zip(positional, args, strict=False))
    known = {argument.name for argument in takes}
    for name, value in kwargs.items():
        if name not in known or name in given:
            raise ValueError(f"{operator} gets an argument {name!r} {'twice' if name in given else 'unknown to it'}")
        given[name] = value
    for argument in takes:
        if argument.name not in given and not argument.has_default_value():
            raise ValueError(f"{operator} gets no argument {argument.name!r}")
    return given


def check_arguments(
    operator: str, args: Sequence[Any], kwargs: Mapping[str, Any], kinds: Mapping[fx.Node, str]
) -> None:
    """Raises ValueError where an operator cannot be called so: one argument too many, missing, unknown, or of another
    type. kinds: what each node before the call gives.
    """
    given = by_name(operator, args, kwargs)
    argument: Any  # pyright does not know N: of a list that may be given as one number, how many it stands for
    for argument in schema(operator).arguments:
        name = argument.name
        if name not in given or (name == "end" and given[name] == TO_THE_END):
            continue
        if name == "equation" and isinstance(given[name], str) and EQUATION.fullmatch(given[name]):
            continue
        unknown = isinstance(given[name], str) and given[name] not in WORDS.get(name, ())
        unknown |= name in MADE_WITH and given[name] not in (None, False)
        if unknown or not _fits(argument.real_type, argument.N, given[name], kinds, name == "other"):
            raise ValueError(f"{operator} takes {name!r} as {argument.real_type}, and gets {shortened(given[name])}")


def _fits(
    kind: Any, length: int | None, value: Any, kinds: Mapping[fx.Node, str], number_for_tensor: bool = False
) -> bool:
    """length: of lists that may be given as one number. number_for_tensor: PyTorch's operators of two tensors take a
    number for one.
    """
    gives_number = isinstance(value, fx.Node) and kinds[value] == "number"
    match kind.kind():
        case "OptionalType":
            return value is None or _fits(kind.getElementType(), length, value, kinds, number_for_tensor)
        case "ListType":
            element = kind.getElementType()
            if isinstance(value, fx.Node):
                return (kinds[value] == "tensors" and element.kind() == "TensorType") or (
                    length is not None and gives_number
                )
            if not isinstance(value, list | tuple):
                return length is not None and _fits(element, None, value, kinds)
            return all(_fits(element, None, one, kinds) for one in value)
        case "TensorType":
            if isinstance(value, fx.Node):
                return kinds[value] == "tensor" or (number_for_tensor and gives_number)
            return number_for_tensor and _in_bounds(value)
        case "IntType" | "SymIntType":
            return gives_number or (type(value) is int and _in_bounds(value))
        case "FloatType" | "NumberType":
            return gives_number or _in_bounds(value)
        case "BoolType":
            return type(value) is bool
        case "StringType":
            return isinstance(value, str)
        case "ScalarTypeType":
            return isinstance(value, torch.dtype)
        case _:
            return False


def _in_bounds(value: Any) -> bool:
    if type(value) is int:
        return abs(value) <= LARGEST_NUMBER
    return type(value) is float and (abs(value) <= LARGEST_FLOAT or not math.isfinite(value))
