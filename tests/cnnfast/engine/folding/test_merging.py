"""Branches of one value that are added are one convolution where that is exact, and only there."""

from __future__ import annotations

import pytest
import torch

from tests.support.agreement import integers
from tests.support.graphs import called, exactly_folded, written

aten = torch.ops.aten

IMAGE = (None, 4, None, None)
X = integers(2, 4, 7, 6, largest=2)
CONSTANTS = {
    "w3": integers(4, 4, 3, 3),
    "v3": integers(4, 4, 3, 3, seed=1),
    "w1": integers(4, 4, 1, 1, seed=2),
    "w5": integers(4, 4, 5, 5, seed=3),
    "row": integers(4, 4, 1, 3, seed=4),
    "column": integers(4, 4, 3, 1, seed=5),
    "grouped3": integers(4, 2, 3, 3, seed=6),
    "grouped1": integers(4, 2, 1, 1, seed=7),
    "deep": integers(4, 1, 3, 3, seed=8),
    "b": integers(4, seed=9),
    "gamma": integers(4, largest=3, seed=10),
    "mean": integers(4, seed=11),
    "var": torch.tensor([0.25, 1, 4, 16]),
}


def conv(x, w, padding=0, stride=1, dilation=1, groups=1, bias=None):
    padding = padding if isinstance(padding, list) else [padding, padding]
    return aten.conv2d.default(x, w, bias, [stride, stride], padding, [dilation, dilation], groups)


def norm(c, x):
    return aten.batch_norm.default(x, c.gamma, c.b, c.mean, c.var, False, 0.1, 0.0, False)


def plus(*addends):
    first, *rest = addends
    for addend in rest:
        first = aten.add.Tensor(first, addend)
    return aten.relu.default(first)


@pytest.mark.parametrize(
    "network",
    [
        lambda c, x: plus(conv(x, c.w3, 1, bias=c.b), conv(x, c.w1)),
        lambda c, x: plus(conv(x, c.w1), conv(x, c.w3, 1, bias=c.b)),
        lambda c, x: plus(norm(c, conv(x, c.w3, 1)), norm(c, conv(x, c.w1)), norm(c, x)),  # RepVGG
        lambda c, x: plus(norm(c, x), norm(c, conv(x, c.w1))),
        lambda c, x: plus(conv(x, c.w3, 1, 2), conv(x, c.w1, 0, 2)),
        lambda c, x: plus(conv(x, c.w3, 2, 1, 2), conv(x, c.w1, 0, 1, 2)),
        lambda c, x: plus(conv(x, c.w5, 2), conv(x, c.w3, 1), conv(x, c.v3, 1)),
        lambda c, x: plus(conv(x, c.w3, 1), conv(x, c.row, [0, 1]), conv(x, c.column, [1, 0])),
        lambda c, x: plus(conv(x, c.w5, 1), conv(x, c.w3, 0)),
        lambda c, x: plus(conv(x, c.grouped3, 1, groups=2), conv(x, c.grouped1, groups=2), norm(c, x)),
        lambda c, x: plus(conv(x, c.deep, 1, groups=4), norm(c, x)),  # MobileOne
    ],
)
def test_one_convolution(network):
    assert called(exactly_folded(written(network, IMAGE, **CONSTANTS), X)) == {"cnnfast.convolution": 1}


@pytest.mark.parametrize(
    "network",
    [
        lambda c, x: plus(conv(x, c.w3, 1), conv(aten.neg.default(x), c.deep, 1, groups=4)),  # of two values
        lambda c, x: plus(conv(x, c.w3, 2, 1, 2), conv(x, c.w5, 2)),  # of two dilations
        lambda c, x: plus(conv(x, c.w3, 1), conv(x, c.grouped1, groups=2)),  # of two numbers of groups
        lambda c, x: plus(conv(x, c.row, [0, 1]), conv(x, c.column, [1, 0])),  # neither holds the other
        lambda c, x: plus(conv(x, c.w3, 2, 1, 2), conv(x, c.v3, 1)),  # taps further apart
        lambda c, x: (y := conv(x, c.w1), plus(conv(x, c.w3, 1), y)),  # others want the addend
    ],
)
def test_two_convolutions(network):
    folded = exactly_folded(written(network, IMAGE, **CONSTANTS), X)
    assert called(folded)["cnnfast.convolution"] == 2


def test_a_norm_of_another_size_than_the_convolutions_result():
    """Strides leave out what the norm has, and a batch norm cannot be narrower than its input."""

    def network(c, x):
        return plus(norm(c, x), conv(x, c.w3, 1, 2))

    graph = written(network, (None, 4, 1, 1), **CONSTANTS)
    calls = called(exactly_folded(graph, X[:, :, :1, :1]))
    assert calls == {"cnnfast.convolution": 1, "cnnfast.affine": 1}
