"""Each operator has one spelling afterwards, and the graph computes what the module computed, bit for bit."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cnnfast.engine.capturing.capture import capture
from cnnfast.engine.capturing.rules import RULES, aten, repeated
from cnnfast.engine.graph import Graph
from cnnfast.engine.operators import NAMES, OPERATORS


def integers(*shape: int, seed: int = 3) -> Tensor:
    return torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(seed)).float()


class Function(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(*inputs)


def clean(function: Any, *inputs: Tensor, sizes: bool = False) -> Graph:
    """The graph of a function, after it was compared with the function on the example and on another batch."""
    graph = capture(Function(function).eval(), inputs, sizes=sizes).graph
    with torch.no_grad():
        for given in (inputs, [torch.cat([x, x.flip(-1), x]) for x in inputs]):
            ours, theirs = graph.run(given), function(*given)
            theirs = theirs if isinstance(theirs, (tuple, list)) else (theirs,)
            assert len(ours) == len(theirs)
            for one, other in zip(ours, theirs, strict=True):
                assert one.dtype == other.dtype
                assert torch.equal(one, other)
    return graph


def called(graph: Graph) -> dict[str, int]:
    names = [NAMES[node.target] for node in graph.calls.nodes if node.op == "call_function"]
    return Counter(name.removeprefix("aten.").partition(".")[0] for name in names)


def arguments(graph: Graph, target: Any) -> list[tuple[Any, ...]]:
    """Of the calls of an operator, without the nodes at their beginning."""
    found = [node for node in graph.calls.nodes if node.target is target]
    return [tuple(a for a in node.args if not isinstance(a, torch.fx.Node)) for node in found]


X = integers(2, 4, 6, 6)
WEIGHT = integers(8, 2, 3, 3)
EVEN, UP, LINE, VOLUME = integers(4, 4, 2, 4), integers(4, 3, 2, 2), integers(4, 4, 3), integers(2, 4, 1, 3, 3)
SQUARE = integers(4, 4, 3, 3)


def nothing(x):
    x = F.dropout(F.dropout2d(x, 0.3, False), 0.5, False).contiguous().detach().clone()
    x = x.to(torch.float32).type_as(x).float().to("cpu")
    x = F.alpha_dropout(x, 0.2, False)[:, :, :].view(x.shape).expand_as(x)
    x = F.pad(x.flatten(1, 1).permute(0, 1, 2, 3).squeeze(1), (0, 0))
    assert x.shape[1] == 4
    return nn.Identity()(x) + 1


def test_what_does_nothing_is_gone():
    assert called(clean(nothing, X)) == {"add": 1}


def convolutions(x):
    one = F.conv2d(x, WEIGHT, None, 2, 1, 1, 2)
    same = F.conv2d(x, WEIGHT, torch.ones(8), padding="same", groups=2)
    even = F.conv2d(x, EVEN, padding="same")
    valid = F.conv2d(x, WEIGHT, padding="valid", dilation=2, groups=2)
    line = F.conv1d(x.flatten(2), LINE, padding="same", dilation=2)
    volume = F.conv3d(x[:, :, None], VOLUME, padding=(0, 1, 1))
    up = F.conv_transpose2d(x, UP, stride=2, output_padding=(0, 1))
    any_one = torch.convolution(x, WEIGHT, None, [1, 1], [1], [1], False, [0], 2)
    any_up = torch.convolution(x, UP, None, [2], [0], [1], True, [0], 1)
    return one, same, even, valid, line, volume, up, any_one, any_up


def test_convolutions():
    graph = clean(convolutions, X)
    ones, zeros = [1, 1], [0, 0]
    assert arguments(graph, aten.conv2d.default) == [
        (None, [2, 2], ones, ones, 2),
        (ones, ones, ones, 2),
        (None, ones, [0, 1], ones, 1),
        (None, ones, zeros, [2, 2], 2),
        (None, ones, ones, ones, 2),
    ]
    assert arguments(graph, aten.conv1d.default) == [(None, [1], [2], [2], 1)]
    assert arguments(graph, aten.conv3d.default) == [(None, [1, 1, 1], [0, 1, 1], [1, 1, 1], 1)]
    assert arguments(graph, aten.conv_transpose2d.input) == [
        (None, [2, 2], zeros, [0, 1], 1, ones),
        (None, [2, 2], zeros, zeros, 1, ones),
    ]
    assert arguments(graph, aten.pad.default) == [([0, 1, 0, 1], "constant", None)]
    assert set(called(graph)) == {"conv1d", "conv2d", "conv3d", "conv_transpose2d", "pad", "flatten", "unsqueeze"}


def norms(x):
    mean, var, gamma, beta = torch.arange(4.0), torch.ones(4), torch.full((4,), 2.0), torch.ones(4)
    a = F.batch_norm(x, mean, var, gamma, beta)
    b = F.instance_norm(x, mean, var, gamma, beta, use_input_stats=False)
    c = F.instance_norm(x)
    d = F.group_norm(x, 2, gamma, beta)
    e = F.layer_norm(x, [6], None, None)
    return a, b, c, d, e


def test_norms():
    graph = clean(norms, X)
    assert called(graph) == {"batch_norm": 2, "instance_norm": 1, "group_norm": 1, "layer_norm": 1}
    assert arguments(graph, aten.batch_norm.default) == [(False, 0.1, 1e-5, False)] * 2
    assert arguments(graph, aten.instance_norm.default) == [(None, None, None, None, True, 0.1, 1e-5, False)]


def pools(x):
    a = F.max_pool2d(x, 2)
    b = F.max_pool2d(x, 3, 1, 1, 1, True)
    c = F.avg_pool2d(x, (3, 2), padding=(1, 0), count_include_pad=False)
    d = F.max_pool1d(x.flatten(2), 2)
    e = F.adaptive_avg_pool2d(x, 1)
    return a, b, c, d, e


def test_pools():
    graph = clean(pools, X)
    assert arguments(graph, aten.max_pool2d.default) == [
        ([2, 2], [2, 2], [0, 0], [1, 1], False),
        ([3, 3], [1, 1], [1, 1], [1, 1], True),
    ]
    assert arguments(graph, aten.avg_pool2d.default) == [([3, 2], [3, 2], [1, 0], False, False, None)]
    assert arguments(graph, aten.max_pool1d.default) == [([2], [2], [0], [1], False)]


def shapes(x):
    n = x.shape[0]
    a = x.view(n, 4, 36).reshape(n, -1).unflatten(1, (4, -1)).view_as(x.flatten(2))
    b = x.transpose(1, -1).movedim(0, 2).swapaxes(0, 2).mT
    c = x.mean((2, 3), keepdim=True).squeeze(3).squeeze(-1).unsqueeze(1).expand(n, 3, 4)
    d = x[:, 1:, ..., :-1].reshape(n, -1)
    return a, b, c, d


def test_shapes():
    assert set(called(clean(shapes, X))) - {"sym_size"} == {
        *("reshape", "flatten", "permute", "mean", "squeeze", "unsqueeze", "expand", "slice"),
    }


def arithmetic(x):
    a = torch.add(x, x * 2, alpha=3) - torch.sub(x, 2, alpha=2)
    b = F.relu6(x) + torch.clamp(x, -1, 2) + x.clamp(min=0) + x.clamp_min(-2) + x.clamp_max(3)
    c = (5 - x) * torch.tensor(3.0) + torch.square(x) + torch.true_divide(x, 2)
    d = x.to(torch.int64).clamp(0, 2) + torch.tensor(1)
    return a, b, c, d


def test_arithmetic():
    graph = clean(arithmetic, X)
    assert set(called(graph)) == {"add", "sub", "mul", "div", "rsub", "hardtanh", "relu", "clamp", "to"}
    assert arguments(graph, aten.hardtanh.default) == [(0.0, 6.0), (-1.0, 2.0)]
    assert not any(node.kwargs for node in graph.calls.nodes)


def makers(x):
    zeros, like = torch.zeros(4, 1, 1), torch.ones_like(x) * 2
    new = x.new_full((x.shape[0], 1, 6, 6), 3.0)
    ramp = torch.arange(6) + torch.arange(0, 12, 2, dtype=torch.float32)
    return x + zeros + like + new + ramp


def test_what_is_made_of_nothing():
    graph = clean(makers, X)
    made = [node for node in graph.calls.nodes if node.target is aten.full.default]
    assert [node.kwargs for node in made] == [{"dtype": torch.float32}] * 2
    assert set(called(graph)) == {"add", "mul", "full", "sym_size"}
    shape = graph.values([torch.empty(3, 4, 6, 6, device="meta")])[graph.results[0]]
    assert shape.device.type == "meta"
    assert shape.shape == (3, 4, 6, 6)


def constants(x):
    weight = F.batch_norm(SQUARE.reshape(1, 4, -1), None, None, training=True).view_as(SQUARE)
    shift, scale = (torch.arange(8.0) * 2).chunk(2)
    return F.conv2d(x, weight) * scale.view(4, 1, 1) + shift[:, None, None]


def test_what_depends_on_constants_alone_is_one():
    graph = clean(constants, X)
    assert called(graph) == {"conv2d": 1, "mul": 1, "add": 1}
    assert len(graph.constants) == 3


def test_weights_that_a_module_computes():
    model = nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3)),
        nn.utils.parametrizations.spectral_norm(nn.Conv2d(4, 4, 1)),
    ).eval()
    graph = capture(model, (X,), sizes=False).graph
    assert called(graph) == {"conv2d": 2}
    with torch.no_grad():
        assert torch.equal(graph.run([X])[0], model(X))


def windows(x):
    """Windows of an image, as Swin Transformers cut them, of a size that is computed."""
    n, c, h, w = x.shape
    x = F.pad(x, (0, (2 - w % 2) % 2, 0, (2 - h % 2) % 2))
    rows, columns = x.shape[2] // 2, x.shape[3] // 2
    return x.view(n, c, rows, 2, columns, 2).permute(0, 2, 4, 1, 3, 5).reshape(n * rows * columns, c, 4)


def test_sizes_that_are_computed():
    graph = clean(windows, X, sizes=True)
    for height, width in ((6, 6), (4, 8), (10, 2)):
        x = integers(3, 4, height, width)
        assert torch.equal(graph.run([x])[0], windows(x))
    named = {NAMES[node.target] for node in graph.calls.nodes if node.op == "call_function"}
    assert {"python.mul", "python.floordiv", "python.mod"} <= named


@pytest.mark.parametrize("target", [target for target in RULES if target in NAMES], ids=str)
def test_every_argument_is_present(target):
    """Rules that leave a call as it is are there for operators of the list; others write such operators."""
    assert OPERATORS[NAMES[target]] is target


def test_a_number_for_each_dimension():
    assert repeated(3, 2) == repeated([3], 2) == [3, 3]
    assert repeated([1, 2], 2) == [1, 2]
