"""What is planned can be run: no kernel refuses what was accepted on meta tensors."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from cnnfast.engine.operators import OPERATORS
from cnnfast.engine.planning import plain
from cnnfast.engine.planning.demands import FLOATING, PARTS, check_demands
from cnnfast.engine.planning.planning import plan
from cnnfast.engine.storage.graph_json import from_data
from cnnfast.engine.storage.schemas import by_name, schema
from tests.support.random_calls import graph_of_one_call


def test_no_kernel_refuses_what_was_planned():
    """Fifty calls of each operator, most of which nothing accepts. Of those that convolutional networks are made of
    none is refused when it runs; of others some are, in PyTorch's words, and none ends the process.
    """
    ran: Counter[str] = Counter()
    for operator in OPERATORS:
        for index in range(50):
            data, inputs = graph_of_one_call(f"{operator} {index}", operator)
            try:
                graph = from_data(data, {})
                planned = plan(graph, [tuple(x.shape) for x in inputs])
            except ValueError:
                continue
            try:
                results = plain.run(planned, {}, inputs)
            except (IndexError, NotImplementedError, RuntimeError, ValueError) as error:
                if operator in FLOATING:
                    raise AssertionError(f"{operator}, {index}: planned, and then {error}: {data}") from error
                continue
            value = planned.values[planned.results[0]]
            assert (results[0].shape, results[0].dtype) == (value.shape, value.dtype)
            ran[operator] += 1
    assert len(ran) > len(OPERATORS) / 2


X, WEIGHT = torch.empty(2, 4, 6, 6, device="meta"), torch.empty(8, 4, 3, 3, device="meta")
NARROW, PART = torch.empty(4, device="meta"), torch.empty(8, device="meta")


def named(operator: str, args: tuple) -> dict:
    """A rounding mode is given by its name."""
    by_place = len([one for one in schema(operator).arguments if not one.kwarg_only])
    return by_name(operator, args[:by_place], {"rounding_mode": args[-1]} if args[by_place:] else {})


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


CONVOLUTION = (X, WEIGHT, None, None, [1, 1], [0, 0], [1, 1], 1, None, [])


@pytest.mark.parametrize(
    ("operator", "args", "message"),
    [
        (
            "cnnfast.convolution",
            (X.half(), *CONVOLUTION[1:]),
            "one floating dtype, and gets torch.float16, torch.float32",
        ),
        ("cnnfast.convolution", (X.int(), WEIGHT.int(), *CONVOLUTION[2:]), "one floating dtype, and gets torch.int32"),
        ("cnnfast.convolution", (X, WEIGHT, NARROW, *CONVOLUTION[3:]), r"8 filters have a bias of shape \[4\]"),
        (
            "cnnfast.convolution",
            (X, meta(8, 4, 3), *CONVOLUTION[2:]),
            r"cannot convolve \[2, 4, 6, 6\] with weights \[8, 4, 3\]",
        ),
        ("cnnfast.convolution", (X, meta(0, 4, 3, 3), *CONVOLUTION[2:]), "cannot convolve"),
        ("cnnfast.convolution", (X, meta(8, 4), *CONVOLUTION[2:]), "cannot convolve"),
        (
            "cnnfast.convolution",
            (*CONVOLUTION[:4], [1, 1, 1], *CONVOLUTION[5:]),
            r"has stride \[1, 1, 1\] in 2 dimensions",
        ),
        ("cnnfast.convolution", (*CONVOLUTION[:4], [1, 0], *CONVOLUTION[5:]), r"has stride \[1, 0\]"),
        ("aten.conv2d.default", (X, WEIGHT, None, 1, -1), r"has padding \[-1\] in 2 dimensions"),
        ("aten.conv2d.default", (X, WEIGHT, None, 1, 1, [0, 1]), r"has dilation \[0, 1\]"),
        ("aten.linear.default", (X, meta(6)), "has weights"),
        ("cnnfast.linear", (X, meta(8, 6), meta(6), None, []), "has weights"),
        ("aten.batch_norm.default", (X, None, None, NARROW, NARROW, True, 0.1, 1e-5, False), "statistics of training"),
        ("aten.batch_norm.default", (X, None, None, NARROW, None, False, 0.1, 1e-5, False), "statistics of training"),
        ("aten.sub.Tensor", (X.bool(), X), "takes no booleans"),
        ("aten.div.Tensor_mode", (X.long(), X.long(), "trunc"), "divides integers towards zero"),
        ("aten.div.Scalar_mode", (X.long(), -1, "trunc"), "divides integers towards zero"),
        ("aten.scaled_dot_product_attention.default", (X, X, X, None, 0.5), "draws random numbers"),
        ("aten.instance_norm.default", (X, None, None, NARROW, NARROW, True, 0.1, 1e-5, False), "writes into"),
        ("aten.chunk.default", (meta(10**6), 10**5), "makes more than 4,096 parts"),
        ("aten.split.Tensor", (meta(10**6, 2), 1), "makes more than 4,096 parts"),
        (
            "aten.hardtanh.default",
            (X.half(), 0, 70000.0),
            "takes the number 70000.0, which torch.float16 does not have",
        ),
        ("cnnfast.sum", (X.half(), X.half(), "hardtanh", [0, 70000.0]), "takes the number 70000.0"),
    ],
)
def test_what_is_refused(operator, args, message):
    with pytest.raises(ValueError, match=message):
        check_demands(operator, named(operator, args))


@pytest.mark.parametrize(
    ("operator", "args"),
    [
        ("cnnfast.convolution", CONVOLUTION),
        ("cnnfast.convolution", (X, WEIGHT, PART, None, [2], [0], [1], 1, "hardtanh", [0, float("inf")])),
        ("aten.conv2d.default", (X, WEIGHT, PART, 2, [1, 0])),
        ("aten.add.Tensor", (X, X.int())),
        ("aten.sub.Tensor", (X.int(), X.int())),
        ("aten.chunk.default", (meta(10**6), 2)),
        ("aten.split.Tensor", (meta(10**6, 2), 1, 1)),
    ],
)
def test_what_is_not_refused(operator, args):
    check_demands(operator, by_name(operator, args, {}))


def test_every_operator_that_gives_several_tensors_is_bounded():
    """By PARTS, by a list of lengths, or because there are always so many."""
    for operator in OPERATORS:
        returns = schema(operator).returns
        if returns[0].type.kind() == "ListType":
            lengths = any(one.name in ("split_size", "split_sizes", "indices") for one in schema(operator).arguments)
            assert operator in PARTS or lengths, operator
