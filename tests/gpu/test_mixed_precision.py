"""Autocast on a GPU, and a scaler of losses: a converted network trains in half precision as the original does."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import cnnfast
from tests.support.blocks import Net
from tests.support.model_zoo import randomise

LOSS_SCALE = 1024.0  # by which gradients of float16 are no subnormal numbers
HALVES = [torch.bfloat16, torch.float16]


def smooth() -> nn.Module:
    """Without kinks: which side of one an activation falls on in half precision is chance, and gradients jump there."""
    first = [nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.SiLU()]
    second = [nn.Conv2d(8, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.SiLU()]
    return nn.Sequential(*first, *second, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))


def network(device: torch.device, make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return randomise(make()).to(device, memory_format=torch.channels_last)


def batch(seed: int, device: torch.device) -> Tensor:
    x = torch.randn(4, 3, 17, 17, generator=torch.Generator().manual_seed(seed))
    return x.to(device, memory_format=torch.channels_last)


def outputs(model: nn.Module, x: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """The result under autocast, and the gradients of all parameters."""
    with torch.autocast(x.device.type, dtype):
        y = model(x)
    (LOSS_SCALE * y.float().square().mean()).backward()
    return {"y": y.detach()} | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_dtypes_and_numbers(device: torch.device, dtype: torch.dtype) -> None:
    """Dtypes are the original's; numbers are as near to the original in float64 as the original's own in half
    precision, twice over.
    """
    original = network(device, smooth).train()
    ours, exact = cnnfast.convert(copy.deepcopy(original)), copy.deepcopy(original).double()
    x = batch(0, device)
    theirs = outputs(original, x, dtype)
    with cnnfast.backend("kernels"), cnnfast.trace() as trace:
        mine = outputs(ours, x, dtype)
    assert {call.served_by for call in trace} == {"kernels"}
    assert {call.dtype for call in trace if call.operation == "conv_stats"} == {str(dtype).removeprefix("torch.")}
    y = exact(x.double())
    (LOSS_SCALE * y.square().mean()).backward()
    right = {"y": y.detach()} | {name: p.grad for name, p in exact.named_parameters()}
    assert list(mine) == list(theirs)
    for name, wanted in right.items():
        assert wanted is not None
        assert mine[name].dtype == theirs[name].dtype, name
        errors = [(t[name].double() - wanted).square().mean().sqrt().item() for t in (mine, theirs)]
        floor = torch.finfo(dtype).eps * wanted.square().mean().sqrt().item() + 1e-6
        assert errors[0] <= 2 * errors[1] + floor, f"{name}: {errors}"
    for (name, a), b in zip(ours.named_buffers(), original.buffers(), strict=True):
        near = 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(a, b, rtol=near, atol=near, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_autocast(dtype, device):
    assert_dtypes_and_numbers(device, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_training_with_a_scaler(dtype, by_kernels, device):
    """Losses fall, infinite gradients skip a step and lower the scale, and nothing becomes NaN."""
    model = cnnfast.convert(network(device, Net)).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    # too large for float16, and for its sums
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**40, growth_interval=1000)
    x, labels = batch(0, device), torch.tensor([0, 1, 2, 0], device=device)
    losses, scales = [], [scaler.get_scale()]
    for _ in range(60):
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, dtype):
            loss = nn.functional.cross_entropy(model(x).float(), labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
        scales.append(scaler.get_scale())
    assert all(p.isfinite().all() for p in model.parameters())
    if dtype == torch.float16:
        assert scales[1] < scales[0], "gradients of float16 overflow at that scale: the step is skipped"
    assert scales[-1] == scales[-2], "it has settled"
    assert losses[-1] < losses[0] / 2
