"""torch.compile of a converted network in the modes that need a GPU: graphs of reduce-overhead, and autotuned kernels
around ours.

In float64, so that the order in which Inductor's own kernels add does not matter.
"""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import nn

import cnnfast
from tests.support.blocks import CONVOLUTIONS, Net
from tests.support.gpu_ring import asynchronous
from tests.support.model_zoo import randomise

pytestmark = [pytest.mark.gpu, asynchronous]

MODES = ["reduce-overhead", "max-autotune-no-cudagraphs"]
CALLS = 4  # the first two warm a graph up and record it, later ones replay it


@functools.cache
def network() -> nn.Module:
    torch.manual_seed(0)
    return randomise(Net()).double()


def batch(seed: int, device: torch.device) -> torch.Tensor:
    x = torch.randn(4, 3, 17, 17, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.to(device, memory_format=torch.channels_last)


@pytest.fixture(autouse=True)
def fresh():
    """Nothing that other tests compiled is reused, or counts towards the limit of compilations."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def assert_near(mine: torch.Tensor, right: torch.Tensor, what: str) -> None:
    torch.testing.assert_close(mine, right, rtol=1e-9, atol=1e-9, msg=lambda text: f"{what}: {text}")


@pytest.mark.parametrize("mode", MODES)
def test_inference(mode, by_kernels, device):
    model = cnnfast.convert(copy.deepcopy(network())).to(device, memory_format=torch.channels_last).eval()
    compiled = torch.compile(model, mode=mode, fullgraph=True)
    with torch.no_grad():
        for seed in range(CALLS):
            torch.compiler.cudagraph_mark_step_begin()
            y = compiled(batch(seed, device)).clone()
            assert_near(y, model(batch(seed, device)), f"call {seed}")


@pytest.mark.parametrize("mode", MODES)
def test_training(mode, by_kernels, device):
    """Losses, gradients, parameters and running statistics of several steps. Our operators change running statistics in
    place.
    """
    eager, other = (
        cnnfast.convert(copy.deepcopy(network())).to(device, memory_format=torch.channels_last).train()
        for _ in range(2)
    )
    compiled = torch.compile(other, mode=mode, fullgraph=True)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.01) for model in (eager, other)]
    for seed in range(CALLS):
        losses = []
        torch.compiler.cudagraph_mark_step_begin()
        for model, optimizer in zip((eager, compiled), optimizers, strict=True):
            optimizer.zero_grad(set_to_none=True)
            loss = model(batch(seed, device)).square().mean()
            loss.backward()
            losses.append(loss.detach().clone())
            optimizer.step()
        assert_near(losses[1], losses[0], f"loss of step {seed}")
    for (name, right), mine in zip(eager.state_dict().items(), other.state_dict().values(), strict=True):
        assert_near(mine, right, name)


def test_what_is_compiled_is_ours(by_kernels, device):
    """backend("kernels") makes a fallback an error while Dynamo traces; the compiled program then launches our
    kernels.
    """
    model = cnnfast.convert(copy.deepcopy(network())).to(device).eval()
    compiled = torch.compile(model, mode="max-autotune-no-cudagraphs", fullgraph=True)
    with torch.no_grad():
        compiled(batch(0, device))
        with cnnfast.trace() as trace:
            compiled(batch(1, device))
    assert sum("conv" in call.operation for call in trace) == CONVOLUTIONS
    assert all(call.launches for call in trace if "conv" in call.operation)
