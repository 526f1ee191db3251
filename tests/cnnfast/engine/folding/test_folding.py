"""A folded graph gives what the graph gave, in fewer calls."""

from __future__ import annotations

import copy

import pytest
import torch

from cnnfast.engine.capturing.capture import capture
from cnnfast.engine.folding.folding import fold
from cnnfast.engine.operators import NAMES
from tests.support.agreement import integers
from tests.support.graphs import called, in_float64, relative_error, written
from tests.support.model_zoo import FAMILIES, Family

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


def small(name: str) -> Family:
    (found,) = [family for family in FAMILIES if str(family) == name]
    return found


# How many calls each has when folded: what is not fused any more is seen here.
CALLS = {
    "torchvision-densenet": 51,
    "torchvision-resnext": 21,
    "torchvision-convnext": 35,
    "unet": 17,
}


@pytest.mark.parametrize("name", CALLS)
def test_a_network_gives_what_it_gave_for_another_batch_and_size_too(name):
    """Compared with float64; not much further from it than PyTorch's own operators are, one after the other."""
    model, x = small(name).make()
    model.eval()
    sizes = name in ("torchvision-resnext", "unet")
    captured = capture(copy.deepcopy(model).float(), (x.float(),), sizes=sizes)
    folded = fold(captured.graph, torch.float32)
    folded.calls.lint()
    assert sum(called(folded).values()) == CALLS[name]
    assert {node.target for node in folded.calls.nodes if node.op == "call_function"} <= set(NAMES)
    for images in (x, torch.cat([x, 2 * x])[:3, ..., : 32 if sizes else None]):
        with torch.no_grad():
            right = model(images)
        (ours,), (theirs,) = folded.run([images.float()]), captured.graph.run([images.float()])
        assert relative_error(ours, right) <= min(1e-5, 2 * relative_error(theirs, right) + 1e-6)


def test_half_precision_is_as_accurate_as_pytorchs():
    model, x = small("torchvision-resnext").make()
    model.eval()
    graph = capture(copy.deepcopy(model).float(), (x.float(),), sizes=False).graph
    with torch.no_grad():
        right = model(x)
        theirs = model.bfloat16()(x.bfloat16())
    (ours,) = fold(graph, torch.bfloat16).run([x.bfloat16()])
    assert ours.dtype == torch.bfloat16
    assert relative_error(ours, right) <= 1.5 * relative_error(theirs, right)
