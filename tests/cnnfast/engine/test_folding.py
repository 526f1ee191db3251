"""A folded graph gives what the graph gave, in fewer calls."""

from __future__ import annotations

import torch

from cnnfast.engine.folding import fold
from tests.support.agreement import integers
from tests.support.graphs import called, in_float64, written

aten = torch.ops.aten


def test_a_residual_block_is_two_calls_and_the_given_graph_stays():
    def block(c, x):
        y = aten.conv2d.default(x, c.w, None, [1, 1], [1, 1])
        y = aten.relu.default(aten.batch_norm.default(y, c.gamma, c.beta, c.mean, c.var, False, 0.1, 0.0, False))
        y = aten.conv2d.default(y, c.w, None, [1, 1], [1, 1])
        y = aten.batch_norm.default(y, c.gamma, c.beta, c.mean, c.var, False, 0.1, 0.0, False)
        return aten.relu.default(aten.add.Tensor(y, x))

    one = {name: integers(4, seed=i) for i, name in enumerate(("gamma", "beta", "mean"))}
    graph = written(block, (None, 4, None, None), w=integers(4, 4, 3, 3), var=torch.tensor([1, 4, 0.25, 1]), **one)
    before = str(graph.calls)
    folded = fold(graph, torch.float32)
    x = integers(2, 4, 5, 7)
    assert called(folded) == {"cnnfast.convolution": 2}
    assert torch.equal(folded.run([x])[0].double(), in_float64(graph, [x])[0])
    assert str(graph.calls) == before
    assert set(graph.constants) == {"w", "gamma", "beta", "mean", "var"}
