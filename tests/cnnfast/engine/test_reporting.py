"""What frozen.report() says."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn

import cnnfast
from cnnfast.engine import runtime
from cnnfast.engine.reporting import short
from tests.support.freezable import Exact, image


@pytest.fixture(scope="module")
def frozen():
    return cnnfast.freeze(Exact(), image())


def test_each_step_says_what_it_stands_for(frozen):
    report = frozen.report()
    steps = {step.name: step for step in report.steps}
    assert next(iter(steps)) == "conv2d"
    stem, inner = steps["conv2d"], steps["conv2d_1"]
    assert (stem.operator, stem.pattern, stem.shape) == ("cnnfast.convolution", "convolution", (1, 8, 4, 4))
    assert [name.rstrip("_0123456789") for name in stem.fused] == ["conv2d", "batch_norm", "relu"]
    assert [name.rstrip("_0123456789") for name in inner.fused] == ["conv2d", "batch_norm", "add", "relu"]
    assert all(step.served_by for step in report.steps)
    # Every call of the model stands in one step, but for what computes nothing.
    named = [name for step in report.steps for name in step.fused]
    assert len(named) == len(set(named))
    text = str(report)
    assert "batch_norm + add + relu" in " ".join(text.split())
    assert max(map(len, text.splitlines())) <= 100


def test_the_summary(frozen):
    report = frozen.report()
    assert f"{report.runner} runs {len(report.steps)} steps" in report.summary
    assert "SQNR exact against float64" in report.summary
    assert "top-1 agreement 100.0%" in report.summary
    assert 0 < report.arena <= report.unshared
    assert report.summary in " ".join(str(report).split())


class Sorting(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x.sub(1).permute(0, 2, 3, 1).clamp(-1, 1) * x.permute(0, 2, 3, 1))


def test_what_stayed_pytorchs_stands_apart():
    report = cnnfast.freeze(Sorting(), image()).report()
    names = [short(step.operator) for step in report.pytorchs]
    assert "hardtanh" in names
    assert "permute" not in names, "a view computes nothing"
    apart = str(report).partition("steps that stayed PyTorch's")[2]
    assert "hardtanh" in apart


def test_the_reason_for_another_runner_is_told(monkeypatch):
    monkeypatch.setattr(runtime.sessions, "available", lambda graph: "it is not installed")
    report = cnnfast.freeze(Exact(), image()).report()
    assert report.runner == "oneDNN"
    assert "not onnxruntime: it is not installed" in str(report)
    assert json.loads(report.to_json())["why"] == "it is not installed"


def test_json_has_what_the_table_has(frozen):
    report = frozen.report()
    data = json.loads(report.to_json())
    assert (data["summary"], data["arena"], data["unshared"]) == (report.summary, report.arena, report.unshared)
    assert (data["sqnr"], data["agreement"]) == (None, 1.0)  # infinite: JSON has no such number
    assert [step["name"] for step in data["steps"]] == [step.name for step in report.steps]
    assert data["steps"][0]["shape"] == [1, 8, 4, 4]


def test_names_are_short_in_tables():
    assert [short(name) for name in ("aten.max_pool2d.default", "cnnfast.convolution", "python.getitem", "")] == [
        *("max_pool2d", "convolution", "getitem", "")
    ]
