"""Again and again: the same bits under load from another stream, and no more memory after fifty steps than
after five.
"""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from torch import nn

import cnnfast
from tests.support.blocks import Net
from tests.support.each_family import FAMILIES, families
from tests.support.model_zoo import randomise

pytestmark = pytest.mark.gpu

TIMES, STEPS, WARM_UPS = 20, 50, 5


@pytest.mark.parametrize("name", FAMILIES)
def test_the_same_bits_twenty_times(name, device, side_stream):
    """While products of large matrices keep the GPU busy from another stream, so that blocks end in any order."""
    if name not in families(device):
        pytest.skip("GPU ring: this GPU has no tensor maps to feed wgmma or tcgen05 with")
    family = FAMILIES[name]
    operands = family.operands(device)
    load = torch.ones(2048, 2048, device=device, dtype=torch.float16)
    first = family(operands)
    torch.cuda.synchronize(device)
    for i in range(TIMES - 1):
        with torch.cuda.stream(side_stream):
            for _ in range(1 + i % 4):
                load @ load
        again = family(operands)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True)), f"call {i + 2}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_training_takes_no_more_memory_from_step_to_step(dtype, by_kernels, device):
    """Plans, descriptors and binaries are kept; tensors are not. Sizes of the batch change, so that plans are made all
    along.
    """
    model = cnnfast.convert(randomise(Net()).to(device, dtype, memory_format=torch.channels_last).train())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def step(size: int) -> None:
        optimizer.zero_grad(set_to_none=True)
        x = torch.randn(4, 3, size, size, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)
        model(x).square().mean().backward()
        optimizer.step()

    def after(steps: int) -> int:
        for i in range(steps):
            step(17 + i % 5)
        optimizer.zero_grad(set_to_none=True)
        gc.collect()
        torch.cuda.synchronize(device)
        return torch.cuda.memory_allocated(device)

    before = after(WARM_UPS)
    assert after(STEPS) == before


def test_a_freed_model_leaves_nothing(by_kernels, device):
    """But for what cuBLAS keeps for the classifier, which a first model has made it take."""

    def use() -> None:
        model: nn.Module = cnnfast.convert(randomise(Net()).to(device, memory_format=torch.channels_last).train())
        twin = copy.deepcopy(model)
        for each in (model, twin):
            each(torch.randn(4, 3, 17, 17, device=device)).sum().backward()

    seen = []
    for _ in range(3):
        use()
        gc.collect()
        torch.cuda.synchronize(device)
        seen.append(torch.cuda.memory_allocated(device))
    assert seen[1] == seen[2]


@pytest.mark.parametrize("name", FAMILIES)
def test_results_are_freed(name, device):
    if name not in families(device):
        pytest.skip("GPU ring: this GPU has no tensor maps to feed wgmma or tcgen05 with")
    family = FAMILIES[name]
    operands = family.operands(device)
    family(operands)  # makes the plans
    gc.collect()
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    results = family(operands)
    assert torch.cuda.memory_allocated(device) > before
    del results
    gc.collect()
    assert torch.cuda.memory_allocated(device) == before
