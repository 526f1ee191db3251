"""How a provider of `cnnfast bench` is measured here: on a GPU, or without one by PyTorch on a CPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from cnnfast.bench.gate import expect
from cnnfast.bench.job import Job
from cnnfast.bench.providers import PROVIDERS
from cnnfast.bench.surroundings import one_thread


@pytest.fixture
def measure(benchmark) -> Callable[[Callable[[], Job], str], None]:
    """measure(make, name): nine rounds of the provider of that name at the job that `make` makes, once its results
    have passed bench's gate. Skips, with the reason, what the provider does not do.
    """

    def rounds(make: Callable[[], Job], name: str) -> None:
        device, provider = torch.device("cuda" if torch.cuda.is_available() else "cpu"), PROVIDERS[name]
        with one_thread(device):
            job = make()
            if reason := provider.unavailable(job):
                pytest.skip(reason)
            expected = expect(job)
            prepared = provider.prepare(job)
            verdict = expected.judge(prepared.read(prepared.step()))
            assert not verdict.message, verdict.message

            def step() -> None:
                prepared.step()
                if device.type == "cuda":
                    torch.cuda.synchronize()

            benchmark.extra_info["calls"] = prepared.calls
            benchmark.pedantic(step, rounds=9, warmup_rounds=3)

    return rounds
