"""ResNet-50, in eval and in training, by every provider of `cnnfast bench`, gated by its gate.

    pytest benchmarks/test_models.py --benchmark-json=FILE

`cnnfast bench` is the fairer measure, for its providers take turns; this suite keeps a history. On a CPU providers that
compile are left out, for they take minutes.
"""

from __future__ import annotations

import pytest
import torch

from cnnfast.bench.gate import expect
from cnnfast.bench.job import MODELS, Job, plain
from cnnfast.bench.providers import EAGER, PROVIDERS
from cnnfast.bench.surroundings import one_thread
from cnnfast.models import resnet50

GPU = torch.cuda.is_available()
DEVICE, DTYPE, BATCHES = (
    (torch.device("cuda"), torch.bfloat16, (1, 32)) if GPU else (torch.device("cpu"), torch.float32, (1,))
)
CHOSEN = [name for name, provider in PROVIDERS.items() if GPU or provider.how == EAGER]


@pytest.mark.parametrize("provider", CHOSEN)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("mode", MODELS)
def test_resnet50(benchmark, mode, batch, provider):
    torch.manual_seed(0)
    model = resnet50().train(mode == "train")
    with one_thread(DEVICE):
        job = Job(
            "resnet50", plain(model), ((batch + (mode == "train"), 3, 224, 224),), mode, DTYPE, DEVICE, original=model
        )
        if reason := PROVIDERS[provider].unavailable(job):
            pytest.skip(reason)
        expected = expect(job)
        prepared = PROVIDERS[provider].prepare(job)
        verdict = expected.judge(prepared.read(prepared.step()))
        assert not verdict.message, verdict.message

        def step() -> None:
            prepared.step()
            if GPU:
                torch.cuda.synchronize()

        benchmark.pedantic(step, rounds=9, warmup_rounds=3)
