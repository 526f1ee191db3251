"""Kernels run on the current stream of their tensors' device, in any thread, whatever device is current."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor

import cnnfast
import cnnfast.functional as F
from cnnfast_kernels import devices, launch, tables
from tests.support.agreement import integers
from tests.support.each_family import FAMILIES, families
from tests.support.gpu_ring import asynchronous

pytestmark = [pytest.mark.gpu, asynchronous]

LONG = 200_000_000  # cycles of the GPU's clock: a tenth of a second, thousands of times what a kernel here takes


def operands(device: torch.device, seed: int = 0) -> tuple[Tensor, Tensor]:
    return integers(2, 16, 12, 12, largest=2, seed=seed).to(device), integers(16, 16, 3, 3, seed=seed + 1).to(device)


def forward(x: Tensor, w: Tensor) -> Tensor:
    return F.max_pool2d(F.conv2d(x, w, padding=1), 3, 2, 1)


def test_a_kernel_waits_for_what_its_stream_does_before_it(by_kernels, device, side_stream):
    """Its input is written late, on the side stream. On any other stream the kernels would run long before, and read
    NaN.
    """
    x, w = operands(device)
    right = forward(x, w)  # compiles, too
    late = torch.full_like(x, float("nan"))
    torch.cuda.synchronize(device)
    with torch.cuda.stream(side_stream):
        torch.cuda._sleep(LONG)
        late.copy_(x)
        y = forward(late, w)
    ended = torch.cuda.Event()
    ended.record(side_stream)
    assert not ended.query(), "the sleep was over before the kernels were launched: the test shows nothing"
    torch.cuda.current_stream(device).wait_event(ended)
    assert torch.equal(y, right)


def test_a_kernel_does_not_wait_for_other_streams(by_kernels, device, side_stream):
    """While another stream sleeps, ours is through."""
    x, w = operands(device)
    right = forward(x, w)
    torch.cuda.synchronize(device)
    asleep, ended = torch.cuda.Event(), torch.cuda.Event()
    with torch.cuda.stream(side_stream):
        torch.cuda._sleep(LONG)
        asleep.record()
    other = torch.cuda.Stream(device)
    with torch.cuda.stream(other):
        y = forward(x, w)
        ended.record()
    ended.synchronize()
    assert not asleep.query(), "the kernels waited for a stream that is not theirs"
    assert torch.equal(y, right)


def test_gradients_run_on_the_stream_of_their_forward(by_kernels, device, side_stream):
    x, w = operands(device)

    def step(x: Tensor) -> Tensor:
        weight = w.clone().requires_grad_()
        forward(x, weight).sum().backward()
        assert weight.grad is not None
        return weight.grad

    right = step(x)
    late = torch.full_like(x, float("nan"))
    torch.cuda.synchronize(device)
    with torch.cuda.stream(side_stream):
        torch.cuda._sleep(LONG)
        late.copy_(x)
        grad = step(late)
    torch.cuda.current_stream(device).wait_stream(side_stream)
    assert torch.equal(grad, right)


def test_threads_with_streams_of_their_own(by_kernels, device):
    """Eight threads share plans and binaries, and each finds its own numbers."""
    THREADS, ROUNDS = 8, 20
    given = [operands(device, seed=10 * i) for i in range(THREADS)]
    launch.forget_plans()  # all of them make the same plans at once
    results: list[list[Tensor]] = [[] for _ in range(THREADS)]
    failures: list[str] = []
    barrier = threading.Barrier(THREADS)
    torch.cuda.synchronize(device)

    def work(i: int) -> None:
        try:
            stream = torch.cuda.Stream(device)
            with torch.cuda.device(device), torch.cuda.stream(stream):
                barrier.wait(60)
                results[i] = [forward(*given[i]) for _ in range(ROUNDS)]
                stream.synchronize()
        except Exception as error:
            failures.append(f"thread {i}: {error!r}")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    for (x, w), found in zip(given, results, strict=True):
        right = forward(x, w)
        assert len(found) == ROUNDS
        assert all(torch.equal(y, right) for y in found)


# ----------------------------------------------------------------------------------------------------------------------
# A second GPU


@pytest.mark.parametrize("name", FAMILIES)
def test_tensors_on_a_device_that_is_not_current(name, device, second_device):
    """The first call there comes while the other device is current, as do those from plans that were made for the
    other.
    """
    if name not in families(device):
        pytest.skip("GPU ring: this GPU has no tensor maps to feed wgmma or tcgen05 with")
    family = FAMILIES[name]
    if devices.architecture(second_device) != devices.architecture(device):
        pytest.skip("GPU ring: the second GPU is of another architecture, whose tiles differ")
    here = family(family.operands(device))
    there = family(family.operands(second_device))
    again = family(family.operands(second_device))
    assert torch.cuda.current_device() == device.index
    for mine, far, repeated in zip(here, there, again, strict=True):
        assert far.device == second_device
        assert torch.equal(mine.cpu(), far.cpu())
        assert torch.equal(far, repeated)


def test_the_stream_is_that_of_the_tensors_device(by_kernels, device, second_device):
    x, w = operands(second_device)
    right = forward(x, w)
    late = torch.full_like(x, float("nan"))
    torch.cuda.synchronize(second_device)
    stream = torch.cuda.Stream(second_device)
    with torch.cuda.stream(stream), torch.cuda.device(device):  # leaves the second device's current stream as it is
        assert torch.cuda.current_device() == device.index
        with torch.cuda.device(second_device):
            torch.cuda._sleep(LONG)
        late.copy_(x)
        y = forward(late, w)
    torch.cuda.current_stream(second_device).wait_stream(stream)
    assert torch.equal(y, right)


def test_rows_hold_for_the_gpu_they_name(gpu, device, second_device, tmp_path, monkeypatch):
    """Two devices of one name share rows, two names do not: devices.gpu is asked of the tensors' device."""
    assert devices.gpu(device).name == torch.cuda.get_device_name(device)
    assert devices.gpu(second_device).name == torch.cuda.get_device_name(second_device)
    real = devices.gpu
    monkeypatch.setattr(devices, "gpu", lambda d: devices.Gpu(f"{real(d).name} {d.index}", real(d).arch))
    asked = []
    monkeypatch.setattr(tables, "find", lambda key: asked.append(key.gpu))
    with cnnfast.backend("kernels"):
        for where in (device, second_device):
            F.conv2d(*operands(where))
    assert {name[-1] for name in asked} == {str(device.index), str(second_device.index)}
