"""What a call costs the host: over kernels that are launched but not executed, and where PyTorch serves it.

    pytest benchmarks/test_host_cost.py

The minimum is the figure: whatever else the machine does only adds. `bare operator` is PyTorch's dispatcher alone, for
comparison between machines. Of layers of conv2d both are measured, with Triton's launcher and without it: the
difference is the launcher's.

A GPU's own libcuda and the one that stands in for it do not go together in a process: where there is a GPU, what is
launched is skipped unless it is measured alone (-k "operation or layer").
"""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch

import cnnfast.functional as ours
from cnnfast.bench import host_cost
from cnnfast_kernels import launch

pytestmark = pytest.mark.benchmark(max_time=0.3)
compiled = pytest.mark.skipif(
    launch.INTERPRETED, reason="kernels are interpreted in this process: unset TRITON_INTERPRET"
)

# What the figures contain; pytest-benchmark prints it above them.
SERVED_BY_PYTORCH = "PyTorch serves, the work included"
LAUNCHED = (
    "kernels serve: Python, and Triton's launcher with its tensor maps; "
    "neither CUDA's driver nor its allocator, nor the work"
)
STUBBED = "kernels serve: Python without Triton's launcher"


@pytest.mark.benchmark(group=SERVED_BY_PYTORCH)
def test_bare_operator(benchmark):
    with torch.inference_mode():
        benchmark(host_cost.bare_operator())


@pytest.mark.benchmark(group=SERVED_BY_PYTORCH)
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


def pretend(stack: ExitStack, launcher: bool) -> None:
    try:
        stack.enter_context(host_cost.pretended_gpu(launcher))
    except RuntimeError as error:  # no C compiler, or a GPU's libcuda
        pytest.skip(str(error))


@compiled
@pytest.mark.benchmark(group=LAUNCHED)
@pytest.mark.parametrize("mode", host_cost.MODES)
@pytest.mark.parametrize("operation", host_cost.OPERATIONS)
def test_operation(benchmark, operation, mode):
    with ExitStack() as stack:
        pretend(stack, launcher=True)
        benchmark(stack.enter_context(host_cost.prepared(operation, mode)))


@compiled
@pytest.mark.benchmark(group=LAUNCHED)
@pytest.mark.parametrize("layer", host_cost.LAYERS)
def test_layer_of_conv2d(benchmark, layer):
    with ExitStack() as stack, torch.inference_mode():
        pretend(stack, launcher=True)
        benchmark(host_cost.layers()[layer])


@compiled
@pytest.mark.benchmark(group=STUBBED)
@pytest.mark.parametrize("layer", host_cost.LAYERS)
def test_layer_without_the_launcher(benchmark, layer):
    with ExitStack() as stack, torch.inference_mode():
        pretend(stack, launcher=False)
        benchmark(host_cost.layers()[layer])
