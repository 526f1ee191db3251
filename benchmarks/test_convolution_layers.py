"""Single layers, forward and backward, by the providers of `cnnfast bench --layers`, gated by its gate.

    pytest benchmarks/test_convolution_layers.py --benchmark-json=FILE

On a GPU each round replays a CUDA graph and waits for it; `calls` in the extra information is how many steps that are.
Without one a few layers run, which PyTorch serves: the numbers are those of a conversion, not of kernels.
"""

from __future__ import annotations

import pytest
import torch

from cnnfast.bench.providers import PROVIDERS
from cnnfast.bench.shapes import layers
from cnnfast.bench.task import layer_task

GPU = torch.cuda.is_available()
DEVICE, DTYPE, BATCH = (torch.device("cuda"), torch.bfloat16, 64) if GPU else (torch.device("cpu"), torch.float32, 1)
CHOSEN = ("eager-graph", "cnnfast-graph", "cnnfast-kernels") if GPU else ("eager", "cnnfast")
LAYERS = list(layers()) if GPU else list(layers())[-4:]
CASES = [pytest.param(layer, mode, id=f"{layer}, {mode}") for layer in LAYERS for mode in layer.modes]


@pytest.mark.parametrize("provider", CHOSEN)
@pytest.mark.parametrize(("layer", "mode"), CASES)
def test_layer(measure, layer, mode, provider):
    measure(lambda: layer_task(layer, BATCH, mode, DTYPE, DEVICE, [PROVIDERS[provider]]).job, provider)
