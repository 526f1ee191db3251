"""What a call costs the host on top of the work itself: one pixel, one channel. On a CPU PyTorch does that work for both."""

from __future__ import annotations

import pytest
import torch

import cnnfast.functional as F

PROVIDERS = {"cnnfast": F.conv2d, "pytorch": torch.nn.functional.conv2d}


@pytest.mark.parametrize("mode", ["inference", "gradients"])
@pytest.mark.parametrize("provider", PROVIDERS)
def test_conv2d(benchmark, provider, mode):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, w = torch.ones(1, 1, 1, 1, device=device), torch.ones(1, 1, 1, 1, device=device, requires_grad=mode == "gradients")
    with torch.inference_mode(mode == "inference"):
        benchmark(PROVIDERS[provider], x, w)
