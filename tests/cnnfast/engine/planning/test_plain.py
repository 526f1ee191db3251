"""The reference runner gives what the graph gives, and shows where a plan is wrong."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cnnfast.engine.capturing.capture import capture
from cnnfast.engine.folding.folding import fold
from cnnfast.engine.graph import Graph
from cnnfast.engine.plan import Buffer, Plan
from cnnfast.engine.planning import plain
from cnnfast.engine.planning.planning import plan
from tests.support.agreement import integers
from tests.support.graphs import in_float64
from tests.support.model_zoo import FAMILIES
from tests.support.planned import CASES, LAYOUTS, graph_of, inputs_for, random_graphs


def planned(graph: Graph, inputs: Sequence[Tensor]) -> Plan:
    return plan(graph, [x.shape for x in inputs])


def same(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    """Bit for bit, with one NaN like any other."""
    return all(
        a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.nan_to_num(7e9), b.nan_to_num(7e9))
        for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("batch", [0, 1, 3])
@pytest.mark.parametrize("name", CASES)
def test_a_plan_gives_what_its_graph_gives(name, batch):
    graph = graph_of(name)
    inputs = inputs_for(graph, batch)
    want = graph.run(inputs)
    made = planned(graph, inputs)
    assert same([t.double() for t in want], in_float64(graph, inputs))  # so rounding is no excuse for a difference
    assert same(plain.run(made, graph.constants, inputs), want)
    assert same(plain.run(made, graph.constants, inputs, poison=True), want)


@given(random_graphs(), st.sampled_from([1, 2]))
@settings(max_examples=200)
def test_plans_of_random_graphs(graph, batch):
    inputs = inputs_for(graph, batch)
    made = planned(graph, inputs)
    assert same(plain.run(made, graph.constants, inputs, poison=True), graph.run(inputs))


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("name", ["branches", "awkward_results"])
def test_inputs_may_lie_anywhere(name, layout):
    graph = graph_of(name)
    inputs = [layout(x) for x in inputs_for(graph, 3)]
    assert same(plain.run(planned(graph, inputs), graph.constants, inputs, poison=True), graph.run(inputs))


@pytest.mark.parametrize("name", CASES)
def test_results_belong_to_the_caller(name):
    """Who writes into results changes neither inputs nor constants, nor what the next run gives."""
    graph = graph_of(name)
    inputs = inputs_for(graph, 2)
    before = [t.clone() for t in (*inputs, *graph.constants.values())]
    made = planned(graph, inputs)
    results = plain.run(made, graph.constants, inputs)
    want = [result.clone() for result in results]
    for result in results:
        result.fill_(float("nan"))
    assert same(before, [*inputs, *graph.constants.values()])
    assert same(plain.run(made, graph.constants, inputs), want)


def test_runs_in_threads_do_not_meet():
    graph = graph_of("dense_block")
    batches = [[integers(3, 4, 4, 8, largest=3, seed=seed)] for seed in range(24)]
    made = planned(graph, batches[0])
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda inputs: plain.run(made, graph.constants, inputs, poison=True), batches))
    assert all(same(results, graph.run(inputs)) for results, inputs in zip(found, batches, strict=True))


def in_the_arena(made: Plan) -> list[Buffer]:
    return [buffer for buffer in made.buffers.values() if buffer.address is not None]


def changed(made: Plan, *buffers: Buffer) -> Plan:
    return replace(made, buffers=made.buffers | {buffer.name: buffer for buffer in buffers})


# Every value of these is read by a step that computes.
ALL_READ = ("residual_blocks", "shuffle", "views", "written_over")


@pytest.mark.parametrize("name", [*ALL_READ, "dense_block", "two_inputs"])
def test_poison_finds_a_life_that_ends_too_early(name):
    graph = graph_of(name)
    inputs = inputs_for(graph, 2)
    made = planned(graph, inputs)
    want = graph.run(inputs)
    assert in_the_arena(made)
    for buffer in in_the_arena(made):
        shorter = changed(made, replace(buffer, last=buffer.last - 1))
        assert not same(plain.run(shorter, graph.constants, inputs, poison=True), want), buffer


@pytest.mark.parametrize("name", ALL_READ)
def test_poison_finds_buffers_that_overlap(name):
    graph = graph_of(name)
    inputs = inputs_for(graph, 2)
    made = planned(graph, inputs)
    want = graph.run(inputs)
    together = [
        (one, other)
        for one, other in combinations(in_the_arena(made), 2)
        if one.first <= other.last and other.first <= one.last
    ]
    assert together
    for one, other in together:
        assert one.address is not None
        moved = replace(made, arena=2 * made.arena)
        moved = changed(moved, replace(other, address=one.address))
        assert not same(plain.run(moved, graph.constants, inputs, poison=True), want), (one, other)


NETWORKS = (
    "torchvision-resnet18",
    "torchvision-densenet",
    "torchvision-shufflenet_v2_x0_5",
    "torchvision-convnext",
    "unet",
)


@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name):
    """Captured and folded in float64, so that nothing but a fault makes a difference that counts."""
    (family,) = [family for family in FAMILIES if str(family) == name]
    model, x = family.make(torch.float64)
    graph = fold(capture(model.eval(), (x,), sizes=False).graph, torch.float64)
    batch = torch.cat([x, x.flip(0)[:1]])
    made = planned(graph, [batch])
    want = graph.run([batch])
    clean, poisoned = (plain.run(made, graph.constants, [batch], poison=poison) for poison in (False, True))
    assert same(clean, poisoned)
    for result, exact in zip(clean, want, strict=True):
        torch.testing.assert_close(result, exact, rtol=1e-11, atol=1e-11 * float(exact.abs().max()))
