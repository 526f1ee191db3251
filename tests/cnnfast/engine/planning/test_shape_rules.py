"""Rules give what PyTorch's own rules give, or nothing."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cnnfast.engine.operators import OPERATORS
from cnnfast.engine.planning import propagation
from cnnfast.engine.planning.planning import plan
from cnnfast.engine.planning.shape_rules import RULES, elementwise, given_by
from cnnfast.engine.storage.schemas import by_name, schema
from tests.support.planned import CASES, graph_of


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def by_rule(operator: str, *args: Any, **kwargs: Any) -> Tensor | None:
    return given_by(operator, by_name(operator, args, kwargs))


def image(*shape: int) -> Tensor:
    return meta(*shape).to(memory_format=torch.channels_last)


X, W = image(2, 6, 5, 7), meta(9, 6, 3, 3)
GEOMETRY = [2, 1], [1, 0], [1, 2], 1
CALLS: list[tuple[str, list[Any]]] = [
    ("cnnfast.convolution", [X, W, meta(9), None, *GEOMETRY, "relu", []]),
    ("cnnfast.convolution", [X, W, None, meta(2, 9, 3, 3), *GEOMETRY, "hardtanh", [0, 6]]),
    ("cnnfast.convolution", [meta(2, 6, 9), meta(4, 2, 3), None, None, [1], [0], [1], 3, None, []]),
    ("cnnfast.linear", [meta(2, 3, 6), meta(5, 6), meta(5), "gelu", []]),
    ("aten.linear.default", [meta(0, 6), meta(5, 6)]),
    ("cnnfast.affine", [X, meta(6, 1, 1), meta(6, 1, 1), X, "relu", []]),
    ("cnnfast.sum", [X, meta(6, 1, 1), None, []]),
    ("aten.add.Tensor", [meta(3), 2.5]),
    ("aten.hardswish.default", [X]),
    ("aten.clamp.Tensor", [X, meta(1, 6, 1, 1), meta(6, 1, 1)]),
    ("aten.cat.default", [[X, image(2, 1, 5, 7), X], 1]),
    ("aten.cat.default", [[X.chunk(2, 1)[0], X.chunk(3, 1)[2]], 1]),
    ("aten.cat.default", [[meta(2, 3), meta(2, 0), meta(2, 4)], -1]),
    ("aten.mean.dim", [X, [2, 3]]),
    ("aten.mean.dim", [X, [-1, -3], True]),
    ("aten.mean.dim", [X, None]),
    ("aten.adaptive_avg_pool2d.default", [X, [1, 3]]),
    ("aten.batch_norm.default", [X, None, meta(6), meta(6), meta(6), False, 0.1, 1e-5, False]),
]


@pytest.mark.parametrize(("operator", "args"), CALLS)
def test_a_rule_gives_what_pytorch_gives(operator, args):
    found, wanted = by_rule(operator, *args), OPERATORS[operator](*args)
    assert found is not None
    assert (found.shape, found.dtype, found.device) == (wanted.shape, wanted.dtype, wanted.device)
    if "conv" not in operator and "pool" not in operator:  # of which every result is an image
        assert found.stride() == wanted.stride()


UNKNOWN: list[tuple[str, list[Any]]] = [
    ("aten.add.Tensor", [meta(3, 1), meta(1, 4)]),  # neither has the result's shape
    ("aten.add.Tensor", [meta(3), meta(3, dtype=torch.float64)]),
    ("aten.add.Tensor", [meta(3, dtype=torch.int64), 0.5]),
    ("aten.add.Tensor", [meta(2, 0), meta(2, 1)]),
    ("aten.cat.default", [[meta(0), X], 1]),
    ("aten.cat.default", [[meta(2, 3), meta(2, 3, dtype=torch.int32)], 1]),
    ("aten.mean.dim", [X, [2, 2]]),
    ("aten.mean.dim", [X, [4]]),
    ("aten.adaptive_avg_pool2d.default", [meta(6, 5, 7), [1, 1]]),
    ("aten.linear.default", [meta(6), meta(5, 6)]),
    ("aten.linear.default", [meta(2, 6), meta(5, 7)]),
    ("aten.batch_norm.default", [X, None, None, meta(5), meta(5), False, 0.1, 1e-5, False]),
    ("cnnfast.affine", [meta(6, 1, 1), X, X, None, None, []]),
    ("aten.gt.Tensor", [X, X]),
]


@pytest.mark.parametrize(("operator", "args"), UNKNOWN)
def test_pytorch_is_asked_where_a_rule_does_not_know(operator, args):
    assert by_rule(operator, *args) is None


def test_a_residual_of_another_shape_is_refused():
    """It would be broadcast by the operator, and added in place by a runner."""
    with pytest.raises(ValueError, match=r"the residual is \[9, 1, 1\], and the convolution gives \[2, 9, 3, 3\]"):
        by_rule("cnnfast.convolution", X, W, None, meta(9, 1, 1), *GEOMETRY, None, [])


ELEMENTWISE = sorted(name for name, rule in RULES.items() if rule is elementwise)


@pytest.mark.parametrize("operator", ELEMENTWISE)
def test_every_element_wise_operator_gives_the_dtype_that_it_takes(operator):
    values = {"Tensor": image(2, 3, 4, 5), "number": 2, "int": 2, "float": 0.5}
    needed = [a for a in schema(operator).arguments if not a.has_default_value() or a.name == "min"]
    args = {a.name: values.get(re.sub(r"Optional\[(.*)\]", r"\1", str(a.type))) for a in needed}
    for dtype in (torch.float32, torch.bfloat16):
        given = {name: a.to(dtype) if isinstance(a, Tensor) else a for name, a in args.items()}
        if operator == "cnnfast.sum":
            given |= {"numbers": []}
        found, wanted = by_rule(operator, **given), OPERATORS[operator](**given)
        assert found is not None
        assert (found.shape, found.dtype, found.stride()) == (wanted.shape, wanted.dtype, wanted.stride())


SIZES = st.lists(st.integers(0, 3), max_size=4)


@given(SIZES, SIZES)
@settings(max_examples=150)
def test_broadcasting(one, other):
    try:
        wanted = torch.broadcast_shapes(one, other)
    except RuntimeError:
        wanted = None
    found = by_rule("aten.mul.Tensor", meta(*one), meta(*other))
    assert found is None or found.shape == wanted


def test_pytorch_is_asked_for_views_alone(monkeypatch):
    """Of which it knows the shapes without Python. Its rules in Python import torch._dynamo when they are first asked:
    a second, for a process that only loads a network.
    """
    asked = set()

    def noting(name):
        def operator(*args, **kwargs):
            asked.add(name)
            return OPERATORS[name](*args, **kwargs)

        return operator

    monkeypatch.setattr(propagation, "OPERATORS", {name: noting(name) for name in OPERATORS})
    for name in CASES:
        graph = graph_of(name)
        plan(graph, [(2, 4, 4, 8)] * len(graph.inputs))
    assert asked == {
        *("aten.reshape.default", "aten.flatten.using_ints", "aten.permute.default", "aten.transpose.int"),
        "aten.chunk.default",
    }
