"""ResNet-50, in eval and in training, by every provider of `cnnfast bench`, gated by its gate.

    pytest benchmarks/test_models.py --benchmark-json=FILE

`cnnfast bench` is the fairer measure, for its providers take turns; this suite keeps a history. On a CPU providers that
compile are left out, for they take minutes.
"""

from __future__ import annotations

import pytest
import torch

from cnnfast.bench.job import MODELS, Job, plain
from cnnfast.bench.providers import EAGER, PROVIDERS
from cnnfast.models import resnet50

GPU = torch.cuda.is_available()
DEVICE, DTYPE, BATCHES = (
    (torch.device("cuda"), torch.bfloat16, (1, 32)) if GPU else (torch.device("cpu"), torch.float32, (1,))
)
CHOSEN = [name for name, provider in PROVIDERS.items() if GPU or provider.how == EAGER]


@pytest.mark.parametrize("provider", CHOSEN)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("mode", MODELS)
def test_resnet50(measure, mode, batch, provider):
    torch.manual_seed(0)
    model = resnet50().train(mode == "train")
    size = (batch + (mode == "train"), 3, 224, 224)
    measure(lambda: Job("resnet50", plain(model), (size,), mode, DTYPE, DEVICE, original=model), provider)
