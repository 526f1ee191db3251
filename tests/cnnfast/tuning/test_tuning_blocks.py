"""tune measures a residual block in training as one problem: which blocks, who wins, what is wrong, and what the row
then does.
"""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import cnnfast
import cnnfast.nn as cnn
from cnnfast import tuning
from cnnfast.checking.tf32 import rounded_product
from cnnfast.precision import float32_products, nearest_tf32
from cnnfast.tuning import ahead, racing, running_blocks
from cnnfast.tuning.measured import KERNELS, LIBRARY
from cnnfast_kernels import devices, launch, tables
from cnnfast_kernels.questions import BlockQuestion
from tests.support.specialisations import described_launches
from tests.support.tuned import LAST, clock, image

pytestmark = pytest.mark.usefixtures("quick_tuning")


class Blocks(nn.Module):
    """Two that are alike, and one with a projection."""

    def __init__(self) -> None:
        super().__init__()
        down = nn.Sequential(nn.Conv2d(4, 8, 1, 2, bias=False), nn.BatchNorm2d(8))
        self.blocks = nn.Sequential(cnn.BasicBlock(4, 4), cnn.BasicBlock(4, 4), cnn.BasicBlock(4, 8, 2, down))

    def forward(self, x):
        return self.blocks(x)


ALIKE = "block 2x4x6x6 > 4, 3x3/1 > 4, 3x3/1"
WITH_PROJECTION = "block 2x4x6x6 > 8, 3x3/2 > 8, 3x3/1 + 8, 1x1/2"


def planned(model, x, **how) -> dict[str, tuning.MeasuredBlock]:
    return {str(m): m for m in tuning.plan(model, x, **how) if isinstance(m, tuning.MeasuredBlock)}


def tuned(model, x, name=ALIKE, measure=None) -> tuning.Tuning:
    """Of that block alone."""
    result = tuning.begin(model, x, trains=(True,))
    result.left = [m for m in result.left if str(m) == name]
    tuning.proceed(result, x.device, measure=measure or clock())
    return result


def question(layers, size=6, N=2, C=4, branch=None, dtype=torch.float32, fmt=LAST, gpu=devices.NO_GPU, tf32=False):
    """layers: (filters, taps, stride, groups) of each."""
    x, taken, found = torch.empty(N, C, size, size).to(memory_format=fmt), C, []
    for i, (K, taps, stride, groups) in enumerate(layers):
        taken = C if i == branch else taken
        w = torch.empty(K, taken // groups, taps, taps).to(memory_format=fmt)
        found.append((w.shape, w.stride(), ((stride, stride), (taps // 2,) * 4, (1, 1), groups)))
        taken = K
    return BlockQuestion(gpu, dtype, tf32, x.shape, x.stride(), branch or len(layers), tuple(found))


# ----------------------------------------------------------------------------------------------------------------------
# Which blocks


def test_each_block_that_asks_for_a_row_is_planned_once(gpu, device):
    model, x = Blocks().to(device), image(device)
    found = planned(model, x, train=True)
    assert {name: m.count for name, m in found.items()} == {ALIKE: 2, WITH_PROJECTION: 1}
    assert [list(m.candidates) for m in found.values()] == [[KERNELS, LIBRARY]] * 2
    assert found[WITH_PROJECTION].key.projection
    assert planned(model, x, train=False) == {}
    model.blocks[0].relu = nn.SiLU()  # so that it is no block
    assert planned(model, x, train=True)[ALIKE].count == 1
    assert planned(cnnfast.convert(Blocks().to(device), memory="less"), x, train=True) == {}  # who asked for ours


def test_a_row_that_is_there_changes_nothing(gpu, device):
    """What is planned, and the tiles that a block by our kernels needs, are the same whoever serves now."""
    model, x = Blocks().to(device), image(device)
    before = tuning.plan(model, x, train=True)
    rows = [tables.BlockRow(m.key, "library", {}) for m in before if isinstance(m, tuning.MeasuredBlock)]
    tables.write(*gpu, rows, {})
    launch.forget_plans()
    assert [(m.key, m.count) for m in tuning.plan(model, x, train=True)] == [(m.key, m.count) for m in before]


def test_keys_are_those_that_calls_ask_for(gpu, device, monkeypatch):
    model = Blocks().to(device)
    found = {m.key for m in planned(model, image(device), train=True).values()}
    asked, find = set(), tables.find_block
    launch.forget_plans()
    monkeypatch.setattr(tables, "find_block", lambda key: asked.add(key) or find(key))
    cnnfast.convert(model, memory_format=LAST).train()(image(device).contiguous(memory_format=LAST))
    assert asked == found


# ----------------------------------------------------------------------------------------------------------------------
# Who wins


@pytest.mark.parametrize("winner", ["kernels", "library"])
def test_whoever_is_faster_serves_from_then_on(gpu, library_first, device, winner, monkeypatch):
    """It was raced with the tiles that were found before: plans were forgotten."""
    forgotten, order = launch.forget_plans, []
    monkeypatch.setattr(launch, "forget_plans", lambda: order.append("forgotten") or forgotten())
    model, x = Blocks().to(device), image(device)
    other = "library" if winner == "kernels" else "kernels"
    times = clock(**{winner: 50.0, other: 60.0})
    result = tuned(model, x, measure=lambda steps: order.append("raced") or times(steps))
    assert order == ["forgotten", "raced", "forgotten"]
    assert result.ok, str(result)
    (row,) = result.rows
    assert (row.winner, row.microseconds) == (winner, {winner: 50.0, other: 60.0})
    assert tables.find_block(row.key) == row
    assert tables.read(tables.user_file(*gpu)) == [row]
    converted = cnnfast.convert(model, memory_format=LAST).train()
    with cnnfast.trace() as trace:
        y = converted.blocks[0](x.contiguous(memory_format=LAST).requires_grad_())
        y.backward(torch.ones_like(y))
    assert ("conv_dgrad_below" in {call.operation for call in trace}) == (winner == "kernels")


def test_a_report(gpu, device):
    model, x = Blocks().to(device), image(device)
    result = tuning.begin(model, x, trains=(True,))
    left = {str(m): m for m in result.left}
    assert "residual block" not in str(tuning.Tuning(*gpu, left=[m for m in result.left if hasattr(m, "convolution")]))
    result.left = [left[ALIKE], left[WITH_PROJECTION]]

    def measure(steps):
        times = clock(kernels=50.0, library=60.0)(steps)
        Spent.left = 0.0
        return times

    class Spent:
        left = 1e9

    tuning.proceed(result, device, measure=measure, budget=Spent())
    text = " ".join(str(result).split())
    assert "1 of 2 residual blocks measured: our kernels win 1, the library 0" in text
    assert "and 1 residual blocks" in text
    assert ALIKE in text
    data = json.loads(result.to_json())
    assert [(m["block"], m["count"], m["row"]["winner"]) for m in data["measured"]] == [(ALIKE, 2, "kernels")]
    assert [c["name"] for c in data["measured"][0]["candidates"]] == [KERNELS, LIBRARY]
    assert [m["block"] for m in data["left"]] == [WITH_PROJECTION]


def test_wrong_numbers_never_win(gpu, device, monkeypatch):
    by_us = racing.by_us

    def spoilt(block, ours, a):
        results = by_us(block, ours, a)
        if ours:
            results[2][0, 0, 0, 0] += 0.25  # the gradient of the first filters
        return results

    monkeypatch.setattr(racing, "by_us", spoilt)
    result = tuned(Blocks().to(device), image(device), measure=clock(kernels=1.0))
    assert not result.ok
    assert result.rows == []
    assert result.problems[0][1].startswith("kernels: the gradient of w0: error")
    assert result.measured[0].candidates[LIBRARY].fault == ""
    assert "not measured" in str(result)
    assert not tables.user_file(*gpu).exists()


@pytest.mark.parametrize("caller", ["kernels", "torch", "auto"])
def test_both_candidates_are_what_their_names_say(gpu, library_first, device, caller):
    """Whatever backend its caller is in, and whatever row there is."""
    block = question([(8, 3, 2, 1), (8, 3, 1, 1), (8, 1, 2, 1)], branch=2)
    a = running_blocks.operands(block, device)
    tables.write(*gpu, [tables.BlockRow(block._replace(gpu=gpu).key, "kernels", {})], {})
    launch.forget_plans()
    for ours in (True, False):
        with cnnfast.backend(caller), torch.no_grad(), cnnfast.trace() as trace:
            running_blocks.by_us(block, ours, a)
        served = {call.served_by for call in trace if call.operation.startswith("conv_")}
        assert served == {"kernels" if ours else "library"}
        assert ("conv_dgrad_below" in {call.operation for call in trace}) == ours


# ----------------------------------------------------------------------------------------------------------------------
# Right numbers

FORMS = {
    "basic": {"layers": [(4, 3, 1, 1), (4, 3, 1, 1)]},
    "bottleneck": {"layers": [(8, 1, 1, 1), (8, 3, 2, 1), (32, 1, 1, 1), (32, 1, 2, 1)], "branch": 3, "C": 16},
    "grouped": {"layers": [(8, 3, 1, 2), (8, 3, 1, 8)], "C": 8},
    "contiguous": {"layers": [(8, 3, 2, 1), (8, 3, 1, 1), (8, 1, 2, 1)], "branch": 2, "fmt": torch.contiguous_format},
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_both_are_judged_right(device, form, dtype):
    block = question(dtype=dtype, **FORMS[form])
    a = running_blocks.operands(block, device)
    judge = running_blocks.BlockJudge(block, a)
    assert [judge.fault(running_blocks.by_us(block, ours, a)) for ours in (True, False)] == ["", ""]


def test_every_result_is_judged(device):
    block = question(dtype=torch.float16, **FORMS["bottleneck"])
    a = running_blocks.operands(block, device)
    judge = running_blocks.BlockJudge(block, a)
    right = judge.theirs
    assert judge.fault(right) == ""
    assert len(right) == 2 + 3 * 4
    for i, (name, t) in enumerate(zip(judge.names, right, strict=True)):
        wrong = t.clone()
        wrong[(-1,) * t.dim()] += max(0.5 * float(t.abs().max()), 0.125)  # the gradient of a beta may be 0
        assert judge.fault((*right[:i], wrong, *right[i + 1 :])).startswith(f"{name}: error")


def test_the_error_of_a_sum_that_cancels_is_measured_by_its_terms(device):
    """A 1x1 convolution and its norm follow, and where the ReLU passes all, beta1 changes nothing."""
    block = question(**FORMS["bottleneck"])
    judge = running_blocks.BlockJudge(block, running_blocks.operands(block, device))
    judge.theirs = judge.plain = right = tuple(t.float() for t in judge.exact)
    i = judge.names.index("the gradient of beta1")
    unit = torch.finfo(torch.float32).eps * judge.terms[i]
    assert float(right[i].abs().max()) < 0.01 * judge.terms[i]
    assert judge.fault((*right[:i], right[i] + 0.5 * unit, *right[i + 1 :])) == ""
    assert judge.fault((*right[:i], right[i] + 2 * unit, *right[i + 1 :])).startswith("the gradient of beta1: error")


def test_activations_stay_away_from_the_kink(device):
    """Else chance would tell which pass, and no rule of rounding would hold."""
    block = question(**FORMS["bottleneck"])
    for dtype in (torch.float16, torch.bfloat16):
        a = {name: t.to(dtype) for name, t in running_blocks.operands(block, device).items()}
        exact, rounded = (running_blocks.by_pytorch(block, a, d)[0][0] for d in (torch.float64, dtype))
        assert torch.equal(exact > 0, rounded > 0)
        assert 0.4 < float((exact > 0).double().mean()) < 0.6


def test_tf32_is_judged_as_tf32(device):
    """Of operands that TF32 cannot hold: what rounds them is right there, and wrong in float32."""
    block = question(**FORMS["basic"])
    a = running_blocks.operands(block, device)
    with float32_products("tf32"):
        rounded = running_blocks.by_us(block, True, a)
        assert running_blocks.BlockJudge(block._replace(tf32=True), a).fault(rounded) == ""
    assert "error" in running_blocks.BlockJudge(block, a).fault(rounded)


def test_a_rounded_product():
    left, right = (torch.tensor([1 + 2.0**-14, 3.0], requires_grad=True) for _ in range(2))
    y = rounded_product(torch.mul, left, right)
    y.backward(torch.tensor([1 + 2.0**-13, 1.0]))
    assert torch.equal(y, nearest_tf32(left) * nearest_tf32(right))
    assert torch.equal(left.grad, torch.tensor([1.0, 3.0]))


# ----------------------------------------------------------------------------------------------------------------------
# Compiled ahead


@pytest.mark.skipif(not launch.INTERPRETED, reason="a GPU's launches are not written down: plans launch by themselves")
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_the_lines_are_what_the_candidates_launch(gpu, device, dtype):
    measured = planned(Blocks().to(device), image(device), train=True, dtype=dtype)[WITH_PROJECTION]
    a = running_blocks.operands(measured.block, device)
    with described_launches() as launched:
        for name in measured.candidates:
            running_blocks.by_us(measured.block, name == KERNELS, a)
    assert set(ahead.launches(measured, gpu)) == set(launched)


def test_a_candidate_that_cannot_be_called_adds_no_line(gpu, device, monkeypatch):
    measured = planned(Blocks().to(device), image(device), train=True)[ALIKE]
    monkeypatch.setattr(ahead, "by_us", lambda *arguments: SimpleNamespace().nothing)
    assert ahead.launches(measured, gpu) == []
