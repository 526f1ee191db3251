"""Who runs a graph, and how many runners are kept."""

from __future__ import annotations

import contextlib
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import cnnfast
from cnnfast.engine import runtime
from cnnfast.engine.cpu.onnx_graph import NoOnnxForm
from cnnfast.engine.runtime import MOST, Runners, own
from tests.support.freezable import Exact, image


@pytest.fixture(scope="module")
def network():
    frozen = cnnfast.freeze(Exact(), image())
    frozen(image(1, 16))
    return frozen.network


class Built:
    """A runner that only says for which shapes it was built."""

    name = "built"

    def __init__(self, shapes) -> None:
        self.shapes = shapes


@pytest.fixture
def built(monkeypatch) -> list:
    """The shapes of what is built, by either maker."""
    made: list = []

    def build(graph, shapes):
        made.append(shapes)
        return Built(shapes)

    monkeypatch.setattr(runtime.sessions, "build", build)
    monkeypatch.setattr(runtime, "plan", lambda graph, shapes: shapes)
    monkeypatch.setattr(runtime.onednn, "build", lambda plan, constants: build(None, plan))
    return made


def shapes(batch: int, size: int):
    return ((batch, 3, size, size),)


def test_a_session_serves_every_batch_of_an_image_size(network, built):
    pytest.importorskip("onnxruntime")
    runners = Runners(network.graph, network.dtype)
    assert runners.why_not_onnxruntime == ""
    first = runners.runner(shapes(1, 8))
    assert runners.runner(shapes(64, 8)) is first
    assert runners.runner(shapes(1, 16)) is not first
    assert built == [shapes(1, 8), shapes(1, 16)]


def test_a_plan_serves_one_size(network, built, monkeypatch):
    monkeypatch.setattr(runtime.sessions, "available", lambda graph: "it is not installed")
    runners = Runners(network.graph, network.dtype)
    assert runners.runner(shapes(1, 8)) is not runners.runner(shapes(2, 8))
    assert runners.runner(shapes(1, 8)) is runners.runner(shapes(1, 8))
    assert built == [shapes(1, 8), shapes(2, 8)]


def test_a_graph_without_a_form_in_onnx_goes_to_onednn(network, built, monkeypatch):
    def refuse(graph, shapes):
        raise NoOnnxForm("no form for a step")

    monkeypatch.setattr(runtime.sessions, "available", lambda graph: "")
    monkeypatch.setattr(runtime.sessions, "build", refuse)
    runners = Runners(network.graph, network.dtype)
    assert runners.runner(shapes(1, 8)).name == "built"
    assert runners.why_not_onnxruntime == "no form for a step"
    assert runners.runner(shapes(2, 8)) is not runners.runner(shapes(1, 8))


def test_who_waited_for_a_session_that_cannot_be_has_a_plan_of_his_own_size(network, monkeypatch):
    """Two threads with two batch sizes ask for one session."""
    waiting = threading.Barrier(2)

    def refuse(graph, shapes):
        with contextlib.suppress(threading.BrokenBarrierError):
            waiting.wait(0.2)
        raise NoOnnxForm("no form for a step")

    monkeypatch.setattr(runtime.sessions, "available", lambda graph: "")
    monkeypatch.setattr(runtime.sessions, "build", refuse)
    runners = Runners(network.graph, network.dtype)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda batch: runners.runner(shapes(batch, 8))([image(batch)])[0].shape[0], (2, 3)))
    assert found == [2, 3]


class TwoBatches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)

    def forward(self, x, y):
        return self.one(x).flatten(1).mean(1), self.other(y).flatten(1).sum(1)


def test_inputs_may_each_have_a_batch_of_their_own():
    """The sessions of onnxruntime are for one batch size; with two it fails, or would reuse memory of another size."""
    model = TwoBatches().eval()
    frozen = cnnfast.freeze(model, image(2), image(2))
    for batches in ((2, 2), (2, 5), (4, 1), (3, 3)):
        images = [image(batch) for batch in batches]
        with torch.no_grad():
            torch.testing.assert_close(frozen(*images), model(*images))


def test_an_onnxruntime_that_does_not_import_is_no_error(network, monkeypatch):
    pytest.importorskip("onnxruntime")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setattr(runtime.sessions, "available", lambda graph: "")
    runners = Runners(network.graph, network.dtype)
    assert torch.equal(runners.runner(shapes(2, 8))([image(2)])[0], Exact()(image(2)))
    assert "does not import" in runners.why_not_onnxruntime


def test_those_that_were_not_used_for_longest_are_forgotten(network, built, monkeypatch):
    monkeypatch.setattr(runtime.sessions, "available", lambda graph: "it is not installed")
    runners = Runners(network.graph, network.dtype)
    for batch in range(1, MOST + 1):
        runners.runner(shapes(batch, 8))
    runners.runner(shapes(1, 8))  # used again: 2 is the oldest now
    runners.runner(shapes(MOST + 1, 8))
    assert len(built) == MOST + 1
    runners.runner(shapes(1, 8))
    assert len(built) == MOST + 1
    runners.runner(shapes(2, 8))
    assert len(built) == MOST + 2
    assert len(runners._held) == MOST


def test_a_runner_is_built_once_however_many_ask(network, monkeypatch):
    made, going = [], threading.Event()

    def build(graph, given):
        made.append(given)
        going.wait(0.2)
        return Built(given)

    monkeypatch.setattr(runtime.sessions, "available", lambda graph: "")
    monkeypatch.setattr(runtime.sessions, "build", build)
    runners = Runners(network.graph, network.dtype)
    start = threading.Barrier(8)

    def ask(i: int) -> object:
        start.wait()
        return runners.runner(shapes(1 + i, 8 * (1 + i % 2)))

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(ask, range(8)))
    assert len(set(map(id, found))) == len(made) == 2


def test_an_error_while_building_is_the_callers_and_the_next_one_tries_again(network, built, monkeypatch):
    monkeypatch.setattr(runtime.sessions, "available", lambda graph: "it is not installed")
    runners = Runners(network.graph, network.dtype)
    build = Runners._planned
    failures = [MemoryError()]

    def failing(self, shapes):
        if failures:
            raise failures.pop()
        return build(self, shapes)

    monkeypatch.setattr(Runners, "_planned", failing)
    with pytest.raises(MemoryError):
        runners.runner(shapes(1, 8))
    assert runners.runner(shapes(1, 8)).name == "built"


def test_nobody_is_asked_for_no_images(network, built):
    runners = Runners(network.graph, network.dtype)
    runner = runners.runner(shapes(0, 8))
    assert runner([image(0)])[0].shape == (0, 5)
    assert built == []
    assert set(runner.served_by().values()) == {"PyTorch"}


def test_a_dtype_that_no_engine_has_is_pytorchs(network, monkeypatch):
    monkeypatch.setattr(runtime.sessions, "available", lambda graph: "it is not installed")
    monkeypatch.setattr(runtime.onednn, "supports", lambda dtype: False)
    runner = Runners(network.graph, network.dtype).runner(shapes(2, 8))
    assert runner.name == "PyTorch"
    assert torch.equal(runner([image(2)])[0], Exact()(image(2)))
    assert list(runner.profile([image(2)])) == ["all steps"]


def test_own_results():
    x, constant = torch.ones(2, 2), torch.ones(4)
    fresh = torch.ones(3, 3)
    maps = torch.ones(1, 2, 4, 4).to(memory_format=torch.channels_last)
    with torch.inference_mode():
        inference = torch.ones(2)
    given = [x[0], constant, fresh, fresh.view(9), maps, inference]
    mine = own(given, [x], {constant.untyped_storage().data_ptr()})
    assert mine[2] is fresh
    for ours, theirs in zip(mine, given, strict=True):
        assert torch.equal(ours, theirs)
        assert ours.is_contiguous()
        assert not ours.is_inference()
    assert len({t.untyped_storage().data_ptr() for t in (*mine, x, constant)}) == 8
