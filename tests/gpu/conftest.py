"""What the tests of the GPU ring ask for. Those without the mark `gpu` run in the interpreter too, on the same code."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import cnnfast


@pytest.fixture
def by_kernels() -> Iterator[None]:
    """Our kernels serve every call; one that PyTorch would serve is an error."""
    with cnnfast.backend("kernels"):
        yield


@pytest.fixture
def side_stream(device: torch.device) -> Iterator[torch.cuda.Stream]:
    """A stream that is not the current one, and has waited for it."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    yield stream
    torch.cuda.current_stream(device).wait_stream(stream)
    stream.synchronize()


@pytest.fixture
def roomy(device: torch.device) -> Iterator[torch.device]:
    """The device, for a test of gigabytes: PyTorch keeps nothing of other tests there, and nothing of this one
    afterwards.
    """
    torch.cuda.empty_cache()
    yield device
    torch.cuda.empty_cache()


@pytest.fixture
def second_device() -> torch.device:
    if torch.cuda.device_count() < 2:
        pytest.skip("GPU ring: this machine has one GPU")
    return torch.device("cuda", 1 - torch.cuda.current_device())
