"""What bench and the demo compile before they launch it: which kernels, when, and for whom."""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import nn

pytest.importorskip("triton")

from cnnfast import dispatch, warming, workers
from cnnfast.bench import ahead, job, layers_ahead, providers
from cnnfast.bench.job import Job, placed, plain
from cnnfast.bench.providers import PROVIDERS, Provider
from cnnfast.bench.shapes import layers
from cnnfast.bench.task import Task, layer_task
from cnnfast.demo import ahead as demo_ahead
from cnnfast.demo import digits
from cnnfast.models import resnet18
from cnnfast_kernels import devices, launch

CPU, GPU = torch.device("cpu"), torch.device("cuda")
H200 = devices.Gpu("", 90)


HERE = {"device": CPU}


@pytest.fixture
def gpu(monkeypatch):
    """A GPU is here, as far as it is asked about and models are put on it; nothing runs there."""
    why_torch, empty = dispatch.why_torch, torch.empty
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(devices, "gpu", lambda device: H200)
    monkeypatch.setattr(
        dispatch, "why_torch", lambda x, *others, **options: "" if x.is_cpu else why_torch(x, *others, **options)
    )
    monkeypatch.setattr(
        torch, "empty", lambda *size, **options: empty(*size, **options | (HERE if GPU in options.values() else {}))
    )
    monkeypatch.setattr(providers, "placed", lambda model, job: placed(model, replace(job, device=CPU)))
    inputs = job.Job.inputs
    monkeypatch.setattr(
        job.Job, "inputs", lambda self, channels_last=True: inputs(replace(self, device=CPU), channels_last)
    )
    monkeypatch.setattr(ahead, "_launched", set())


@pytest.fixture
def compiled(gpu, monkeypatch) -> list[list[str]]:
    """What each call compiles."""
    log: list[list[str]] = []

    @contextmanager
    def compiling(gpu, jobs=None):
        assert gpu == H200
        log.append([])
        yield lambda lines, progress=None: log[-1].append(list(lines))
        log[-1].append("closed")

    monkeypatch.setattr(workers, "compiling", compiling)
    monkeypatch.setattr(workers, "compile_ahead", lambda lines, gpu, progress=None: log.append(list(lines)))
    return log


def kernels(lines: Iterable[str]) -> set[str]:
    return {json.loads(line)["kernel"].rpartition(":")[2] for line in lines}


def model_job(mode: str = "infer", dtype: torch.dtype = torch.bfloat16) -> Job:
    model = resnet18().train(mode == "train")
    return Job("resnet18", plain(model), ((2, 3, 64, 64),), mode, dtype, GPU, original=model)


def test_a_model_is_compiled_for_before_its_first_call_and_once(compiled, monkeypatch):
    monkeypatch.setattr(Provider, "prepare", lambda self, job: self.compile_ahead(job, self.network(job)))
    for name in ("cnnfast-kernels", "cnnfast-graph", "cnnfast-kernels", "eager"):
        PROVIDERS[name].prepare(model_job())
    assert len(compiled) == 1  # what the library does not serve, the second has in common with the first
    assert kernels(compiled[0]) >= {"conv_fprop_kernel", "max_pool_kernel"}


def test_by_default_the_library_serves_and_little_is_compiled(gpu, library_first):
    work = model_job()
    default = PROVIDERS["cnnfast"].launches(work, False)
    ours = PROVIDERS["cnnfast-kernels"].launches(work, False)
    assert 0 < len(default) < len(ours)
    assert not any("conv_fprop" in name for name in kernels(default))


def test_training_has_its_backward_pass(gpu):
    assert any(
        "wgrad" in name
        for name in kernels(PROVIDERS["cnnfast-kernels"].launches(model_job("train", torch.float32), False))
    )


def test_a_model_that_cannot_be_traced_is_left_to_its_own_call(compiled, monkeypatch):
    """And one that branches on values is run with them."""

    class Branching(nn.Conv2d):
        def forward(self, x):
            return super().forward(x) * 2 if x.sum() > 1e9 else super().forward(x)

    seen = []
    monkeypatch.setattr(
        warming, "launches", lambda network, *inputs, train, gpu: seen.append(inputs[0].sum().item()) or ["a kernel"]
    )
    work = replace(model_job(), shapes=((2, 16, 8, 8),), model=Branching(16, 16, 3), original=None)
    PROVIDERS["cnnfast"].compile_ahead(work, work.model)
    assert len(seen) == 1
    assert compiled == [["a kernel"]]

    def fail(*arguments, **options):
        raise RuntimeError("it does not run")

    monkeypatch.setattr(warming, "launches", fail)
    PROVIDERS["cnnfast"].compile_ahead(work, work.model)
    assert len(compiled) == 1


def test_nothing_is_compiled_where_pytorch_serves(monkeypatch):
    work = replace(model_job(), device=CPU)
    assert ahead.launches(work, work.model) == []
    monkeypatch.setattr(dispatch, "why_torch", lambda x: "no compiler")
    assert ahead.launches(model_job(), work.model) == []


def tasks_of(count: int, *names: str) -> list[Task]:
    found = [
        layer_task(layer, 1, mode, torch.bfloat16, CPU, [PROVIDERS[name] for name in names])
        for layer in list(layers())[:count]
        for mode in layer.modes
    ]
    return [replace(task, job=replace(task.job, device=GPU)) for task in found]


def test_layers_are_compiled_for_a_window_at_a_time(compiled, monkeypatch):
    monkeypatch.setattr(layers_ahead, "WINDOW", 3)
    tasks = tasks_of(3, "eager", "cnnfast-kernels")
    assert len(tasks) == 8
    said = []
    with layers_ahead.LayersAhead(tasks) as for_layers:
        for i in range(len(tasks)):
            before = len(compiled[0]) if compiled else 0
            for_layers.before(i, said.append)
            assert i % 3 == 0 or len(compiled[0]) == before
    (windows,) = compiled
    *windows, closed = windows
    assert closed == "closed"
    lines = [line for window in windows for line in window]
    assert len(lines) == len(set(lines))
    # of the second layer, whose first mode is in this window
    assert any("dgrad" in name for name in kernels(windows[0]))
    assert said[0] == f"compiling {len(windows[0])} kernels"


def test_the_stems_image_gradient_is_not_compiled(compiled):
    with layers_ahead.LayersAhead(tasks_of(1, "cnnfast-kernels")) as for_layers:
        for_layers.before(0, lambda text: None)
    names = kernels(compiled[0][0])
    assert any("wgrad" in name for name in names)
    assert not any("dgrad" in name for name in names)


def test_a_layer_that_cannot_be_traced_is_left_to_its_own_call(compiled, monkeypatch):
    def fail(self, job, gradient):
        raise ValueError("no")

    monkeypatch.setattr(type(PROVIDERS["cnnfast-kernels"]), "launches", fail)
    with layers_ahead.LayersAhead(tasks_of(1, "cnnfast-kernels")) as for_layers:
        for_layers.before(0, lambda text: None)
    assert compiled == []


def test_models_need_no_window(compiled):
    work = model_job()
    with layers_ahead.LayersAhead([Task(work, [PROVIDERS["cnnfast-kernels"]], {})]) as for_layers:
        for_layers.before(0, lambda text: None)
    assert compiled == []


def test_the_demos_kernels_in_every_dtype(compiled):
    network = digits.make_network(0)
    images = torch.rand(4, 1, 8, 8)
    by_dtype = {
        name: demo_ahead.launches([(network, images, True)], [name], H200) for name in ("float32", "tf32", "bfloat16")
    }
    assert all(any("wgrad" in kernel for kernel in kernels(lines)) for lines in by_dtype.values())
    convolutions = {name: {line for line in lines if "conv_fprop" in line} for name, lines in by_dtype.items()}
    assert not convolutions["float32"] & (convolutions["bfloat16"] | convolutions["tf32"])
    demo_ahead.compile_ahead(
        [(network, images, True), (nn.Linear(3, 3), images, True)], ["float32"], CPU, lambda done, total: None
    )
    assert set(compiled[0]) == set(by_dtype["float32"])  # what does not run on such images is skipped


def test_the_demo_compiles_nothing_where_pytorch_serves(compiled, monkeypatch):
    monkeypatch.setattr(demo_ahead, "why_torch", lambda x: "no compiler")
    demo_ahead.compile_ahead(
        [(digits.make_network(0), torch.rand(4, 1, 8, 8), True)], ["float32"], CPU, lambda done, total: None
    )
    assert compiled == []


def test_autocast_is_what_a_training_step_in_16_bits_runs_under(gpu, monkeypatch):
    """PyTorch applies it to tensors on the GPU alone, so that the network gets inputs that lie there."""
    seen, entered = [], []

    @contextmanager
    def autocast(kind, dtype, enabled):
        entered.append((kind, dtype, enabled))
        yield
        entered.append("left")

    def launches(network, *inputs, train, gpu):
        seen.append((*entered[-1], inputs[0].device.type, train))
        return []

    monkeypatch.setattr(torch, "autocast", autocast)
    monkeypatch.setattr(warming, "launches", launches)
    for mode, dtype in (("train", torch.bfloat16), ("train", torch.float32), ("infer", torch.bfloat16)):
        ahead.launches(model_job(mode, dtype), nn.Conv2d(3, 4, 3))
    half, single = torch.bfloat16, torch.float32
    assert seen == [
        ("cuda", half, True, "cpu", True),
        ("cuda", single, False, "cpu", True),
        ("cuda", half, False, "cpu", False),
    ]
