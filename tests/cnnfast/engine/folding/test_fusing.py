"""Additions and activations are done by the call before them where that gives the same, and only there."""

from __future__ import annotations

import pytest
import torch

from cnnfast.engine.folding.folding import fold
from cnnfast.engine.folding.forms import CONVOLUTION
from cnnfast.engine.folding.sizes import Sizes
from cnnfast.engine.graph import Graph
from cnnfast.engine.planning.conditions import violated
from tests.support.agreement import integers
from tests.support.graphs import called, exactly_folded, written

aten = torch.ops.aten

IMAGE = (None, 4, None, None)
X = integers(3, 4, 6, 5, largest=3)
W = {"w": integers(4, 4, 3, 3), "v": integers(4, 4, 1, 1, seed=1)}
STATISTICS = {"mean": integers(4, seed=2), "var": torch.tensor([0.25, 1, 4, 16])}


def three(c, x):
    return aten.conv2d.default(x, c.w, None, [1, 1], [1, 1])


def one(c, x):
    return aten.conv2d.default(x, c.v)


def norm(c, x):
    return aten.batch_norm.default(x, None, None, c.mean, c.var, False, 0.1, 0.0, False)


def plus(x, y):
    return aten.add.Tensor(x, y)


def relu(x):
    return aten.relu.default(x)


def folded(network, *inputs, shapes=(IMAGE,)) -> Graph:
    return exactly_folded(written(network, *shapes, **W, **STATISTICS), *(inputs or (X,)))


@pytest.mark.parametrize(
    ("network", "calls"),
    [
        (lambda c, x: relu(plus(three(c, x), x)), {"cnnfast.convolution": 1}),
        (lambda c, x: relu(plus(x, three(c, x))), {"cnnfast.convolution": 1}),
        (lambda c, x: plus(x, three(c, x)), {"cnnfast.convolution": 1}),
        # the activation comes first, as in an inverted residual with one
        (lambda c, x: plus(relu(three(c, x)), x), {"cnnfast.convolution": 1, "aten.add.Tensor": 1}),
        (lambda c, x: relu(plus(relu(three(c, x)), x)), {"cnnfast.convolution": 1, "cnnfast.sum": 1}),
        # two activations
        (lambda c, x: aten.hardtanh.default(relu(three(c, x)), -9, 9),
         {"cnnfast.convolution": 1, "aten.hardtanh.default": 1}),
        # two additions
        (lambda c, x: relu(plus(plus(three(c, x), x), x)), {"cnnfast.convolution": 1, "cnnfast.sum": 1}),
        # of two convolutions one adds the other
        (lambda c, x: relu(plus(three(c, x), one(c, three(c, x)))), {"cnnfast.convolution": 3}),
        # a convolution before a batch norm that stands by itself
        (lambda c, x: relu(plus(norm(c, x), one(c, three(c, x)))), {"cnnfast.convolution": 2, "cnnfast.affine": 1}),
        (lambda c, x: relu(plus(norm(c, x), x)), {"cnnfast.affine": 1}),
        (lambda c, x: relu(plus(x, relu(x))), {"aten.relu.default": 1, "cnnfast.sum": 1}),
        # twice the same, and not once
        (lambda c, x: (y := three(c, x), plus(y, y))[1], {"cnnfast.convolution": 1, "aten.add.Tensor": 1}),
        # a factor
        (lambda c, x: relu(aten.add.Tensor(three(c, x), x, alpha=2)),
         {"cnnfast.convolution": 1, "aten.add.Tensor": 1, "aten.relu.default": 1}),
        # somebody else wants what the convolution, or the addition, gives
        (lambda c, x: (y := three(c, x), plus(y, x), relu(y)),
         {"cnnfast.convolution": 1, "aten.add.Tensor": 1, "aten.relu.default": 1}),
        (lambda c, x: (y := plus(three(c, x), x), relu(y)), {"cnnfast.convolution": 1, "aten.relu.default": 1}),
        (lambda c, x: (y := plus(x, relu(x)), relu(y)), {"aten.relu.default": 2, "aten.add.Tensor": 1}),
    ],
)  # fmt: skip
def test_what_one_call_does(network, calls):
    assert called(folded(network)) == calls


def test_of_two_convolutions_the_later_one_adds():
    def network(c, x):
        early = three(c, x)
        late = one(c, relu(three(c, x)))
        return relu(plus(late, early)), relu(plus(early, late))

    for pick in (0, 1):
        graph = folded(lambda c, x, pick=pick: network(c, x)[pick])
        calls = [node for node in graph.calls.nodes if node.target is CONVOLUTION]
        assert len(calls) == 3
        early, late = calls[0], calls[2]
        assert late.args[3] is early
        assert late.args[8] == "relu"


def test_a_residual_that_is_computed_later_is_there_in_time():
    def network(c, x):
        y = three(c, x)
        z = relu(aten.max_pool2d.default(x, [3, 3], [1, 1], [1, 1]))
        return relu(plus(y, z))

    graph = folded(network)
    assert called(graph) == {"cnnfast.convolution": 1, "aten.max_pool2d.default": 1, "aten.relu.default": 1}
    assert [node.op for node in graph.calls.nodes][-1] == "output"
    graph.calls.lint()


@pytest.mark.parametrize(
    ("residual", "shape"),
    [
        (lambda c, x: aten.amax.default(x, [2, 3], True), IMAGE),  # [N, 4, 1, 1]: equal to the rest for one size only
        (lambda c, x: aten.amax.default(x, [1], True), IMAGE),
        (lambda c, x: aten.amax.default(x, [0], True), IMAGE),
        (lambda c, x: c.one_for_each_place, (None, 4, 6, 5)),
        (lambda c, x: c.as_the_result, (3, 4, 6, 5)),  # a constant is no value that a runner has in a buffer
    ],
)
def test_a_residual_that_is_broadcast_is_added_by_itself(residual, shape):
    more = {"one_for_each_place": integers(6, 5), "as_the_result": integers(3, 4, 6, 5)}
    graph = written(lambda c, x: relu(plus(three(c, x), residual(c, x))), shape, **W, **more)
    calls = called(exactly_folded(graph, X))
    assert calls["cnnfast.convolution"] == calls["cnnfast.sum"] == 1


def test_a_convolution_that_is_broadcast_adds_nothing():
    """Its result is smaller than the sum's."""

    def network(c, x):
        pooled = aten.adaptive_avg_pool2d.default(x, [1, 1])
        return relu(plus(one(c, pooled), x))

    calls = called(folded(network, X.new_ones(3, 4, 4, 4)))
    assert calls == {"aten.adaptive_avg_pool2d.default": 1, "cnnfast.convolution": 1, "cnnfast.sum": 1}


def test_two_inputs_whose_sizes_are_free_may_differ():
    """Both have four channels and may have one row: nothing says that they are equal."""
    graph = written(lambda c, x, y: relu(plus(one(c, x), y)), IMAGE, (1, 4, None, None), **W)
    assert called(exactly_folded(graph, X, X[:1])) == {"cnnfast.convolution": 1, "cnnfast.sum": 1}


def test_sizes_are_found_that_satisfy_the_conditions():
    graph = written(lambda c, x: relu(plus(one(c, x), x)), IMAGE, **W)
    graph.conditions = ("size(0, 2) % 7 == 0", "size(0, 2) == size(0, 3)")
    sizes = Sizes(graph)
    assert len(sizes.runs) >= 2
    assert not any(violated(graph.conditions, shapes) for shapes in sizes.shapes)


def test_what_fits_one_size_only_is_not_proven():
    """Of a network that no usual size suits, only that of the example is known, and whether sizes are equal is not."""
    graph = written(lambda c, x: relu(plus(one(c, x), x)), IMAGE, **W)
    graph.conditions = ("size(0, 2) == 11",)
    x = integers(2, 4, 11, 3)
    for example, name in ((None, "aten.conv2d.default"), (((2, 4, 11, 3),), "cnnfast.convolution")):
        ours = fold(graph, torch.float32, example)
        assert called(ours) == {name: 1, "cnnfast.sum": 1}
        assert torch.equal(ours.run([x])[0], graph.run([x])[0])
