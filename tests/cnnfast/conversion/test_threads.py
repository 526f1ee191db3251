"""Several threads convert, report and call models at once: as a server does, and DataParallel with its replicas.

What is the process's own is held at the moment where another thread would meet it: nothing here depends on how threads
happen to be scheduled, but the last test.
"""

from __future__ import annotations

import contextlib
import copy
import pickle
import random
import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from torch import nn

import cnnfast
from cnnfast.conversion import fusion, grafts, leaves, tracing
from tests.support.blocks import CONVOLUTIONS, Block, Net, block, build, image
from tests.support.threads import MOMENT, SECONDS, elsewhere, together

# What torch.fx and conversion replace while a forward is traced.
REPLACED = [(nn.Module, "__call__"), (nn.Module, "__getattr__"), (torch, "cat"), (torch, "concat"), (torch, "stack")]


def replaced() -> list[Any]:
    return [getattr(where, name) for where, name in REPLACED]


@pytest.fixture
def while_tracing(monkeypatch) -> Callable[[Callable[[], Any]], None]:
    """while_tracing(f): the thread that traces calls f at each call of a module that it records."""

    def install(function: Callable[[], Any]) -> None:
        plain = tracing._Tracer.is_leaf_module

        def is_leaf_module(self, m, name):
            function()
            return plain(self, m, name)

        monkeypatch.setattr(tracing._Tracer, "is_leaf_module", is_leaf_module)

    return install


def fused(model: nn.Module) -> int:
    return cnnfast.report(model, torch.zeros(2, 3, 9, 9, dtype=torch.float64)).count("fused")


def concatenates(self, x):
    return torch.cat([self.relu(self.bn(self.conv(x))), x], 1)


# ----------------------------------------------------------------------------------------------------------------------
# While a model is converted


def test_others_call_models_while_one_is_converted(while_tracing, quick):
    """Modules, converted or not, torch.cat and parameters are for other threads what they are without a trace."""
    plain, x = build(block(concatenates), quick), image().to(quick)
    converted = cnnfast.convert(plain)
    expected, seen = plain(x), []

    def calls():
        return plain(x), converted(x), torch.cat([x, x]), plain.conv.weight

    while_tracing(lambda: seen.append(elsewhere(calls)))
    ours = cnnfast.convert(Net().to(quick).eval())
    assert len(seen) > 10
    for theirs, mine, joined, weight in seen:
        assert torch.equal(theirs, expected)
        torch.testing.assert_close(mine, expected)
        assert joined.shape == (4, *x.shape[1:])
        assert weight is plain.conv.weight
    assert cnnfast.report(ours).count("fused") == CONVOLUTIONS


def test_two_traces_do_not_meet(while_tracing):
    """The second to begin would be the second to end, and put back what the first had put there."""
    before, local = replaced(), threading.local()
    first, second = threading.Event(), threading.Event()

    def overlap():
        if local.traced:
            return
        local.traced = True
        if local.is_first:
            first.set()
            second.wait(MOMENT)  # it comes only if nothing keeps it away
        else:
            second.set()
            threading.Event().wait(2 * MOMENT)

    while_tracing(overlap)

    def convert(is_first):
        local.is_first, local.traced = is_first, False
        if not is_first:
            first.wait(SECONDS)
        return cnnfast.convert(Block().eval())

    one, other = together(lambda: convert(True), lambda: convert(False))
    assert replaced() == before
    assert type(one) is type(other) is not Block


def test_what_others_print_and_draw_is_theirs(while_tracing, quick, capsys):
    """It does not keep a model from being fused, and is neither lost nor put back."""
    once = []

    def act():
        if not once:
            once.append(elsewhere(lambda: (print("served"), random.random(), numpy.random.rand())))

    while_tracing(act)
    stays = threading.Event()
    other = threading.Thread(target=stays.wait)
    other.start()  # random numbers may be another thread's only while there is one
    try:
        ours = cnnfast.convert(Net().to(quick).eval())
    finally:
        stays.set()
        other.join()
    assert once
    assert capsys.readouterr().out == "served\n"
    assert cnnfast.report(ours).count("fused") == CONVOLUTIONS


def test_one_class_for_one_purpose(monkeypatch):
    """Two threads look for a class, and find none."""

    class Own(nn.Conv2d):
        pass

    both = threading.Barrier(2)
    plain = grafts.graft

    def slowly(*arguments):
        with contextlib.suppress(threading.BrokenBarrierError):
            both.wait(MOMENT)  # both come here only if nothing keeps the second away
        return plain(*arguments)

    monkeypatch.setattr(leaves, "graft", slowly)
    monkeypatch.setattr(fusion, "graft", slowly)
    one, other = together(*[lambda: cnnfast.convert(nn.Sequential(Own(1, 1, 1), nn.BatchNorm2d(1)))] * 2)
    assert type(one[0]) is type(other[0]) is not Own
    assert type(one) is type(other) is not nn.Sequential


# ----------------------------------------------------------------------------------------------------------------------
# While a report looks


class Meanwhile(nn.Module):
    """A layer at whose call another thread does something."""

    def __init__(self, act: Callable[[], Any]) -> None:
        super().__init__()
        self.act = act

    def forward(self, x):
        elsewhere(self.act)
        return x


def test_a_report_hears_of_its_own_thread_only(quick):
    """Another one calls the very model, and another model, by kernels all the while; the report says what it would say
    without.
    """
    told, seen = build(Net, quick), []
    other, x = cnnfast.convert(build(Block, quick)), image().to(quick)
    expected = other(x)

    def act():
        with cnnfast.trace() as calls:
            seen.append((other(x), cnnfast.functional.max_pool2d(x, 2)))
        assert {call.served_by for call in calls if call.operation != "max_pool2d"} == {"kernels"}

    model = cnnfast.convert(nn.Sequential(told, nn.Unflatten(1, (3, 1, 1)), nn.Conv2d(3, 3, 1)).to(quick).double())
    without = cnnfast.report(model.eval(), image(3, 9).to(quick))
    model.insert(1, Meanwhile(act))
    report = cnnfast.report(model, image(3, 9).to(quick))
    assert seen
    assert all(torch.equal(y, expected) for y, _ in seen)
    assert [row.status for row in report.rows] == [row.status for row in without.rows]
    assert [row.reason for row in report.rows] == [row.reason for row in without.rows]
    assert (report.total_flops, report.total_bytes) == (without.total_flops, without.total_bytes)


# ----------------------------------------------------------------------------------------------------------------------
# Calls


def replicas(model: nn.Module, number: int) -> list[nn.Module]:
    """As torch.nn.parallel.replicate makes them, which needs GPUs: each module's replica gets its parameters, buffers
    and children one by one.
    """
    modules = list(model.modules())
    places = {module: i for i, module in enumerate(modules)}
    copies: list[list[nn.Module]] = []
    for _ in range(number):
        made: list[Any] = [module._replicate_for_data_parallel() for module in modules]
        for replica in made:
            replica._former_parameters = {}
        for module, replica in zip(modules, made, strict=True):
            for name, child in module._modules.items():
                setattr(replica, name, made[places[child]])
            for name, parameter in module._parameters.items():
                setattr(replica, name, None if parameter is None else parameter.view_as(parameter))
                replica._former_parameters[name] = parameter
            for name, buffer in module._buffers.items():
                setattr(replica, name, None if buffer is None else buffer.clone())
        copies.append(made)
    return [made[0] for made in copies]


@pytest.mark.parametrize("training", [False, True])
def test_replicas_of_data_parallel_are_fused_and_not_traced(training, quick, monkeypatch):
    """Each forward of DataParallel replicates anew. Gradients reach the model's parameters, summed over replicas."""
    model = cnnfast.convert(build(Net, quick).train(training))
    images = [image(3, 9).to(quick) * (i + 1) for i in range(2)]
    plain = [copy.deepcopy(cnnfast.revert(model)) for _ in images]
    expected = [each(x) for each, x in zip(plain, images, strict=True)]
    monkeypatch.setattr(fusion, "plan", lambda *call: pytest.fail("a replica was traced"))
    made = replicas(model, 2)
    assert [type(m) for replica in made for m in replica.modules()] == [type(m) for m in model.modules()] * 2
    with cnnfast.trace() as calls:
        results = together(*(lambda replica=replica, x=x: replica(x) for replica, x in zip(made, images, strict=True)))
    fusing = [call for call in calls if call.operation in ("conv_bn_act", "conv_stats")]
    assert len(fusing) == 2 * CONVOLUTIONS
    for mine, theirs in zip(results, expected, strict=True):
        torch.testing.assert_close(mine, theirs)
    sum(y.sum() for y in results).backward()
    sum(y.sum() for y in expected).backward()
    gradients = [[p.grad for p in each.parameters()] for each in plain]
    for mine, *theirs in zip(model.parameters(), *gradients, strict=True):
        torch.testing.assert_close(mine.grad, sum(theirs))


def test_a_model_that_was_called_is_copied_and_pickled_as_before(quick):
    """Nothing of what calls prepare is kept in modules."""
    model, x = cnnfast.convert(build(Net, quick)), image(3, 9).to(quick)
    before = [dict(vars(m)) for m in model.modules()], len(pickle.dumps(model))
    y = model(x)
    y.sum().backward()
    model.zero_grad()
    assert ([dict(vars(m)) for m in model.modules()], len(pickle.dumps(model))) == before
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]
        assert torch.equal(twin(x), y)


def test_all_of_it_at_once(quick):
    """Threads convert the same model and others, report and call them, as they happen to be scheduled, often switched.
    Results are those of one thread alone.
    """
    shared, x = build(Net, quick), image(3, 9).to(quick)
    converted = cnnfast.convert(shared)
    with torch.no_grad():
        expected = converted(x)
    before, interval = replaced(), sys.getswitchinterval()

    def convert():
        ours = cnnfast.convert(shared)
        with torch.no_grad():
            return fused(ours), ours(x)

    def another():
        return fused(cnnfast.convert(build(Net, quick))), expected

    def call():
        with torch.no_grad():
            return CONVOLUTIONS, converted(x)

    sys.setswitchinterval(1e-5)
    try:
        results = together(convert, convert, another, call, call)
    finally:
        sys.setswitchinterval(interval)
    assert [number for number, _ in results] == [CONVOLUTIONS] * 5
    assert all(torch.equal(y, expected) for _, y in results)
    assert replaced() == before
