from __future__ import annotations

import copy
import logging
import threading
import warnings
from collections import OrderedDict
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cnnfast.engine.capturing import capture as capturing
from cnnfast.engine.capturing.capture import CannotCapture, CapturedNetwork, capture, capture_within
from cnnfast.engine.operators import NAMES
from cnnfast.engine.planning.conditions import violated


def integers(*shape: int, seed: int = 3) -> Tensor:
    return torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(seed)).float()


class Net(nn.Module):
    """A residual network with what its kind needs: a tied weight, a buffer, a plain tensor, dropout, two results."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.again = nn.Conv2d(4, 4, 1, bias=False)
        self.tied = nn.Conv2d(4, 4, 1, bias=False)
        self.tied.weight = self.again.weight
        self.shift = nn.Buffer(torch.arange(4.0).view(4, 1, 1))
        self.scale = torch.tensor(2.0)  # neither a parameter nor a buffer
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(4, 5)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(integers(*parameter.shape))

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        x = F.relu(self.bn(self.conv(image)), inplace=True)
        x += self.tied(self.again(x)) * self.scale + self.shift
        pooled = self.drop(F.adaptive_avg_pool2d(F.relu_(x), 1).flatten(1))
        return OrderedDict(out=self.fc(pooled), features=x)


class Function(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function
        self.bn = nn.BatchNorm2d(3, track_running_stats=False)

    def forward(self, *inputs: Any) -> Any:
        return self.function(self, *inputs)


def of(function: Any, *inputs: Any, sizes: bool = False) -> CapturedNetwork:
    return capture(Function(function).eval(), inputs, sizes=sizes)


def agree(captured: CapturedNetwork, model: nn.Module, *inputs: Tensor) -> None:
    with torch.no_grad():
        ours, theirs = captured.result.build(captured.graph.run(inputs)), model(*inputs)
    assert type(ours) is type(theirs)
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("sizes", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
def test_any_batch_and_any_size(sizes, batch):
    model = Net().eval()
    kept = copy.deepcopy(model.state_dict())
    captured = capture(model, (integers(batch, 3, 8, 6),), sizes=sizes)
    (given,) = captured.graph.inputs
    assert given.shape == ((None, 3, None, None) if sizes else (None, 3, 8, 6))
    assert (given.name, given.dtype) == ("image", torch.float32)
    for shape in [(1, 3, 8, 6), (4, 3, 8, 6), *([(2, 3, 5, 9), (1, 3, 16, 2)] if sizes else [])]:
        agree(captured, model, integers(*shape))
        assert violated(captured.graph.conditions, [shape]) == ""
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_what_a_graph_consists_of():
    captured = capture(Net().eval(), (integers(1, 3, 8, 8),), sizes=False)
    graph = captured.graph
    calls = [node for node in graph.calls.nodes if node.op == "call_function"]
    assert all(node.target in NAMES for node in calls)
    assert [NAMES[node.target] for node in calls[:3]] == [
        "aten.conv2d.default",
        "aten.batch_norm.default",
        "aten.relu.default",
    ]
    # Tied weights are one constant, a number is none, and names are those of the module.
    names = set(graph.constants)
    assert {"conv.weight", "conv.bias", "bn.running_mean", "shift", "fc.weight"} <= names
    assert len(names & {"again.weight", "tied.weight"}) == 1
    assert "scale" not in names
    assert not any(value.requires_grad for value in graph.constants.values())
    assert calls[1].meta == {"module": "bn"}
    used = {node.target for node in graph.calls.nodes if node.op == "get_attr"}
    assert used == names


@pytest.mark.parametrize(
    "function",
    [lambda _, x: x.reshape(1, 3 * 64), lambda _, x: x * int(x.shape[0])],
    ids=["one image's shape", "its size as a number"],
)
def test_a_batch_that_the_network_fixes(function):
    """The example is doubled, and the second is captured for two images then: right for them alone."""
    x = integers(1, 3, 8, 8)
    graph = of(function, x).graph
    assert graph.inputs[0].shape == (1, 3, 8, 8)
    assert torch.equal(graph.run([x])[0], function(None, x))


@pytest.mark.parametrize("batch", [1, 2])
def test_a_batch_that_a_constant_fixes(batch):
    graph = of(lambda _, x: torch.cat([x, torch.ones(batch, 3, 4, 4)], 1), integers(batch, 3, 4, 4)).graph
    assert graph.inputs[0].shape == (batch, 3, 4, 4)
    assert graph.conditions == ()


def test_arguments_and_results_of_any_structure():
    def function(_: Any, x: Tensor, more: dict[str, Any], factor: float) -> Any:
        return {"sum": (x + more["mask"] * factor, None), "same": [x, more["pair"][1]], "word": "yes"}

    inputs = (integers(1, 3, 4, 4), {"mask": integers(1, 1, 4, 4), "pair": (integers(1, 2), integers(1, 2))}, 2.0)
    captured = of(function, *inputs)
    assert [given.shape for given in captured.graph.inputs] == [(None, 3, 4, 4), (None, 1, 4, 4), (None, 2), (None, 2)]
    names = [given.name for given in captured.graph.inputs]
    assert len(set(names)) == 4
    assert all(name.isidentifier() for name in names)
    flat, structure = captured.arguments.flatten(inputs)
    assert structure == captured.arguments
    ours = captured.result.build(captured.graph.run(flat))
    theirs = function(None, *inputs)
    assert torch.equal(ours["sum"][0], theirs["sum"][0])
    assert ours["sum"][1] is None
    assert ours["word"] == "yes"
    assert torch.equal(ours["same"][0], inputs[0])
    assert torch.equal(ours["same"][1], theirs["same"][1])
    # The mask goes with the images: the same batch.
    alike = of(lambda _, x, y: torch.cat([x, y], 1), integers(2, 3, 4, 4), integers(2, 1, 4, 4)).graph
    assert violated(alike.conditions, [(2, 3, 4, 4), (2, 1, 4, 4)]) == ""
    assert "size(1, 0) == size(0, 0)" in violated(alike.conditions, [(2, 3, 4, 4), (1, 1, 4, 4)])


def a_branch(_: Any, x: Tensor) -> Tensor:
    return x * 2 if x.shape[2] >= 7 and x.shape[3] // 2 != 1 else x - 1


def test_branches_of_the_network_are_conditions():
    graph = of(a_branch, integers(2, 3, 8, 8), sizes=True).graph
    for height, width, allowed in ((8, 8, True), (7, 4, True), (6, 8, False), (8, 3, False), (8, 1, False)):
        sentence = violated(graph.conditions, [(2, 3, height, width)])
        assert (sentence == "") == allowed, sentence
        if allowed:
            x = integers(2, 3, height, width)
            assert torch.equal(graph.run([x])[0], a_branch(None, x))


def asks_after_pytorch(_: Any, x: Tensor) -> Tensor:
    y = F.avg_pool2d(x, 4).contiguous(memory_format=torch.channels_last)
    y = (y + y.transpose(2, 3).contiguous().transpose(2, 3)).contiguous()
    return y * 2 if y.shape[2] == 1 else y


def test_a_branch_after_bookkeeping_is_a_condition():
    """torch.export makes no second guard of what its bookkeeping of strides has asked before."""
    graph = of(asks_after_pytorch, integers(2, 3, 16, 16), sizes=True).graph
    for height, allowed in ((16, True), (8, True), (4, False)):
        x = integers(1, 3, height, 16)
        assert (violated(graph.conditions, [x.shape]) == "") == allowed
        assert torch.equal(graph.run([x])[0], asks_after_pytorch(None, x)) == allowed


@pytest.mark.parametrize("batch", [1, 3])
def test_a_branch_on_a_batch_of_one(batch):
    def function(_: Any, x: Tensor) -> Tensor:
        return x * 2 if x.shape[0] == 1 else x + 1

    graph = of(function, integers(batch, 3, 4, 4)).graph
    assert torch.equal(graph.run([integers(batch, 3, 4, 4)])[0], function(None, integers(batch, 3, 4, 4)))
    if batch == 1:
        assert graph.inputs[0].shape[0] == 1
    else:
        assert violated(graph.conditions, [(2, 3, 4, 4)]) == ""
        assert "size(0, 0) != 1" in violated(graph.conditions, [(1, 3, 4, 4)])


def pools(_: Any, x: Tensor) -> Tensor:
    x = F.conv2d(x, torch.ones(4, 3, 3, 3), stride=2, padding=1)
    x = F.max_pool2d(x, 3, 2, ceil_mode=True)
    return F.conv2d(x + x.mean((2, 3), keepdim=True), torch.ones(2, 4, 1, 1))


def test_strides_and_rounding_up_are_none():
    """Images of one pixel lie differently in memory, and a pool that rounds up decides each time."""
    graph = of(pools, integers(2, 3, 32, 32), sizes=True).graph
    for height, width in ((32, 32), (3, 3), (4, 5), (9, 10), (31, 33)):
        x = integers(1, 3, height, width)
        assert violated(graph.conditions, [x.shape]) == ""
        assert torch.equal(graph.run([x])[0], pools(None, x))


def resizes(_: Any, x: Tensor) -> Tensor:
    small = F.max_pool2d(x, 1, 2, ceil_mode=True)  # half of an even size; of an odd one, one more
    smaller = F.max_pool2d(small, 2, 2, ceil_mode=True)
    return small + F.interpolate(smaller, size=small.shape[2:], mode="nearest")


def test_rounding_up_counts_where_sizes_are_computed():
    graph = of(resizes, integers(2, 3, 16, 16), sizes=True).graph
    for height, width, allowed in ((16, 16, True), (8, 12, True), (9, 16, False), (8, 7, False)):
        x = integers(1, 3, height, width)
        assert (violated(graph.conditions, [x.shape]) == "") == allowed
        if allowed:
            assert torch.equal(graph.run([x])[0], resizes(None, x))


def test_sizes_that_the_network_fixes():
    model = Function(lambda _, x: x + torch.ones(1, 3, 4, 4)).eval()
    assert capture(model, (integers(2, 3, 4, 4),), sizes=True).graph.inputs[0].shape == (None, 3, 4, 4)
    reason = capture_within(model, (integers(2, 3, 4, 4),))
    assert reason == "the network's code allows for images of 4 x 4 only"


def random(_: Any, x: Tensor) -> Tensor:
    return x + torch.rand_like(x)


def dropout_in_training(_: Any, x: Tensor) -> Tensor:
    return F.dropout(x)


def random_constant(_: Any, x: Tensor) -> Tensor:
    return x * torch.bernoulli(torch.ones(3, 1, 1) / 2)


def depends_on_values(_: Any, x: Tensor) -> Tensor:
    return x + 1 if x.sum() > 0 else x - 1


def counts_values(_: Any, x: Tensor) -> Tensor:
    return x[x > 0]


def reads_a_number(_: Any, x: Tensor) -> Tensor:
    return x * x.max().item()


def of_another_library(_: Any, x: Tensor) -> Tensor:
    return torch.ops.cnnfast_tests_capture.plus(x)


def own_statistics(self: Any, x: Tensor) -> Tensor:
    return self.bn(x)


def under_autocast(_: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return F.conv2d(x, torch.ones(1, 3, 1, 1))


def fails_itself(_: Any, x: Tensor) -> Tensor:
    raise RuntimeError("no such day\nand more")


def gives_an_object(_: Any, x: Tensor) -> object:
    return object()


def gives_numbered(_: Any, x: Tensor) -> object:
    return {1: x}


REASONS = {
    random: "it calls aten.rand_like.default, which draws random numbers",
    dropout_in_training: "aten.dropout.default draws random numbers",
    random_constant: "it calls aten.bernoulli.default, which draws random numbers",
    depends_on_values: r"a decision in its code depends on the values in a tensor \(.*test_capture.py, line \d+\)",
    counts_values: "the shape of a result of aten.index.Tensor depends on the values in a tensor",
    reads_a_number: "it calls aten.item.default, whose result depends on the values in a tensor",
    of_another_library: "it calls cnnfast_tests_capture.plus.default, an operator of cnnfast_tests_capture",
    own_statistics: "a batch norm takes its mean and variance from the batch",
    under_autocast: "a part of the network runs under torch.autocast",
    fails_itself: r"torch.export fails with RuntimeError: no such day \(.*test_capture.py, line \d+\)",
    gives_an_object: "an object of class builtins.object is neither a tensor",
    gives_numbered: "the keys of a dict of tensors must be str, but one is 1",
}


@pytest.fixture(scope="module")
def another_library():
    library = torch.library.Library("cnnfast_tests_capture", "FRAGMENT")
    library.define("plus(Tensor x) -> Tensor")
    for key in ("CPU", "Meta"):
        library.impl("plus", lambda x: x + 1, key)
    yield
    library._destroy()


@pytest.mark.usefixtures("another_library")
@pytest.mark.parametrize("function", REASONS, ids=lambda function: function.__name__)
def test_what_cannot_be_captured(function, capfd):
    with pytest.raises(CannotCapture, match=REASONS[function]) as caught:
        of(function, integers(1, 3, 4, 4) + 1)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def regions(_: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = x * 2
        y.add_(1)
    with torch.enable_grad(), torch.autocast("cpu", enabled=False):
        z = y - x
    return z, y


def test_regions_are_put_back():
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            graph = of(regions, integers(1, 3, 4, 4)).graph
        x = integers(5, 3, 4, 4)
        assert all(map(torch.equal, graph.run([x]), regions(None, x)))


def test_the_callers_modes_stay_out():
    model = Net().eval()
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        captured = capture(model, (integers(1, 3, 4, 4),), sizes=False)
        assert torch.is_inference_mode_enabled()
        assert torch.is_autocast_enabled("cpu")
    assert {value.dtype for value in captured.graph.constants.values()} == {torch.float32}
    agree(captured, model, integers(2, 3, 4, 4))


def test_half_precision():
    model = Net().eval().bfloat16()
    model.scale = model.scale.bfloat16()
    captured = capture(model, (integers(1, 3, 4, 4).bfloat16(),), sizes=False)
    assert captured.graph.inputs[0].dtype == torch.bfloat16
    agree(captured, model, integers(2, 3, 4, 4).bfloat16())


def test_quietly(capfd, caplog):
    loggers = {name: logging.getLogger(name).disabled for name in logging.root.manager.loggerDict}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        of(resizes, integers(1, 3, 16, 16), sizes=True)
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []
    assert {name: logging.getLogger(name).disabled for name in loggers} == loggers


def test_giving_up_leaves_a_healthy_process(monkeypatch):
    """The real capture, given up in the middle of its algebra, and made again."""
    model, example = Net().eval(), (integers(1, 3, 8, 8),)
    flags = torch.compiler._is_compiling_flag, torch.compiler._is_exporting_flag
    whole = capturing._traced

    def slow(*args: Any) -> CapturedNetwork:
        whole(*args)
        while True:
            whole(*args)

    monkeypatch.setattr(capturing, "_traced", slow)
    reason = capture_within(model, example, seconds=1.0)
    assert reason == "torch.export was not done with other image sizes within 1 seconds"
    assert "cnnfast capture" not in [thread.name for thread in threading.enumerate()]
    assert (torch.compiler._is_compiling_flag, torch.compiler._is_exporting_flag) == flags
    monkeypatch.undo()
    captured = capture_within(model, example)
    assert isinstance(captured, CapturedNetwork)
    agree(captured, model, integers(2, 3, 5, 7))


def test_reasons_come_back_as_sentences():
    reason = capture_within(Function(random).eval(), (integers(1, 3, 4, 4),))
    assert isinstance(reason, str)
    assert "draws random numbers" in reason
