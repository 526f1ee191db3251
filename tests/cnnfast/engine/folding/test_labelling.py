"""Every call says which part of a network it belongs to, and which calls it stands for."""

from __future__ import annotations

import json

import pytest
import torch

from cnnfast.engine.folding.folding import fold
from cnnfast.engine.graph import Graph
from tests.support.agreement import integers
from tests.support.graphs import called, written

aten = torch.ops.aten

IMAGE = (None, 8, None, None)
CONSTANTS = {
    "deep": integers(8, 1, 3, 3),
    "dense": integers(8, 8, 3, 3),
    "point": integers(8, 8, 1, 1, seed=1),
    "down": integers(2, 8, 1, 1, seed=2),
    "up": integers(8, 2, 1, 1, seed=3),
    "down_matrix": integers(2, 8, seed=2),
    "up_matrix": integers(8, 2, seed=3),
    "matrix": integers(5, 8, seed=4),
    "mean": integers(8, seed=5),
    "var": torch.ones(8),
}


def patterns(network) -> list[str]:
    """Of all calls, in order."""
    folded = fold(written(network, IMAGE, **CONSTANTS), torch.float32)
    return [node.meta["pattern"] for node in folded.calls.nodes if node.op == "call_function"]


def depthwise(c, x):
    return aten.conv2d.default(x, c.deep, None, [1, 1], [1, 1], [1, 1], 8)


def pool(x):
    return aten.adaptive_avg_pool2d.default(x, [1, 1])


def excite(c, x, gate=aten.sigmoid.default, squeeze=pool):
    y = aten.relu.default(aten.conv2d.default(squeeze(x), c.down))
    return aten.mul.Tensor(x, gate(aten.conv2d.default(y, c.up)))


def excite_by_matrices(c, x):
    y = aten.mean.dim(x, [-1, -2])
    y = aten.sigmoid.default(aten.linear.default(aten.relu.default(aten.linear.default(y, c.down_matrix)), c.up_matrix))
    return aten.mul.Tensor(aten.reshape.default(y, [-1, 8, 1, 1]), x)


def preactivated(c, x, padding):
    y = aten.relu.default(aten.batch_norm.default(x, None, None, c.mean, c.var, False, 0.1, 0.0, False))
    return aten.conv2d.default(y, c.dense, None, [1, 1], [padding, padding])


SQUEEZED = ["squeeze-excitation"] * 4


@pytest.mark.parametrize(
    ("network", "expected"),
    [
        (lambda c, x: aten.conv2d.default(x, c.dense), ["convolution"]),
        (lambda c, x: aten.conv2d.default(depthwise(c, x), c.point), ["depthwise + pointwise"] * 2),
        (lambda c, x: aten.conv2d.default(depthwise(c, x), c.dense), ["convolution"] * 2),
        (lambda c, x: (y := depthwise(c, x), aten.conv2d.default(y, c.point)), ["convolution"] * 2),
        (lambda c, x: excite(c, x), SQUEEZED),
        (lambda c, x: excite(c, x, aten.hardsigmoid.default), SQUEEZED),
        (lambda c, x: excite(c, x, squeeze=lambda x: aten.mean.dim(x, [3, 2], True)), SQUEEZED),
        (lambda c, x: excite_by_matrices(c, x), ["squeeze-excitation"] * 5),
        # no gate; the mean of something else; a mean that others want
        (lambda c, x: excite(c, x, aten.relu.default), ["pool", "convolution", "convolution", ""]),
        (lambda c, x: aten.mul.Tensor(x, aten.sigmoid.default(excite_gate(c, aten.relu.default(x)))),
         ["", "pool", "convolution", "convolution", ""]),
        (lambda c, x: (y := pool(x), excite(c, x, squeeze=lambda x: y)), ["pool", "convolution", "convolution", ""]),
        (lambda c, x: preactivated(c, x, 0), ["pre-activation", "convolution"]),
        (lambda c, x: preactivated(c, x, 1), ["pre-activation", "convolution"]),
        (lambda c, x: aten.max_pool2d.default(aten.avg_pool2d.default(x, [2, 2]), [2, 2]), ["pool", "pool"]),
        (lambda c, x: aten.linear.default(aten.flatten.using_ints(pool(x), 1), c.matrix), ["classifier"] * 3),
        (lambda c, x: aten.linear.default(aten.mean.dim(x, [2, 3]), c.matrix), ["classifier"] * 2),
        (lambda c, x: aten.relu.default(x), [""]),
    ],
)  # fmt: skip
def test_patterns(network, expected):
    assert patterns(network) == expected


def test_a_mean_of_rows_is_no_pool():
    network = lambda c, x: aten.linear.default(aten.mean.dim(x, [1, 2]), c.matrix)  # noqa: E731
    folded = fold(written(network, (None, 3, None, 8), **CONSTANTS), torch.float32)
    assert [node.meta["pattern"] for node in folded.calls.nodes if node.op == "call_function"] == ["", ""]


def excite_gate(c, x):
    return aten.conv2d.default(aten.relu.default(aten.conv2d.default(pool(x), c.down)), c.up)


def block() -> Graph:
    def network(c, x):
        y = aten.conv2d.default(x, c.dense, None, [1, 1], [1, 1])
        y = aten.batch_norm.default(y, None, None, c.mean, c.var, False, 0.1, 0.0, False)
        y = aten.relu.default(aten.add.Tensor(y, x))
        y = aten.mul.Tensor(y, aten.sigmoid.default(y))
        return aten.max_pool2d.default(y, [2, 2])

    return written(network, IMAGE, **CONSTANTS)


def test_a_call_knows_what_it_stands_for():
    folded = fold(block(), torch.float32)
    calls = [node for node in folded.calls.nodes if node.op == "call_function"]
    assert [node.meta["fused"] for node in calls] == [
        ("conv2d_default", "batch_norm_default", "add_tensor", "relu_default"),
        ("sigmoid_default", "mul_tensor"),
        ("max_pool2d_default",),
    ]
    assert called(folded) == {"cnnfast.convolution": 1, "aten.silu.default": 1, "aten.max_pool2d.default": 1}


def test_every_call_of_the_given_graph_is_accounted_for():
    graph = block()
    named = [node.name for node in graph.calls.nodes if node.op == "call_function"]
    folded = fold(graph, torch.float32)
    fused = [name for node in folded.calls.nodes if node.op == "call_function" for name in node.meta["fused"]]
    assert sorted(fused) == sorted(named)


def test_labels_are_plain_data_and_survive_a_copy():
    folded = fold(block(), torch.float32)
    for graph in (folded.copy(), folded):
        meta = [dict(node.meta) for node in graph.calls.nodes if node.op == "call_function"]
        assert [{**m, "fused": list(m["fused"])} for m in meta] == json.loads(json.dumps(meta))
        assert all(m.keys() == {"fused", "pattern"} for m in meta)
