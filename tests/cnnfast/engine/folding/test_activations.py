"""Activations are recognised in every spelling, and what looks like one is not."""

from __future__ import annotations

import pytest
import torch

from cnnfast.engine.folding.forms import CONVOLUTION
from cnnfast.engine.operators import ACTIVATIONS
from tests.support.agreement import integers
from tests.support.graphs import called, fold, in_float64, relative_error, written

aten = torch.ops.aten
F32 = torch.float32


def soft(x, *options):
    return aten.mul.Tensor(x, aten.tanh.default(aten.softplus.default(x, *options)))


def relu6_of(x, more=3, high=6):
    return aten.hardtanh.default(aten.add.Tensor(x, more), 0, high)


RECOGNISED = [
    (aten.relu.default, "relu", ()),
    (lambda y: aten.clamp.default(y, 0), "relu", ()),
    (lambda y: aten.clamp.default(y, 0, 6), "hardtanh", (0, 6)),
    (lambda y: aten.clamp.default(y, -2, 3), "hardtanh", (-2, 3)),
    (aten.hardtanh.default, "hardtanh", (-1, 1)),
    (lambda y: aten.hardtanh.default(y, 0.0, 6.0), "hardtanh", (0, 6)),
    (aten.leaky_relu.default, "leaky_relu", (0.01,)),
    (lambda y: aten.leaky_relu.default(y, 0.2), "leaky_relu", (0.2,)),
    (aten.silu.default, "silu", ()),
    (aten.hardswish.default, "hardswish", ()),
    (aten.hardsigmoid.default, "hardsigmoid", ()),
    (aten.mish.default, "mish", ()),
    (aten.sigmoid.default, "sigmoid", ()),
    (aten.tanh.default, "tanh", ()),
    (aten.gelu.default, "gelu", ()),
    (lambda y: aten.gelu.default(y, approximate="tanh"), "gelu_tanh", ()),
    (aten.elu.default, "elu", (1,)),
    (lambda y: aten.elu.default(y, 0.5), "elu", (0.5,)),
    (lambda y: aten.mul.Tensor(y, aten.sigmoid.default(y)), "silu", ()),
    (lambda y: aten.mul.Tensor(aten.sigmoid.default(y), y), "silu", ()),
    (lambda y: aten.mul.Tensor(y, aten.hardsigmoid.default(y)), "hardswish", ()),
    (lambda y: aten.div.Tensor(aten.mul.Tensor(y, relu6_of(y)), 6), "hardswish", ()),
    (lambda y: aten.mul.Tensor(aten.div.Tensor(relu6_of(y), 6.0), y), "hardswish", ()),
    (lambda y: aten.mul.Tensor(y, aten.mul.Tensor(relu6_of(y), 1 / 6)), "hardswish", ()),
    (lambda y: aten.div.Tensor(relu6_of(y), 6), "hardsigmoid", ()),
    (soft, "mish", ()),
]
UNLIKE = [
    lambda y: aten.clamp.default(y, None, 6),
    lambda y: aten.clamp.default(y, 2, 1),
    lambda y: aten.clamp.default(y, 1),
    lambda y: aten.elu.default(y, 1, 2),
    lambda y: aten.elu.default(y, 1, 1, 3),
    lambda y: soft(y, 2),
    lambda y: aten.softmax.int(y, 1),
]
# The gate of these is another activation's; or the other factor is not what the gate is of.
OTHER_PRODUCTS = [
    lambda y: aten.div.Tensor(aten.mul.Tensor(y, relu6_of(y)), 5),
    lambda y: aten.div.Tensor(aten.mul.Tensor(y, relu6_of(y, more=2)), 6),
    lambda y: aten.div.Tensor(aten.mul.Tensor(y, relu6_of(y, high=5)), 6),
    lambda y: aten.mul.Tensor(y, aten.sigmoid.default(aten.neg.default(y))),
    lambda y: aten.mul.Tensor(aten.neg.default(y), aten.sigmoid.default(y)),
    lambda y: aten.mul.Tensor(y, aten.tanh.default(y)),
    lambda y: (gate := aten.sigmoid.default(y), aten.mul.Tensor(y, gate)),
]

X = integers(2, 4, 5, 5, largest=2)
WEIGHTS = {"w": integers(4, 4, 1, 1), "b": integers(4, seed=1)}


def graph_of(activation):
    return written(lambda c, x: activation(aten.conv2d.default(x, c.w, c.b)), (None, 4, None, None), **WEIGHTS)


@pytest.mark.parametrize(("spelling", "name", "numbers"), RECOGNISED)
def test_the_convolution_activates(spelling, name, numbers):
    graph = graph_of(spelling)
    folded = fold(graph, F32)
    assert called(folded) == {"cnnfast.convolution": 1}
    (conv,) = [node for node in folded.calls.nodes if node.target is CONVOLUTION]
    assert conv.args[8:] == (name, numbers)
    assert relative_error(folded.run([X])[0], in_float64(graph, [X])[0]) < 1e-6


def test_every_activation_of_the_fused_operators_is_recognised():
    assert {name for _, name, _ in RECOGNISED} == set(ACTIVATIONS)


@pytest.mark.parametrize("activation", UNLIKE + OTHER_PRODUCTS)
def test_what_looks_like_an_activation(activation):
    graph = graph_of(activation)
    folded = fold(graph, F32)
    (conv,) = [node for node in folded.calls.nodes if node.target is CONVOLUTION]
    assert conv.args[8] is None
    assert not {"aten.silu.default", "aten.hardswish.default", "aten.mish.default"} & {*called(folded)}
    for ours, right in zip(folded.run([X]), in_float64(graph, [X]), strict=True):
        assert relative_error(ours, right) < 1e-6


def test_a_product_activates():
    def network(c, x):
        return aten.gelu.default(aten.linear.default(x, c.w, c.b))

    graph = written(network, (None, 3, 5), w=integers(4, 5), b=integers(4))
    assert called(fold(graph, F32)) == {"cnnfast.linear": 1}
