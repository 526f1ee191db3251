"""What the tests of the GPU ring share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

# Tests of order on streams, of graphs and of what records them want launches that return at once.
BLOCKING = os.environ.get("CUDA_LAUNCH_BLOCKING", "") not in ("", "0")
asynchronous = pytest.mark.skipif(
    BLOCKING, reason="GPU ring: CUDA_LAUNCH_BLOCKING is set; run pytest tests/gpu without it"
)


@contextmanager
def aside(device: torch.device) -> Iterator[torch.cuda.Stream]:
    """On a stream of its own, after what the current one has done so far; what follows there waits for it. For warming
    up a capture.
    """
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield stream
    torch.cuda.current_stream(device).wait_stream(stream)


def needs_memory(device: torch.device, gigabytes: float) -> None:
    """Skips the test where less is free."""
    free = torch.cuda.mem_get_info(device)[0] / 2**30
    if free < gigabytes:
        pytest.skip(f"GPU ring: {gigabytes:g} GiB of memory needed, {free:.1f} are free")
