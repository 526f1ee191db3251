"""What a call costs the host: over kernels that are launched but not executed, and where PyTorch serves it.

    pytest benchmarks/test_host_cost.py

The minimum is the figure: whatever else the machine does only adds. `bare operator` is PyTorch's dispatcher alone, for comparison
between machines.
"""

from __future__ import annotations

import pytest
import torch

import cnnfast.functional as ours
import host_cost
from cnnfast_kernels import launch

pytestmark = pytest.mark.benchmark(max_time=0.3)
compiled = pytest.mark.skipif(launch.INTERPRETED, reason="kernels are interpreted in this process: unset TRITON_INTERPRET")


@pytest.fixture
def pretended_gpu():
    with host_cost.pretended_gpu():
        yield


@compiled
@pytest.mark.usefixtures("pretended_gpu")
@pytest.mark.parametrize("mode", host_cost.MODES)
@pytest.mark.parametrize("operation", host_cost.OPERATIONS)
def test_operation(benchmark, operation, mode):
    with host_cost.prepared(operation, mode) as call:
        benchmark(call)


@compiled
@pytest.mark.usefixtures("pretended_gpu")
@pytest.mark.parametrize("layer", host_cost.LAYERS)
def test_layer_of_conv2d(benchmark, layer):
    with torch.inference_mode():
        benchmark(host_cost.layers()[layer])


def test_bare_operator(benchmark):
    with torch.inference_mode():
        benchmark(host_cost.bare_operator())


@pytest.mark.parametrize("mode", ["inference", "gradients"])
@pytest.mark.parametrize("provider", ["cnnfast", "pytorch"])
@pytest.mark.parametrize("operation", host_cost.ONE_PIXEL)
def test_one_pixel(benchmark, operation, provider, mode):
    """On this machine's own device, the work included: without a GPU PyTorch does it for both."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    functions = ours if provider == "cnnfast" else torch.nn.functional
    call = host_cost.ONE_PIXEL[operation](functions, torch.ones(1, 1, 1, 1, device=device))
    with torch.inference_mode(mode == "inference"):
        benchmark(call)
