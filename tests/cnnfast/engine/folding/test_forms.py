"""Whatever convolutions and products with constant matrices are called by, they become one operator each."""

from __future__ import annotations

import pytest
import torch

from cnnfast.engine.folding.forms import CONVOLUTION
from tests.support.agreement import integers
from tests.support.graphs import called, exactly_folded, written

aten = torch.ops.aten


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("options", [(), ([2],), ([1], [1], [2], 2), ([2, 1, 1], [0, 1, 2])])
def test_convolutions(dims, options):
    """PyTorch takes one number for all dimensions, or one for each."""
    convolve = (aten.conv1d, aten.conv2d, aten.conv3d)[dims - 1].default
    options = [option[:dims] if isinstance(option, list) else option for option in options]
    filters = integers(6, 4 // [*options, 1, 1, 1, 1][3] if len(options) == 4 else 4, *[3] * dims)
    graph = written(lambda c, x: convolve(x, c.w, c.b, *options), (None, 4, *[None] * dims), w=filters, b=integers(6))
    folded = exactly_folded(graph, integers(2, 4, *[7] * dims, seed=1))
    (call,) = [node for node in folded.calls.nodes if node.op == "call_function"]
    assert call.target is CONVOLUTION
    assert [len(numbers) for numbers in call.args[4:7]] == [dims] * 3


@pytest.mark.parametrize(
    ("network", "shape"),
    [
        (lambda c, x: aten.conv2d.default(x, c.w), (4, None, None)),  # no batch
        (lambda c, x: aten.conv2d.default(x, aten.relu.default(x)), (1, 1, 3, 3)),  # weights that are computed
        (lambda c, x: aten.conv2d.default(x, c.w, aten.mean.dim(x, [0, 2, 3])), (None, 4, None, None)),
    ],
)
def test_convolutions_that_stay(network, shape):
    graph = written(network, shape, w=integers(4, 4, 3, 3))
    x = integers(*[size or 4 for size in shape], seed=1)
    calls = called(exactly_folded(graph, x if "mean" not in str(graph.calls) else torch.ones_like(x)))
    assert "cnnfast.convolution" not in calls


MATRICES = {"w": integers(4, 5), "t": integers(5, 4), "b": integers(4, seed=1), "rows": integers(3, 4)}


@pytest.mark.parametrize(
    "network",
    [
        lambda c, x: aten.linear.default(x, c.w, c.b),
        lambda c, x: aten.linear.default(x, c.w),
        lambda c, x: aten.addmm.default(c.b, x, c.t),
        lambda c, x: aten.mm.default(x, c.t),
        lambda c, x: aten.matmul.default(x, c.t),
        lambda c, x: aten.add.Tensor(aten.matmul.default(x, aten.transpose.int(c.w, 0, 1)), c.b),
    ],
)
def test_products(network):
    assert called(exactly_folded(written(network, (3, 5), **MATRICES), integers(3, 5))) == {"cnnfast.linear": 1}


@pytest.mark.parametrize(
    ("network", "shape"),
    [
        (lambda c, x: aten.addmm.default(c.b, x, c.t, beta=2), (3, 5)),
        (lambda c, x: aten.addmm.default(c.b, x, c.t, alpha=2), (3, 5)),
        (lambda c, x: aten.addmm.default(c.rows, x, c.t), (3, 5)),  # another addend for each row
        (lambda c, x: aten.matmul.default(c.w, x), (5, 3)),  # the constant stands on the left
        (lambda c, x: aten.matmul.default(x, aten.relu.default(x)), (3, 3)),
    ],
)
def test_products_that_stay(network, shape):
    calls = called(exactly_folded(written(network, shape, **MATRICES), integers(*shape)))
    assert "cnnfast.linear" not in calls
