"""Modules that get their sizes at their first call: reports and summaries before it, and after it, and what they leave
of the model.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.parameter import is_lazy

import cnnfast
from cnnfast.summary import summarize
from cnnfast.targets.inputs import input_shape
from cnnfast.targets.target import TargetError
from tests.support.told import assert_report_is_true, assert_reports_are_true

WAITING = "not initialised yet: run the model once, then convert it"


def lazy_layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.LazyConv2d(4, 3, bias=False),
        nn.LazyBatchNorm2d(),
        nn.ReLU(),
        nn.LazyConvTranspose2d(3, 2, 2),
        nn.Flatten(2),
        nn.LazyConv1d(5, 3),
        nn.Flatten(),
        nn.LazyLinear(7),
    )


class Mixed(nn.Module):
    """A lazy convolution among others, and one that is not called."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.lazy = nn.Sequential(nn.LazyConv2d(4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.unused = nn.LazyConv2d(4, 3)

    def forward(self, x):
        return self.lazy(self.stem(x))


IMAGE = (2, 3, 8, 8)
COVERED = ["0", "1", "3", "5"]


@pytest.fixture
def small(quick) -> torch.Tensor:
    return torch.randn(IMAGE, generator=torch.Generator().manual_seed(0)).to(quick)


def uninitialised(model: nn.Module) -> list[str]:
    return [name for name, t in (*model.named_parameters(), *model.named_buffers()) if is_lazy(t)]


@pytest.mark.parametrize("with_input", [False, True], ids=["no input", "input"])
@pytest.mark.parametrize(
    "prepare", [lambda model: model, cnnfast.convert, cnnfast.revert], ids=["original", "converted", "reverted"]
)
def test_a_report_before_the_first_run(prepare, with_input, small):
    """Each module that is to be covered is named; FLOPs are counted; nothing is initialised."""
    model = prepare(lazy_layers().to(small.device))
    waiting, classes = uninitialised(model), [type(m) for m in model.modules()]
    report = cnnfast.report(model, *[small] * with_input)
    rows = {row.name: row for row in report.rows}
    assert list(rows) == COVERED
    assert {(row.status, row.reason) for row in rows.values()} == {("left", WAITING)}
    assert [rows[name].kind for name in COVERED] == [
        "LazyConv2d",
        "LazyBatchNorm2d",
        "LazyConvTranspose2d",
        "LazyConv1d",
    ]
    assert rows["0"].flops == (2 * 2 * 4 * 6 * 6 if with_input else 2 * 4 * 222 * 222) * 3 * 9
    assert uninitialised(model) == waiting != []
    assert [type(m) for m in model.modules()] == classes
    model(small)
    assert not uninitialised(model)


def test_a_report_without_an_input_that_the_model_takes(quick):
    report = cnnfast.report(nn.Sequential(nn.LazyConv2d(4, 3), nn.Linear(7, 7)).to(quick))
    assert [(row.reason, row.flops) for row in report.rows] == [(WAITING, None)]


@pytest.mark.parametrize("when", ["first", "last"])
def test_conversion_and_the_first_run(when, small):
    """Converted last, everything is. Converted first, the modules become PyTorch's at the first run, and a second
    conversion finds them.
    """
    model = lazy_layers().to(small.device)
    if when == "first":
        ours = cnnfast.convert(model)
        ours(small)
        assert {row.status for row in assert_report_is_true(ours, small).rows} == {"left"}
        assert "not converted: it came later" in {
            row.reason.partition(",")[0] for row in cnnfast.report(ours, small).rows
        }
        cnnfast.report(model, small)  # it shares what has been initialised, and has not run itself
        model(small)
        assert {row.status for row in cnnfast.report(model, small).rows} == {"left"}
        ours = cnnfast.convert(ours)
    else:
        model(small)
        ours = cnnfast.convert(model)
    for report in assert_reports_are_true(ours, small).values():
        assert {row.name: row.status for row in report.rows if row.name} == dict(
            zip(COVERED, ("fused", "fused", "replaced", "replaced"), strict=True)
        )


def test_the_command_line_finds_an_input():
    """Of a lazy convolution a colour image is assumed; of a lazy linear layer nothing can be."""
    assert input_shape(lazy_layers(), 1, small=False) == (1, 3, 224, 224)
    with pytest.raises(TargetError, match="no layer with a weight that would tell its input"):
        input_shape(nn.Sequential(nn.LazyLinear(3)), 1, small=False)


def test_a_model_of_both(small):
    ours = cnnfast.convert(Mixed().to(small.device))
    rows = {row.name: (row.status, row.reason) for row in cnnfast.report(ours, small).rows}
    assert rows["stem.0"] == ("fused", "Conv2d + BatchNorm2d + ReLU")
    assert rows["lazy.0"] == rows["unused"] == ("left", WAITING)
    assert rows["lazy.1"] == ("fused", "BatchNorm2d + ReLU")
    assert uninitialised(ours) == ["lazy.0.weight", "lazy.0.bias", "unused.weight", "unused.bias"]
    ours(small)
    ours = cnnfast.convert(ours)
    rows = {row.name: (row.status, row.reason) for row in assert_reports_are_true(ours, small)["train"].rows}
    assert rows["lazy.0"][0] == "fused"
    assert rows["unused"] == ("left", WAITING)


def test_a_summary_before_the_first_run_is_that_after_it(small):
    model = lazy_layers().to(small.device)
    before = summarize(model, small)
    assert uninitialised(model)
    model(small)
    assert before == summarize(model, small)
    both = Mixed().to(small.device)
    summary = summarize(both, small)
    assert (summary.parameters, summary.unused) == (2 * (3 * 4 * 9 + 4 + 8) + 4 * 9, 0), (
        "what nobody calls has no size yet"
    )


class Branching(nn.Module):
    """Runs on numbers only."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = lazy_layers()

    def forward(self, x):
        return self.layers(x) if x.sum() > -1e9 else x


def test_a_model_that_needs_numbers(small):
    model = Branching().to(small.device)
    summary = summarize(model, small)
    assert uninitialised(model)
    named = [replace(layer, name=f"layers.{layer.name}") for layer in summarize(model.layers, small).layers]
    assert summary.layers == named
    assert {row.reason for row in cnnfast.report(cnnfast.convert(model, inplace=True), small).rows} == {WAITING}
    assert uninitialised(model)
    copied = copy.deepcopy(model.layers[0])
    assert uninitialised(copied)
