"""Frozen networks as objects: sizes, threads, files, copies, and what they say of themselves."""

from __future__ import annotations

import copy
import gc
import pickle
import re
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

import cnnfast
from cnnfast.engine import frozen as frozen_file
from cnnfast.engine import original
from cnnfast.engine.frozen import Frozen
from tests.support.agreement import integers
from tests.support.freezable import Exact, Structured, image


@pytest.fixture
def frozen() -> Frozen:
    return cnnfast.freeze(Exact(), image(), classes=list("abcde"))


# ----------------------------------------------------------------------------------------------------------------------
# Sizes


@pytest.fixture
def captures(monkeypatch) -> list[str]:
    """The captures with free image sizes, as they are made."""
    made: list[str] = []
    capture = original.capture_within

    def counted(model, inputs, seconds):
        made.append(type(model).__name__)
        return capture(model, inputs, seconds)

    monkeypatch.setattr(original, "capture_within", counted)
    return made


def test_other_sizes_are_captured_once_when_the_first_comes(frozen, captures):
    for batch in (1, 2, 3):
        frozen(image(batch))
    assert captures == []
    assert "as the example's so far" in frozen.report().summary
    for size in (16, 8, 16):
        assert torch.equal(frozen(image(2, size)), Exact()(image(2, size)))
    assert captures == ["Exact"]
    assert "image sizes: any" in frozen.report().summary


def test_what_no_capture_helps_is_refused_at_once(frozen, captures):
    for x in (image()[:, :2], image()[0], torch.zeros(1, 3, 8, dtype=torch.float32)):
        with pytest.raises(ValueError, match=re.escape("x must be [any, 3, 8, 8], but got")):
            frozen(x)
    assert captures == []


def test_the_private_copy_is_dropped_when_it_is_no_longer_needed(tmp_path):
    model = Exact()
    for use in (lambda frozen: frozen(image(1, 16)), lambda frozen: frozen.save(tmp_path / "x.cnnfast")):
        frozen = cnnfast.freeze(model, image())
        copied = weakref.ref(frozen._original.model)
        use(frozen)
        gc.collect()
        assert copied() is None
        assert torch.equal(frozen(image(2)), model(image(2)))


class Centre(nn.Module):
    """It takes the middle of images for one size only, by a number that Python computes."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(integers(1, 3, 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.positions


def test_a_model_for_one_size_says_so(tmp_path):
    frozen = cnnfast.freeze(Centre(), image())
    with pytest.raises(ValueError, match="freeze the model again, on an example of this size") as refused:
        frozen(image(1, 16))
    frozen.save(tmp_path / "centre.cnnfast")
    loaded = cnnfast.load(tmp_path / "centre.cnnfast")
    with pytest.raises(ValueError, match=re.escape(str(refused.value))):
        loaded(image(1, 16))
    assert torch.equal(loaded(image(3)), Centre().eval()(image(3)))


def test_a_graph_for_any_size_that_computes_something_else_is_not_used(monkeypatch):
    """Judged on the inputs of the call that asked for it."""
    fold = frozen_file.fold

    def wrong(graph, *others):
        graph = fold(graph, *others)
        graph.constants = {name: t + 1 for name, t in graph.constants.items()}
        return graph

    frozen = cnnfast.freeze(Exact(), image())
    monkeypatch.setattr(frozen_file, "fold", wrong)
    with pytest.raises(ValueError, match="with its image sizes free it computes something else"):
        frozen(image(2, 16))
    assert torch.equal(frozen(image(2)), Exact()(image(2)))


@pytest.mark.parametrize("runner", ["onnxruntime", "oneDNN"])
def test_an_image_too_small_is_refused_and_the_next_one_served(runner, monkeypatch):
    if runner == "oneDNN":
        monkeypatch.setattr("cnnfast.engine.cpu.sessions.available", lambda graph: "it is not wanted here")
    else:
        pytest.importorskip("onnxruntime")
    model = nn.Sequential(nn.Conv2d(3, 4, 5), nn.MaxPool2d(2), nn.Conv2d(4, 4, 2))
    frozen = cnnfast.freeze(model, image())
    for x in (image(1, 4), image(1, 6), image(2, 8, 5)):
        with pytest.raises(ValueError, match=r"shape|small|size"):
            frozen(x)
    assert frozen(image(1, 16)).shape == (1, 4, 5, 5)
    assert frozen.report().runner == runner


def test_a_thread_that_comes_when_another_has_just_captured_is_served(monkeypatch, frozen):
    """It has seen the old graph, and finds nothing left to capture."""
    refusal = frozen._serving.refusal
    grow = frozen._grow

    def late(shapes):
        reason = refusal(shapes)
        if reason:
            grow()
        return reason

    monkeypatch.setattr(frozen._serving, "refusal", late)
    assert torch.equal(frozen(image(1, 16)), Exact()(image(1, 16)))


# ----------------------------------------------------------------------------------------------------------------------
# Threads


def test_threads_call_at_once_with_all_sizes_and_get_their_own_results(captures):
    model = Exact()
    frozen = cnnfast.freeze(model, image())
    inputs = [image(1 + i % 4, (8, 16)[i % 2], seed=i) for i in range(24)]
    right = [model(x) for x in inputs]
    start = threading.Barrier(8)

    def call(worker: int) -> list[Tensor]:
        start.wait()
        return [frozen(x) for x in inputs]

    with ThreadPoolExecutor(8) as pool:
        for found in pool.map(call, range(8)):
            assert all(torch.equal(a, b) for a, b in zip(found, right, strict=True))
    assert captures == ["Exact"]


def test_a_capture_keeps_nobody_waiting_who_does_not_need_it(monkeypatch, frozen):
    capture, going, go_on = original.capture_within, threading.Event(), threading.Event()

    def slow(model, inputs, seconds):
        going.set()
        assert go_on.wait(30)
        return capture(model, inputs, seconds)

    monkeypatch.setattr(original, "capture_within", slow)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(frozen, image(1, 16))
        assert going.wait(30)
        assert torch.equal(frozen(image(2)), Exact()(image(2)))
        assert not waiting.done()
        go_on.set()
        assert torch.equal(waiting.result(30), Exact()(image(1, 16)))


# ----------------------------------------------------------------------------------------------------------------------
# Files and copies


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_file_gives_the_same_bits(dtype, tmp_path):
    frozen = cnnfast.freeze(Exact(), image(), dtype=dtype, classes=list("abcde"))
    frozen.save(tmp_path / "exact.cnnfast")
    loaded = cnnfast.load(tmp_path / "exact.cnnfast")
    for x in (image(1), image(4, seed=1), image(2, 16)):
        assert torch.equal(loaded(x), frozen(x))
    assert (loaded.dtype, loaded.example, loaded.classes) == (frozen.dtype, frozen.example, frozen.classes)
    assert [step.fused for step in loaded.report().steps] == [step.fused for step in frozen.report().steps]
    loaded.save(tmp_path / "again.cnnfast")
    assert (tmp_path / "again.cnnfast").read_bytes() == (tmp_path / "exact.cnnfast").read_bytes()


def test_a_structure_survives_a_file(tmp_path):
    model, inputs = Structured(), Structured.inputs()
    frozen = cnnfast.freeze(model, *inputs)
    frozen.save(tmp_path / "structured.cnnfast")
    found, right = cnnfast.load(tmp_path / "structured.cnnfast")(*inputs), model(*inputs)
    assert list(found) == list(right)
    assert torch.equal(found["maps"][1][1], right["maps"][1][1])
    assert torch.equal(found["best"], right["best"])


def test_loading_builds_nothing(frozen, tmp_path, monkeypatch):
    frozen.save(tmp_path / "x.cnnfast")
    monkeypatch.setattr("cnnfast.engine.runtime.Runners._kept", lambda *_: pytest.fail("a runner was built"))
    assert cnnfast.load(tmp_path / "x.cnnfast").classes == tuple("abcde")


def test_preprocessing_that_a_fixed_size_cannot_take_is_refused_when_saving(tmp_path):
    how = {"size": 20, "crop": 16, "mean": [0.5] * 3, "std": [0.5] * 3}
    frozen = cnnfast.freeze(Centre(), image(), preprocessing=how)
    with pytest.raises(ValueError, match="preprocessing makes images"):
        frozen.save(tmp_path / "x.cnnfast")
    assert list(tmp_path.iterdir()) == []
    cnnfast.freeze(Exact(), image(), preprocessing=how).save(tmp_path / "x.cnnfast")


def test_onnx_gives_the_same_numbers(frozen, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    frozen.to_onnx(tmp_path / "exact.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "exact.onnx"))
    assert [one.name for one in session.get_inputs()] == ["x"]
    (found,) = session.run(None, {"x": image(5).numpy()})
    assert torch.equal(torch.from_numpy(found), Exact()(image(5)))


def test_to_onnx_without_onnx_says_what_brings_it(frozen, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnx", None)
    with pytest.raises(ImportError, match=re.escape("onnx is not installed: pip install '.[cpu]' brings it")):
        frozen.to_onnx(tmp_path / "x.onnx")


def test_copies_are_the_same_object_and_pickling_is_refused(frozen):
    assert copy.copy(frozen) is copy.deepcopy(frozen) is frozen
    assert copy.deepcopy({"net": frozen})["net"] is frozen
    with pytest.raises(TypeError, match=re.escape("frozen.save(path) writes it, and cnnfast.load(path) reads it")):
        pickle.dumps(frozen)


# ----------------------------------------------------------------------------------------------------------------------
# What it says of itself


def test_repr_is_a_line(frozen):
    assert re.fullmatch(
        r"<cnnfast.Frozen of x \[N, 3, 8, 8\], float32, 5 classes, \d+ steps; print\(frozen.report\(\)\) lists them>",
        repr(frozen),
    )


def test_a_call_is_not_much_more_than_its_runner(frozen):
    """What is checked around a runner costs less than 200 us: a bound that only copies or rebuilt plans would break."""
    x = image()
    frozen(x)

    def seconds(call) -> float:
        best = 1.0
        for _ in range(30):
            began = time.perf_counter()
            call()
            best = min(best, time.perf_counter() - began)
        return best

    serving = frozen._serving
    runner = serving.runners.runner(((1, 3, 8, 8),))
    assert seconds(lambda: frozen(x)) - seconds(lambda: runner([x])) < 200e-6
