"""What a CPU's inference is deployed with: its steps pass the gate, and the reasons why it does not run."""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import pytest
import torch
from torch import nn

import cnnfast
from cnnfast.bench import engines
from cnnfast.bench.engines import STEPS, module_of
from cnnfast.bench.job import Job
from cnnfast.bench.providers import PROVIDERS
from cnnfast.bench.rows import FAILED, OK, UNAVAILABLE, WRONG
from cnnfast.bench.running import run
from cnnfast.bench.task import model_task
from cnnfast.measuring.machine import Machine, Peaks

CPU = torch.device("cpu")
MACHINE, PEAKS = Machine("a CPU", "", "", "2.13", "", "", "abc"), Peaks(1e11, 1e10)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 5)
        for t in (self.bn.running_mean, self.bn.running_var, self.bn.weight, self.bn.bias):
            assert t is not None
            t.data.uniform_(0.5, 1.5)

    def forward(self, x):
        return self.head(torch.relu(self.bn(self.conv(x))).mean((2, 3)))


def job(dtype: torch.dtype = torch.float32, **others) -> Job:
    return Job("net", Net().eval(), ((2, 3, 12, 12),), "infer", dtype, CPU, **others)


def rows(work: Job, *names: str) -> dict:
    found = run(model_task(work, [PROVIDERS[name] for name in names]), MACHINE, PEAKS, seconds=0)
    return {row.provider: row for row in found}


@pytest.mark.parametrize("name", STEPS)
def test_each_engine_passes_the_gate(name):
    missing = [package for package in STEPS[name][1] if importlib.util.find_spec(package) is None]
    if missing:
        pytest.skip(f"{missing[0]} is not installed")
    row = rows(job(), name)[name]
    assert (row.status, row.reason) == (OK, "")
    assert row.error is not None
    assert row.error < 1e-5
    assert row.ours == (name == "frozen")


def test_a_step_that_computes_wrong_numbers_has_no_time(monkeypatch):
    monkeypatch.setitem(STEPS, "frozen", (lambda job: lambda: [torch.zeros(2, 5)], ()))
    assert rows(job(), "frozen")["frozen"].status == WRONG


def test_a_network_that_cannot_be_frozen_is_one_row_that_failed(monkeypatch):
    def refused(model, *images):
        raise ValueError("it cannot be frozen")

    monkeypatch.setattr(engines, "freeze", refused)
    found = rows(job(), "frozen", "eager")
    assert (found["frozen"].status, found["eager"].status) == (FAILED, OK)
    assert "it cannot be frozen" in found["frozen"].reason


def test_what_a_file_held_is_run_and_not_frozen_again(monkeypatch):
    work = job()
    frozen = cnnfast.freeze(work.model, *work.inputs())
    monkeypatch.setattr(engines, "freeze", lambda *arguments: pytest.fail("it is frozen already"))
    file = replace(work, model=module_of(frozen.network.graph), frozen=frozen)
    assert {row.status for row in rows(file, "frozen", "eager").values()} == {OK}


def test_the_graph_as_a_module_computes_what_the_model_does():
    """In float64 too, in which the gate asks for it."""
    work = job()
    module = module_of(cnnfast.freeze(work.model, *work.inputs()).network.graph)
    images = torch.randn(3, 3, 12, 12, dtype=torch.float64)
    (found,) = module.double()(images)
    torch.testing.assert_close(found, work.model.double()(images), rtol=1e-5, atol=1e-5)


def test_why_an_engine_does_not_run(monkeypatch):
    assert engines.unavailable("frozen", replace(job(), device=torch.device("meta"))) == "only on a CPU"
    assert engines.unavailable("frozen", job(torch.bfloat16)) == ""
    monkeypatch.setattr(engines.importlib.util, "find_spec", lambda name: None if name == "openvino" else object())
    assert engines.unavailable("openvino", job()) == "openvino is not installed"
    assert engines.unavailable("onnxruntime", job(torch.bfloat16)) == "only in float32"
    assert rows(job(), "openvino")["openvino"].status == UNAVAILABLE
