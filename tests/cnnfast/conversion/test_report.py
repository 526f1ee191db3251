"""The report of a conversion says the truth, in numbers that one can check, and changes nothing."""

from __future__ import annotations

import copy
import json
import random

import pytest
import torch
from torch import nn

import cnnfast
from tests.support.blocks import CHANNELS, CONVOLUTIONS, Block, block, build, image
from tests.support.steps import assert_same_steps


class Doubled(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) * 2


def rows_of(report) -> dict:
    rows = {row.name: row for row in report.rows}
    assert len(rows) == len(report.rows), "one row a module"
    return rows


def test_one_row_for_each_module_that_could_be_covered(net, x):
    rows = rows_of(cnnfast.report(cnnfast.convert(net), x))
    kinds = {name: row.kind for name, row in rows.items() if row.status != "left"}
    expected = {name: type(m).__name__ for name, m in net.named_modules() if isinstance(m, nn.Conv2d | nn.BatchNorm2d)}
    assert {name: kind for name, kind in kinds.items() if kind in ("Conv2d", "BatchNorm2d")} == expected
    assert {name: kind for name, kind in kinds.items() if name in ("pool", "average")} == {
        "pool": "MaxPool2d",
        "average": "AdaptiveAvgPool2d",
    }
    assert all(rows[name].status == "fused" for name in expected)
    assert rows["pool"].status == rows["average"].status == "replaced"
    assert not [row for row in rows.values() if row.status == "left" and not row.reason]
    assert all(rows[name].reason for name in expected), "what it was fused into"


def test_operations_are_counted(quick):
    """A multiply-add counts as two: of the convolution that was called, on the size that it was given, as often as it
    was.
    """
    model = build(
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Conv2d(8, 8, (3, 1), groups=4), nn.Conv2d(8, 5, 1)
        ),
        quick,
    )
    rows = rows_of(cnnfast.report(cnnfast.convert(model), torch.zeros(2, 3, 9, 11, dtype=torch.float64, device=quick)))
    assert [rows[name].flops for name in "012"] == [
        2 * (2 * 8 * 5 * 6) * (3 * 3 * 3),
        2 * (2 * 8 * 3 * 6) * (2 * 3 * 1),
        2 * (2 * 5 * 3 * 6) * 8,
    ]

    def forward(self, x):
        return self.conv(self.conv(x)) + self.conv2(x)

    shared = rows_of(cnnfast.report(cnnfast.convert(build(block(forward), quick)), image().to(quick)))
    one = 2 * (2 * CHANNELS * 5 * 5) * CHANNELS
    assert (shared["conv"].flops, shared["conv2"].flops) == (2 * 9 * one, one)
    assert shared["bn2"].flops in (0, None), "never called"


def test_coverage(quick):
    """The share of the work that our kernels do: of two convolutions alike, one a subclass with its own forward, a
    half.
    """
    x = image().to(quick)
    model = build(
        lambda: nn.Sequential(nn.Conv2d(CHANNELS, CHANNELS, 3), Doubled(CHANNELS, CHANNELS, 3, padding=1)), quick
    )
    ours = cnnfast.convert(model)
    report = cnnfast.report(ours, x)
    assert report.coverage == pytest.approx(0.5)
    assert [report.count(status) for status in ("fused", "replaced", "left")] == [0, 1, 1]
    assert cnnfast.report(cnnfast.convert(model[0]), x).coverage == 1
    assert cnnfast.report(model, x).coverage == 0, "not converted"
    assert {row.status for row in cnnfast.report(model, x).rows} == {"left"}


def test_counts(net, x):
    report = cnnfast.report(cnnfast.convert(net), x)
    assert [report.count(status) for status in ("fused", "replaced", "left")] == [CONVOLUTIONS, 0, 0]
    assert report.summary.startswith(f"{CONVOLUTIONS} of {CONVOLUTIONS} convolutions fused, 0 replaced, 0 left")


def test_reasons(quick):
    """Each way to be left, told apart."""

    def mutates(self, x):
        y = self.conv(x)
        x.add_(1)
        return self.relu(self.bn(y))

    def decides(self, x):
        return self.relu(self.bn(self.conv(x))) if x.sum() > 0 else x

    def trains_otherwise(self, x):
        return self.relu(self.bn(self.conv(x))) if self.training else self.bn(self.conv(x))

    class Owner(Block):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x):
            return self.relu(self.bn(self.conv(x))) * self.scale

    kinds = {"in_place": mutates, "decides": decides, "modes": trains_otherwise}
    model = nn.ModuleDict(
        {name: block(forward)() for name, forward in kinds.items()} | {"owner": Owner(), "subclass": Doubled(3, 3, 1)}
    )
    rows = rows_of(cnnfast.report(cnnfast.convert(model)))
    reasons = {name: rows[name].reason for name in model}
    assert {rows[name].status for name in model} == {"left"}
    assert len(set(reasons.values())) == len(model), reasons
    assert {rows[f"{name}.conv"].status for name in kinds} == {"replaced"}


def test_the_table_and_the_json(net, x):
    report = cnnfast.report(cnnfast.convert(net), x)
    table = str(report)
    for row in report.rows:
        if row.name:
            assert row.name in table
        assert row.kind in table
    assert "fused" in table
    assert max(map(len, table.splitlines())) <= 200
    data = json.loads(report.to_json())
    assert data["coverage"] == report.coverage
    fields = ("name", "kind", "status", "reason", "flops")
    assert [{name: row[name] for name in fields} for row in data["rows"]] == [
        {name: getattr(row, name) for name in fields} for row in report.rows
    ]


def test_without_an_input(net):
    """An image of ImageNet's size is tried; a model that does not take it is reported without numbers."""
    report = cnnfast.report(cnnfast.convert(net))
    assert rows_of(report)["stem.0"].flops == 2 * (CHANNELS * 222 * 222) * 27
    assert "1x3x224x224" in str(report)

    def forward(self, x, y):
        return self.relu(self.bn(self.conv(x)) + y)

    report = cnnfast.report(cnnfast.convert(build(block(forward))))
    assert {row.flops for row in report.rows} == {None}
    assert report.coverage is None
    assert "2 of 2" not in str(report)
    assert json.loads(report.to_json())["rows"]


@pytest.mark.parametrize("training", [False, True])
def test_a_report_changes_nothing(net, x, training):
    """Neither statistics nor modes, gradients, hooks or random numbers, though the model is run for it."""
    ours = cnnfast.convert(net).train(training)
    ours.layers[0].bn.eval()
    modes = [m.training for m in ours.modules()]
    state = {name: t.clone() for name, t in ours.state_dict().items()}
    attributes = [{name: id(value) for name, value in vars(m).items()} for m in ours.modules()]
    numbers = torch.get_rng_state(), random.getstate()
    before = copy.deepcopy(ours)
    cnnfast.report(ours, x)
    assert [m.training for m in ours.modules()] == modes
    assert all(torch.equal(t, state[name]) for name, t in ours.state_dict().items())
    assert [{name: id(value) for name, value in vars(m).items()} for m in ours.modules()] == attributes
    assert all(p.grad is None for p in ours.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in ours.modules())
    assert torch.equal(torch.get_rng_state(), numbers[0])
    assert random.getstate() == numbers[1]
    assert_same_steps(ours, before, x, fused=CONVOLUTIONS)


def test_what_keeping_strides_costs(net, x):
    """Weights that are not channels_last are read more slowly, and the report says so."""
    assert "channels_last" in str(cnnfast.report(cnnfast.convert(net), x))
    assert "channels_last" not in str(cnnfast.report(cnnfast.convert(net, memory_format=torch.channels_last), x))


def test_a_model_without_anything_to_cover(quick):
    model = cnnfast.convert(nn.Sequential(nn.Linear(3, 4), nn.ReLU()).to(quick))
    report = cnnfast.report(model, torch.zeros(2, 3, device=quick))
    assert [row.name for row in report.rows if row.status != "left"] == []
    assert str(report)
    assert 0 <= report.coverage <= 1
