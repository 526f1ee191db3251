"""What operators take: the number of arguments, their names and their types."""

from __future__ import annotations

import math

import pytest
import torch
from torch import fx

from cnnfast.engine.operators import OPERATORS
from cnnfast.engine.storage.schemas import by_name, check_arguments, gives, schema

CALLS = fx.Graph()
TENSOR, TENSORS, NUMBER = (CALLS.placeholder(name) for name in ("tensor", "tensors", "number"))
KINDS = {TENSOR: "tensor", TENSORS: "tensors", NUMBER: "number"}
CONVOLUTION = (TENSOR, TENSOR, None, None, [1, 1], [0, 0], [1, 1], 1, None, [])


def test_every_operator_has_a_schema():
    for operator in OPERATORS:
        assert schema(operator).arguments
        assert gives(operator) in ("tensor", "tensors", "number")


def test_what_operators_give():
    assert gives("aten.relu.default") == gives("cnnfast.convolution") == gives("python.getitem") == "tensor"
    assert gives("aten.chunk.default") == gives("aten.split.Tensor") == "tensors"
    assert gives("aten.sym_size.int") == gives("python.floordiv") == "number"


def test_arguments_by_name():
    assert by_name("aten.add.Tensor", (1, 2), {"alpha": 3}) == {"self": 1, "other": 2, "alpha": 3}
    assert by_name("aten.sym_size.int", (1,), {"dim": 3}) == {"self": 1, "dim": 3}
    assert by_name("cnnfast.sum", (1, 2, None, []), {}) == {"x": 1, "y": 2, "activation": None, "numbers": []}


@pytest.mark.parametrize(
    ("operator", "args", "kwargs"),
    [
        ("cnnfast.convolution", CONVOLUTION, {}),
        ("cnnfast.convolution", (TENSOR, TENSOR, TENSOR, TENSOR, [1], [NUMBER], [1], 1, "hardtanh", [0, 6.0]), {}),
        ("cnnfast.sum", (TENSOR, TENSOR, "hardtanh", [0, math.inf]), {}),
        ("aten.conv2d.default", (TENSOR, TENSOR), {}),
        ("aten.conv2d.default", (TENSOR, TENSOR, None, 2, [1, 1], 1, 4), {}),
        ("aten.max_pool2d.default", (TENSOR, 2), {}),
        ("aten.mean.dim", (TENSOR, None, True), {"dtype": torch.float64}),
        ("aten.mean.dim", (TENSOR, [1, 2]), {"dtype": None}),
        ("aten.add.Tensor", (TENSOR, 2.5), {"alpha": NUMBER}),
        ("aten.mul.Tensor", (TENSOR, NUMBER), {}),
        ("aten.cat.default", ([TENSOR, TENSOR], 1), {}),
        ("aten.cat.default", (TENSORS,), {}),
        ("aten.reshape.default", (TENSOR, [-1, NUMBER, 2**31 - 1]), {}),
        ("aten.clamp.default", (TENSOR, None, 6), {}),
        ("aten.gelu.default", (TENSOR,), {"approximate": "tanh"}),
        ("python.getitem", (TENSORS, -1), {}),
        ("python.mul", (NUMBER, 7), {}),
    ],
)
def test_calls_that_can_be_made(operator, args, kwargs):
    check_arguments(operator, args, kwargs, KINDS)


@pytest.mark.parametrize(
    ("operator", "args", "kwargs", "message"),
    [
        ("cnnfast.convolution", CONVOLUTION[:-1], {}, "cnnfast.convolution gets no argument 'numbers'"),
        ("cnnfast.convolution", (*CONVOLUTION, 1), {}, "takes 10 arguments, and gets 11"),
        ("cnnfast.convolution", (*CONVOLUTION[:-2], "nothing", []), {}, "takes 'activation' .*, and gets 'nothing'"),
        ("cnnfast.convolution", (*CONVOLUTION[:-2], ["relu"], []), {}, r"takes 'activation' .*, and gets \['relu'\]"),
        ("cnnfast.convolution", (*CONVOLUTION[:-1], None), {}, "takes 'numbers' as .*, and gets None"),
        ("cnnfast.convolution", (TENSOR, TENSORS, *CONVOLUTION[2:]), {}, "takes 'weight' as Tensor, and gets tensors"),
        ("cnnfast.convolution", (TENSOR, 1.0, *CONVOLUTION[2:]), {}, "takes 'weight' as Tensor, and gets 1.0"),
        ("aten.relu.default", (TENSOR,), {"self": TENSOR}, "gets an argument 'self' twice"),
        ("aten.relu.default", (TENSOR,), {"inplace": True}, "gets an argument 'inplace' unknown to it"),
        ("aten.relu.default", (), {}, "gets no argument 'self'"),
        ("aten.relu.default", (NUMBER,), {}, "takes 'self' as Tensor, and gets number"),
        ("aten.relu.default", (2.5,), {}, "takes 'self' as Tensor, and gets 2.5"),
        ("aten.gelu.default", (TENSOR, "tanh"), {}, "takes 1 arguments, and gets 2"),
        ("aten.gelu.default", (TENSOR,), {"approximate": "a" * 10**5}, "takes 'approximate' as str"),
        ("aten.reshape.default", (TENSOR, [2.0]), {}, "takes 'shape'"),
        ("aten.reshape.default", (TENSOR, [True]), {}, "takes 'shape'"),
        ("aten.reshape.default", (TENSOR, [2**31]), {}, "takes 'shape'"),
        ("aten.reshape.default", (TENSOR, [2**63 - 1]), {}, "takes 'shape'"),
        ("aten.reshape.default", (TENSOR, 2), {}, "takes 'shape'"),
        ("aten.reshape.default", (TENSOR, TENSORS), {}, "takes 'shape'"),
        ("aten.conv2d.default", (TENSOR, TENSOR, None, TENSOR), {}, "takes 'stride'"),
        ("aten.conv2d.default", (TENSOR, TENSOR, None, "same"), {}, "takes 'stride'"),
        ("aten.flatten.using_ints", (TENSOR, 1.5), {}, "takes 'start_dim'"),
        ("aten.mean.dim", (TENSOR, [0], 1), {}, "takes 'keepdim'"),
        ("aten.mean.dim", (TENSOR, [0]), {"dtype": 6}, "takes 'dtype'"),
        ("aten.mean.dim", (TENSOR, [0]), {"dtype": "float32"}, "takes 'dtype'"),
        ("aten.clamp.default", (TENSOR, 1e39), {}, "takes 'min'"),
        ("aten.clamp.default", (TENSOR, True), {}, "takes 'min'"),
        ("aten.cat.default", ([TENSOR, 1.0],), {}, "takes 'tensors'"),
        ("aten.cat.default", (TENSOR,), {}, "takes 'tensors'"),
        ("python.getitem", (TENSOR, 0), {}, "takes 'values'"),
        ("python.mul", (TENSOR, 2), {}, "takes 'a'"),
        ("python.mul", (NUMBER, [1] * 9), {}, "takes 'b'"),
        ("python.floordiv", (7.5, 2), {}, "takes 'a'"),
    ],
)
def test_calls_that_cannot_be_made(operator, args, kwargs, message):
    with pytest.raises(ValueError, match=message):
        check_arguments(operator, args, kwargs, KINDS)


def test_the_end_of_a_slice_may_be_behind_all_sizes():
    slices = [name for name in OPERATORS if name.startswith("aten.slice.")]
    for operator in slices:
        check_arguments(operator, (TENSOR, 2, 1, 2**63 - 1, 2), {}, KINDS)
        for args in (
            (TENSOR, 2, 2**63 - 1),
            (TENSOR, 2, 1, 2**63 - 2),
            (TENSOR, 2**63 - 1),
            (TENSOR, 2, 1, 1, 2**63 - 1),
        ):
            with pytest.raises(ValueError, match=f"{operator} takes"):
                check_arguments(operator, args, {}, KINDS)
