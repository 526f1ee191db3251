"""Steps as CUDA graphs: replayed, they cost the host one call, so that what is measured is the GPU's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from .timing import Step

# calls of each step before it is captured: they compile, let cuDNN choose, and allocate an optimizer's state
WARM_UPS = 3


def captured(make: Callable[[], Sequence[Step]], device: torch.device) -> Step:
    """All steps that `make` returns, one after the other, as one CUDA graph. A replay returns what the first of them
    does.

    `make` is called on the stream that is captured, because gradients are taken on the stream of their forward pass.
    Raises what a step raises, and RuntimeError if one does what a graph cannot hold, waiting for the GPU, say.
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
    """steps: a graph knows the addresses that they read and write, and nothing else keeps what lies there alive."""
    graph.replay()
    return results[0]
