"""A plan run by oneDNN and PyTorch's operators, against the graph itself: exact integers in poisoned memory."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cnnfast.engine.capturing.capture import capture
from cnnfast.engine.cpu import memory, onednn
from cnnfast.engine.folding.folding import fold
from cnnfast.engine.graph import Graph
from cnnfast.engine.planning.planning import plan
from tests.support.agreement import integers
from tests.support.graphs import in_float64, written
from tests.support.planned import CASES, LAYOUTS, graph_of, inputs_for, negative, ours, random_graphs
from tests.support.threads import together

aten = torch.ops.aten
NAN_BYTES = 0xFF


class Poisoned:
    """A runner all of whose given memory is NaN before each call."""

    def __init__(self, graph: Graph, inputs: Sequence[Tensor]) -> None:
        self.held: list[Tensor] = []
        self.runner = onednn.build(plan(graph, [x.shape for x in inputs]), graph.constants)

    def __call__(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        def allocate(bytes: int) -> Tensor:
            self.held.append(torch.full((bytes,), NAN_BYTES, dtype=torch.uint8))
            return self.held[-1]

        arenas, self.held = self.held[:1], self.held[:1]
        for arena in arenas:
            arena.fill_(NAN_BYTES)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(memory, "allocate", allocate)
            return self.runner(inputs)


@pytest.fixture(params=["oneDNN", "PyTorch"])
def served(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """By oneDNN, and as on a machine that has none."""
    if request.param == "PyTorch":
        monkeypatch.setattr(onednn, "supports", lambda dtype: False)
    elif not onednn.supports(torch.float32):
        pytest.skip("this PyTorch has no oneDNN")
    return request.param


def same(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("batch", [1, 2, 3, 8])
@pytest.mark.parametrize("name", CASES)
def test_a_runner_gives_what_its_graph_gives(name, batch, served):
    graph = graph_of(name)
    runner = Poisoned(graph, inputs_for(graph, batch))
    for sign in (1, -1, 1):  # what a call leaves in the arena does not matter to the next
        inputs = [sign * x for x in inputs_for(graph, batch)]
        want = graph.run(inputs)
        assert same([t.double() for t in want], in_float64(graph, inputs))
        assert same(runner(inputs), want)


@given(random_graphs(), st.sampled_from([1, 2]))
@settings(max_examples=100)
def test_random_graphs(graph, batch):
    inputs = inputs_for(graph, batch)
    assert same(Poisoned(graph, inputs)(inputs), graph.run(inputs))


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("name", ["branches", "awkward_results"])
def test_inputs_may_lie_anywhere(name, layout):
    graph = graph_of(name)
    inputs = [layout(x) for x in inputs_for(graph, 3)]
    assert same(Poisoned(graph, inputs)(inputs), graph.run(inputs))


def test_inputs_of_another_size_or_dtype_are_refused():
    graph = graph_of("shuffle")
    runner = Poisoned(graph, inputs_for(graph, 2))
    with pytest.raises(ValueError, match=r"x0: .* shape \(2, 4, 4, 8\) and torch.float32, got \(3, 4, 4, 8\)"):
        runner(inputs_for(graph, 3))
    with pytest.raises(ValueError, match=r"torch\.float64"):
        runner([x.double() for x in inputs_for(graph, 2)])


@pytest.mark.parametrize("name", CASES)
def test_results_belong_to_the_caller(name, served):
    """Who writes into results, in inference mode or not, changes neither inputs nor constants, nor other results."""
    graph = graph_of(name)
    inputs = inputs_for(graph, 2)
    before = [t.clone() for t in (*inputs, *graph.constants.values())]
    runner = Poisoned(graph, inputs)
    results = runner(inputs)
    want = [result.clone() for result in results]
    later = runner([-x for x in inputs])
    assert same(results, want)
    addresses = {t.untyped_storage().data_ptr() for t in (*results, *later)}
    assert len(addresses) == len({id(t) for t in (*results, *later)})
    for result in results:
        result.fill_(float("nan"))
    assert same(before, [*inputs, *graph.constants.values()])
    assert same(runner(inputs), want)


def test_calls_in_threads_do_not_meet():
    graph = graph_of("dense_block")
    batches = [[integers(3, 4, 4, 8, largest=3, seed=seed)] for seed in range(16)]
    runner = onednn.build(plan(graph, [(3, 4, 4, 8)]), graph.constants)

    def calls(first: int):
        return lambda: [runner(inputs) for _ in range(20) for inputs in batches[first::4]]

    for first, found in enumerate(together(*[calls(first) for first in range(4)])):
        want = [graph.run(inputs) for _ in range(20) for inputs in batches[first::4]]
        assert all(map(same, found, want))


def test_a_view_of_a_constant_is_not_written_over():
    """PyTorch gives a view, where the plan counts on memory that the next call can have."""

    def function(c, x):
        return aten.add.Tensor(negative(aten.permute.default(c.image, [0, 1, 3, 2])), x)

    image = integers(1, 4, 8, 4, largest=9)
    graph = written(function, (None, 4, 4, 8), image=image.clone())
    x = integers(2, 4, 4, 8)
    for _ in range(2):
        assert same(Poisoned(graph, [x])([x]), [x - image.permute(0, 1, 3, 2)])


@pytest.mark.parametrize("dead", ["x", "residual"])
def test_an_affine_step_reads_what_it_writes_over(dead):
    def function(c, x):
        x, residual = negative(x), aten.flip.default(x, [2])
        y = ours("affine", x, c.scale, c.shift, residual, None, [])
        return aten.flip.default(y, [3]), x if dead == "residual" else residual

    scale, shift = integers(4, 1, 1, largest=3, seed=1), integers(4, 1, 1, largest=3, seed=2)
    graph = written(function, (None, 4, 4, 8), scale=scale, shift=shift)
    x = integers(2, 4, 4, 8)
    made = plan(graph, [x.shape])
    assert next(step.overwrites for step in made.steps if step.operator == "cnnfast.affine")
    assert same(Poisoned(graph, [x])([x]), graph.run([x]))


def test_each_step_says_what_serves_it_and_takes_time(served):
    graph = graph_of("dense_block")
    inputs = inputs_for(graph, 2)
    runner = onednn.build(plan(graph, [x.shape for x in inputs]), graph.constants)
    calls = {node.name for node in graph.calls.nodes if node.op == "call_function"}
    said, seconds = runner.served_by(), runner.profile(inputs)
    assert said.keys() == seconds.keys() == calls
    convolutions = {"oneDNN": {"oneDNN convolution + relu"}, "PyTorch": {"PyTorch (convolution)"}}[served]
    assert {name for call, name in said.items() if call.startswith("convolution")} == convolutions
    assert {name for call, name in said.items() if call.startswith("cat")} == {"view"}  # all parts lie there already
    assert all((seconds[call] > 0) == (name != "view") for call, name in said.items())
    assert runner.name == served


def test_a_whole_network(torchvision):
    model = torchvision.models.resnet18(weights=None).eval()
    graph = fold(capture(model, (torch.randn(2, 3, 64, 64),), sizes=False).graph, torch.float32)
    for batch in (1, 2, 3, 8):
        x = torch.randn(batch, 3, 64, 64)
        (y,) = Poisoned(graph, [x])([x])
        torch.testing.assert_close(y, graph.run([x])[0], rtol=1e-4, atol=1e-4)
