"""The random numbers of a job: drawn once, where they are used, and counted; and what its gate needs of memory."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import nn

import cnnfast
from cnnfast.bench import gate, jax_model, running
from cnnfast.bench.gate import expect
from cnnfast.bench.job import BACKWARD, FORWARD, Job, numbers_drawn, step_of, steps_of
from cnnfast.bench.numbers import Numbers
from cnnfast.bench.providers import PROVIDERS
from cnnfast.bench.shapes import layers
from cnnfast.bench.task import layer_task, layer_tasks, model_task
from cnnfast.measuring.machine import Peaks, this_machine

CPU, GPU = torch.device("cpu"), torch.device("cuda")
MACHINE, PEAKS = this_machine(CPU), Peaks(1e11, 1e10)
EVERY = ("eager", "nchw", "cnnfast")


@pytest.fixture(autouse=True)
def served_by_torch():
    with cnnfast.backend("torch"):
        yield


def net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1))


@pytest.fixture
def drawn(monkeypatch) -> list[tuple[torch.device, int]]:
    """(device, how many) of each draw. What is asked of a GPU is drawn on the CPU."""
    log: list[tuple[torch.device, int]] = []
    generator, randn = torch.Generator, torch.randn

    class Drawing:
        def __init__(self, device):
            self.device, self.own = device, generator()

        def manual_seed(self, seed):
            self.own.manual_seed(seed)
            return self

    def draw(shape, *, generator, device):
        assert generator is None or generator.device == device
        made = randn(shape, generator=generator and generator.own, device="meta" if device.type == "meta" else "cpu")
        if device.type != "meta":
            log.append((device, made.numel()))
        return made

    monkeypatch.setattr(torch, "Generator", Drawing)
    monkeypatch.setattr(torch, "randn", draw)
    return log


@pytest.mark.parametrize(("mode", "count"), [("infer", 2 * 3 * 81), ("train", 2 * 3 * 81 + 2 * 4 * 49)])
def test_all_providers_of_a_model_share_what_is_drawn_once(drawn, mode, count):
    job = Job("net", net(), ((2, 3, 9, 9),), mode, torch.float32, CPU)
    assert numbers_drawn(job) == count
    assert drawn == []  # nothing is drawn to count
    rows = running.run(model_task(job, [PROVIDERS[name] for name in EVERY]), MACHINE, PEAKS, seconds=0)
    assert {row.status for row in rows} == {"ok"}
    assert sum(numbers for _, numbers in drawn) == count
    assert job.numbers.count == 0  # they went with the run


@pytest.mark.parametrize(
    "name", ["conv 7x7/2 > 64,", "conv 1x1/1 > 512,", "depthwise 3x3/2", "batch norm", "max pool 3x3/2"]
)
def test_layers_draw_on_the_gpu_for_all_their_copies(drawn, name):
    """A pretended GPU: whoever asks for numbers, for whichever copy, the GPU's own generator draws them, and once."""
    layer = [layer for layer in layers() if layer.name == name][-1]
    for mode in layer.modes:
        del drawn[:]
        task = layer_task(layer, 1, mode, torch.float32, CPU, [])
        job = replace(task.job, device=GPU, copies=3)
        for _ in EVERY:
            assert len(steps_of(job, lambda model: model, layer.module.train())) == 3
        assert sum(numbers for _, numbers in drawn) == numbers_drawn(job) == job.numbers.count
        assert {device for device, _ in drawn} == {GPU}


def test_all_layers_draw_what_a_visit_can_afford():
    """Each copy and each provider drew its own before: more than 3 x 10^10."""
    tasks = list(layer_tasks([64], torch.bfloat16, CPU, []))
    assert len(tasks) == 128
    assert 3e9 < sum(numbers_drawn(task.job) for task in tasks) < 4e9


def test_numbers_are_the_same_every_time_and_in_memory_of_their_own():
    job = Job("net", net(), ((2, 3, 9, 9), (2, 3, 9, 9)), "infer", torch.float32, CPU)
    again = replace(job, numbers=Numbers())
    (first, second), (nchw, _) = job.inputs(), again.inputs(channels_last=False)
    assert torch.equal(first, nchw)
    assert not torch.equal(first, second)
    assert first.is_contiguous(memory_format=torch.channels_last)
    assert nchw.is_contiguous()
    nchw.zero_()  # as a model with an operation in place at its beginning would
    assert torch.equal(again.inputs()[0], first)
    gradients = job.output_gradients([first, first.double()])
    assert [(t.dtype, t.stride()) for t in gradients] == [
        (torch.float32, first.stride()),
        (torch.float64, first.stride()),
    ]
    assert not torch.equal(gradients[0], gradients[1].float())
    assert not torch.equal(gradients[0], first)


@pytest.mark.parametrize("mode", [FORWARD, *BACKWARD])
def test_what_is_exact_starts_from_the_same_numbers(mode):
    """Of the gate: rounded to the job's dtype first, so that only what is computed differs."""
    job = Job("layer", nn.Conv2d(3, 8, 3), ((2, 3, 9, 9),), mode, torch.bfloat16, CPU)
    assert max(expect(job).plain) < 0.01
    before = job.numbers.count
    step_of(job, job.model, job.model.bfloat16(), job.inputs())
    assert job.numbers.count == before == numbers_drawn(job)


def test_jax_gets_the_same_numbers(monkeypatch):
    given = []

    class Jax:
        numpy = None

        @staticmethod
        def jit(function):
            return function

    monkeypatch.setattr(jax_model, "_jax", lambda: Jax)
    monkeypatch.setattr(jax_model, "_device", lambda device: "place")
    monkeypatch.setattr(jax_model, "_array", lambda t, job, place: given.append(t) or t)
    job = Job("net", net(), ((2, 3, 9, 9),), "infer", torch.float32, CPU)
    jax_model.step(torch.fx.symbolic_trace(nn.Sequential(nn.ReLU())), job)
    assert torch.equal(given[-1].permute(0, 3, 1, 2), job.inputs()[0])
    assert job.numbers.count == numbers_drawn(job)


def test_the_gate_compares_the_images_that_it_needs(monkeypatch):
    """In eval each is by itself; in training the batch is one."""
    sizes = []
    whole = gate.step_of

    def watch(job, network, model, inputs):
        sizes.append((job.dtype, len(inputs[0])))
        return whole(job, network, model, inputs)

    monkeypatch.setattr(gate, "step_of", watch)
    monkeypatch.setattr(gate, "IMAGES", 2)
    for mode in ("infer", "train"):
        expect(Job("net", net(), ((5, 3, 9, 9),), mode, torch.float32, CPU))
    assert sizes == [(torch.float64, 2), (torch.float32, 2), (torch.float64, 5), (torch.float32, 5)]


def test_what_float64_had_allocated_is_free_when_float32_is_tried(monkeypatch):
    import gc
    import weakref

    alive: list = []
    attempts = itertools.count()
    whole = gate._exact

    def short_of_memory(job, precision, images):
        if next(attempts) == 0:
            held = torch.zeros(10)
            alive.append(weakref.ref(held))
            raise torch.cuda.OutOfMemoryError("much")
        alive.append(precision)
        assert alive[0]() is None
        return whole(job, precision, images)

    monkeypatch.setattr(gate, "_exact", short_of_memory)
    gc.disable()
    try:
        assert expect(Job("net", net(), ((2, 3, 9, 9),), "infer", torch.bfloat16, CPU)).precision == "float32"
    finally:
        gc.enable()
    assert alive[1] == torch.float32
