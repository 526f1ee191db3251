"""How tune has kernels compiled ahead: by which lines, when, and what happens if that fails or takes too long."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager

import pytest

from cnnfast import tuning
from cnnfast.tuning import ahead, running
from cnnfast.workers import Warming
from cnnfast_kernels import launch
from tests.support.child import run_compiled
from tests.support.specialisations import described_launches
from tests.support.tuned import Net, clock, convolution, image

pytestmark = pytest.mark.usefixtures("quick_tuning")
needs_interpreter = pytest.mark.skipif(
    not launch.INTERPRETED, reason="a GPU's launches are not written down: plans launch by themselves"
)


class Compiling:
    """Stands in for workers.compiling. asked: the lines of each call. `compile` is called for each of them."""

    def __init__(self, compile: Callable[[list[str]], None] = lambda lines: None) -> None:
        self.asked: list[list[str]] = []
        self.gpu: object = None
        self.ended = False
        self.compile = compile

    @contextmanager
    def __call__(self, gpu):
        self.gpu = gpu

        def compile_(lines, progress=None):
            lines = list(lines)
            self.asked.append(lines)
            assert progress is not None
            for done in range(len(lines) + 1):
                progress(done, len(lines))
            self.compile(lines)
            return Warming(len(lines))

        try:
            yield compile_
        finally:
            self.ended = True


def tune(model, device, compiling, measure=None, **how):
    result = tuning.begin(model.to(device), image(device))
    tuning.proceed(result, device, measure=measure or clock(), compiling=compiling, **how)
    return result


@needs_interpreter
@pytest.mark.parametrize("train", [False, True], ids=["infer", "train"])
@pytest.mark.parametrize("dtype", ["fp16", "fp32", "tf32"])
def test_the_lines_are_what_the_candidates_launch(gpu, device, train, dtype):
    """All of them, the library's too, after which our kernels normalise. To the last line: alignment, absent operands,
    TF32.
    """
    for measured in tuning.plan(Net().to(device), image(device), train=train, dtype=dtype):
        a = running.operands(measured.convolution, device)
        with described_launches() as launched, ahead.float32_products(measured.products):
            for candidate in measured.candidates.values():
                if candidate.tile is None:
                    running.by_library(measured.convolution, a)
                else:
                    running.ours(measured.convolution, a, candidate.tile)
        assert set(ahead.launches(measured, gpu)) == set(launched)


def test_each_convolution_is_compiled_before_it_is_measured_and_nothing_twice(gpu, device):
    compiling = Compiling()
    measured = []

    def measure(steps):
        measured.append(len(compiling.asked))
        return clock()(steps)

    result = tune(Net(), device, compiling, measure)
    assert len(result.measured) == len(compiling.asked) == 4
    assert all(done > i for i, done in enumerate(measured))
    every = [line for lines in compiling.asked for line in lines]
    assert len(set(every)) == len(every)
    assert set(every) == {line for m in result.measured for line in ahead.launches(m, gpu)}
    assert compiling.gpu == gpu
    assert compiling.ended


def test_the_next_convolution_is_compiled_while_one_is_measured(gpu, device):
    compiled = [threading.Event() for _ in range(4)]
    compiling = Compiling(lambda lines: compiled[len(compiling.asked) - 1].set())
    measured = []

    def measure(steps):
        assert compiled[min(len(measured) + 1, 3)].wait(30)  # while this one is on the clock
        measured.append(steps)
        return clock()(steps)

    assert len(tune(Net(), device, compiling, measure).measured) == 4


def test_recording_is_over_before_anything_is_measured(gpu, device, monkeypatch):
    """It replaces what launches do."""
    order, launches = [], ahead.launches
    monkeypatch.setattr(ahead, "launches", lambda measured, gpu: order.append("recorded") or launches(measured, gpu))
    tune(Net(), device, Compiling(), lambda steps: order.append("measured") or clock()(steps))
    assert order == ["recorded"] * 4 + ["measured"] * 4


def test_where_nobody_else_can_compile_that_is_said_once_and_all_is_measured(gpu, device):
    def fails(lines):
        raise OSError("no process can be started")

    compiling = Compiling(fails)
    result = tune(Net(), device, compiling)
    assert len(result.measured) == 4
    assert result.ok
    assert result.notes == [
        "Kernels were compiled where they were measured, one after the other: OSError: no process can be started"
    ]
    assert result.notes[0] in str(result).replace("\n", " ")
    assert json.loads(result.to_json())["notes"] == result.notes


def test_a_candidate_that_cannot_be_called_adds_no_line(gpu, device, monkeypatch):
    (measured,) = tuning.plan(convolution(device), image(device))
    before = ahead.launches(measured, gpu)
    ours = running.ours

    def refuses(convolution, a, tile):
        if tile == measured.candidates["default"].tile:
            raise ValueError("cannot serve this call")
        return ours(convolution, a, tile)

    monkeypatch.setattr(ahead, "ours", refuses)
    after = ahead.launches(measured, gpu)
    assert set(after) < set(before)
    assert after


def test_compiling_that_takes_longer_than_the_budget_leaves_the_convolution(gpu, device):
    released = threading.Event()

    class Short:
        left = 0.05

    result = tuning.begin(convolution(device), image(device))
    began = time.monotonic()
    timer = threading.Timer(0.5, released.set)
    timer.start()
    compiling = Compiling(lambda lines: released.wait(30))
    tuning.proceed(
        result, device, budget=Short(), compiling=compiling, measure=lambda steps: pytest.fail("it is not compiled")
    )
    timer.cancel()
    assert (len(result.measured), len(result.left)) == (0, 1)
    assert time.monotonic() - began < 20
    assert compiling.ended


def test_an_interrupt_ends_compiling(gpu, device):
    """What has begun ends with its next kernel, and nothing else begins."""
    begun, compiling = threading.Event(), Compiling()
    stopped = []

    @contextmanager
    def endless(gpu):
        def compile_(lines, progress=None):
            compiling.asked.append(list(lines))
            if len(compiling.asked) == 1:
                return Warming(1)
            begun.set()
            try:
                while True:
                    progress(0, 1)
                    time.sleep(0.01)
            except InterruptedError:
                stopped.append(compiling.asked)
                raise

        yield compile_
        compiling.ended = True

    def measure(steps):
        assert begun.wait(30)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(Net(), device, endless, measure)
    assert len(stopped) == 1
    assert len(compiling.asked) == 2
    assert not [thread for thread in threading.enumerate() if thread.name == "cnnfast-tune-compiles"]


@pytest.mark.skipif(not launch.INTERPRETED, reason="interpreter ring: on a GPU something is compiled")
def test_in_the_interpreter_nothing_is_compiled(gpu, device, monkeypatch):
    monkeypatch.setattr(ahead, "_beside_measuring", lambda gpu: pytest.fail("there is nothing to compile"))
    assert tune(convolution(device), device, None).ok


@pytest.mark.compiled
def test_a_whole_tune_over_the_recording_driver():
    """Without fakes but for the GPU itself: candidates are compiled by processes of their own, before any is launched,
    and what is launched finds all of them in Triton's cache. The driver launches nothing, so results are wrong, and say
    so.
    """

    def whole():
        import tempfile
        from pathlib import Path

        import torch
        from torch import nn
        from triton import knobs

        from cnnfast import tuning
        from cnnfast.measuring.timing import Times
        from cnnfast.tuning import ahead
        from cnnfast_kernels import devices, tables
        from cnnfast_kernels.aot.recording_driver import recording_driver

        folder = Path(tempfile.mkdtemp())
        knobs.cache.dir = str(folder / "cache")
        tables.user_folder = lambda: folder / "tables"
        torch.manual_seed(0)
        model = nn.Conv2d(16, 16, 1, bias=False).half()
        gpu = devices.Gpu("A GPU that is not there", 90)
        devices.gpu = lambda device: gpu
        with recording_driver(90):
            result = tuning.Tuning(*gpu, left=tuning.plan(model, torch.randn(2, 16, 8, 8).half(), gpu=gpu))
            names = list(result.left[0].candidates)
            kept = ["default", names[2], "library"]
            result.left[0].candidates = {name: result.left[0].candidates[name] for name in kept}
            lines = ahead.launches(result.left[0], gpu)
            hits = []
            hook = knobs.compilation.listener
            knobs.compilation.listener = lambda *, src, metadata, metadata_group, times, cache_hit: hits.append(
                cache_hit
            )
            tuning.proceed(
                result, torch.device("cpu"), measure=lambda passes: {name: Times(1.0, 1.0, 1.0, 1) for name in passes}
            )
            knobs.compilation.listener = hook
        (measured,) = result.measured
        faults = {name: bool(c.fault) for name, c in measured.candidates.items()}
        failures = {name: c.failure for name, c in measured.candidates.items()}
        return len(lines), hits, faults, failures, result.notes

    lines, hits, faults, failures, notes = run_compiled(whole)
    assert lines >= 2
    assert notes == []
    assert hits
    assert all(hits)
    assert list(faults.values()) == [True, True, False]
    assert set(failures.values()) == {""}
