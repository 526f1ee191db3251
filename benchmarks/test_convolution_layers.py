"""ResNet-50's convolutions, each distinct one once: ours and PyTorch's (cuDNN, benchmark on), bfloat16, channels_last.

    pytest benchmarks --benchmark-json=FILE

Host time around work that ends with a synchronisation: the layers are large enough at this batch for that not to show.
"""

from __future__ import annotations

import pytest
import torch

import cnnfast.functional as F
from cnnfast.demo.timing import cudnn_benchmark, resnet50

BATCH = 64
PROVIDERS = {"cnnfast": F.conv2d, "pytorch": torch.nn.functional.conv2d}

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="GPU ring: the times of interpreted kernels say nothing")


@pytest.fixture(autouse=True)
def fastest_cudnn():
    with cudnn_benchmark():
        yield


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("layer", resnet50(), ids=str)
def test_layer(benchmark, layer, provider, direction):
    def random(*size: int) -> torch.Tensor:
        t = torch.randn(size, device="cuda", dtype=torch.bfloat16)
        return t.contiguous(memory_format=torch.channels_last).requires_grad_()

    x, w = random(BATCH, layer.C, layer.size, layer.size), random(layer.K, layer.C, layer.R, layer.R)
    y = PROVIDERS[provider](x, w, stride=layer.stride, padding=layer.R // 2)
    dy = torch.randn_like(y)

    def step() -> None:
        if direction == "forward":
            with torch.no_grad():
                PROVIDERS[provider](x, w, stride=layer.stride, padding=layer.R // 2)
        else:
            torch.autograd.grad(y, (x, w), dy, retain_graph=True)
        torch.cuda.synchronize()

    benchmark.extra_info["tflop"] = layer.flops(BATCH) * (1 if direction == "forward" else 2) / 1e12
    benchmark.pedantic(step, rounds=20, warmup_rounds=3)
