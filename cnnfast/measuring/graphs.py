"""Steps as CUDA graphs. To replay one costs the host a single call, so that what is measured is the GPU's time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from .timing import Step

# Calls of each step before it is captured: they compile, let cuDNN choose, and allocate the state of an optimizer.
WARM_UPS = 3


def captured(make: Callable[[], Sequence[Step]], device: torch.device) -> Step:
    """All steps that `make` returns, one after the other, as one CUDA graph. Each replay returns the result of the
    first step.

    `make` is called on the stream that is captured, because gradients are computed on the stream of their forward pass.
    Raises what a step raises, and RuntimeError if a step does what a graph cannot hold, such as to wait for the GPU.
    """
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        steps = make()
        for step in steps:
            for _ in range(WARM_UPS):
                step()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        results: list[Any] = [step() for step in steps]

    return partial(_replay, graph, results, steps)


def _replay(graph: torch.cuda.CUDAGraph, results: list[Any], steps: Sequence[Step]) -> Any:
    """steps: they keep alive what the graph reads and writes, of which it has only the addresses."""
    graph.replay()
    return results[0]
