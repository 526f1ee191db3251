"""Training by kernels beside PyTorch's and float64: the quick part of benchmarks/stage_accuracy.py, and its judge."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cnnfast.checking import trained
from cnnfast.checking.report import Comparison
from cnnfast.checking.trained import by_all_ratios, by_the_middle, judge_training

pytest.importorskip("triton")
NARROW, WIDE = 16, 64


class NarrowToWide(nn.Module):
    """A bottleneck block that sees as few channels as its middle has, so that it ends in two convolutions from narrow
    to wide, one of them a projection. All its channels, on half of which the ReLU is 0, stay away from the kink: errors
    are those of rounding alone, and the same in every run of the dice.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv2, self.bn2 = nn.Conv2d(NARROW, NARROW, 3, padding=1, bias=False), nn.BatchNorm2d(NARROW)
        self.conv3, self.bn3 = nn.Conv2d(NARROW, WIDE, 1, bias=False), nn.BatchNorm2d(WIDE)
        self.downsample = nn.Sequential(nn.Conv2d(NARROW, WIDE, 1, bias=False), nn.BatchNorm2d(WIDE))
        self.relu = nn.ReLU(inplace=True)
        for norm in (self.bn2, self.bn3, self.downsample[1]):
            nn.init.constant_(norm.weight, 0.125)
        for norm in (self.bn2, self.bn3):
            with torch.no_grad():
                norm.bias.copy_(1.0 - 2.0 * (torch.arange(norm.num_features) % 2))

    def forward(self, x):
        y = self.bn3(self.conv3(self.relu(self.bn2(self.conv2(x)))))
        y += self.downsample(x)
        return self.relu(y)


def judged(dtype, steps, model):
    return judge_training(model, torch.randn(2, NARROW, 8, 8), dtype, steps)  # 8 pixels for each channel


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16], ids=str)
def test_gradients_and_training_err_no_more_than_twice_as_pytorchs(dtype):
    row = judged(dtype, 2, NarrowToWide())
    assert not [(c.tensor, c.message, c.rms, c.rms_limit) for c in row.beyond]
    names = {c.tensor for c in row.comparisons}
    assert len(names) == len(row.comparisons) == 2 + 9 + 6 + 9 + 6 + 1
    assert {"output", "grad of input", "grad of conv3.weight", "bn3.running_var"} <= names
    assert {"conv3.weight after 2 steps", "bn3.running_var after 2 steps", "all parameters after 2 steps"} <= names
    assert row.launches > 2 * 9
    if dtype != torch.float32:  # of rounding, not zero
        assert sum(c.torch_rms > 0 for c in row.comparisons) > 25


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 8, 1, bias=False), nn.BatchNorm2d(8)), torch.randn(2, 4, 4, 4)


def rms(t):
    return float(t.double().square().mean().sqrt())


@pytest.mark.parametrize(
    ("wrong", "share"),
    [
        ("grad of 0.weight", 0.97),
        ("grad of 0.weight", 1.03),
        ("1.running_mean", 1.03),
        ("all parameters after 2 steps", 1.03),
    ],
)
def test_what_errs_more_is_found(monkeypatch, wrong, share):
    """One tensor of ours, which are the first to be computed, is off by a share of its limit."""
    seen, train = [], trained.trained

    def spoilt(*arguments):
        seen.append(train(*arguments))
        if len(seen) == 3:  # theirs and the float64 network are computed, ours is still to be compared
            mine, theirs, exact = (found[wrong] for found in seen)
            limit = 2 * rms(theirs.double() - exact) + torch.finfo(mine.dtype).eps * rms(exact)
            seen[0][wrong] = exact + share * limit
        return seen[-1]

    monkeypatch.setattr(trained, "trained", spoilt)
    monkeypatch.setattr(trained, "compare", at_float64(trained.compare))
    monkeypatch.setattr(trained, "DRAWS", 0)
    row = judge_training(*small(), torch.float32, 2)
    assert [c.tensor for c in row.beyond] == [wrong] * (share > 1)


@pytest.mark.parametrize("wrong", ["grad of 0.weight", "0.weight after 2 steps"])
def test_what_errs_more_by_chance_is_looked_at_again(monkeypatch, wrong):
    """Of ours, the first training and one of the five that are looked at have a jump; with the same in all of them the
    tensor stays beyond. As many steps are made again as the tensor takes.
    """
    by_kernels, steps_made = trained.by_kernels, []

    def spoilt(model, x, steps):
        found = by_kernels(model, x, steps)
        steps_made.append(steps)
        if len(steps_made) <= 2 or always:
            found[wrong] = found[wrong] * 1.5
        return found

    monkeypatch.setattr(trained, "by_kernels", spoilt)
    for always in (False, True):
        steps_made.clear()
        row = judge_training(*small(), torch.float16, 2, look_again=True)
        assert wrong in row.looked_again
        assert (wrong in [c.tensor for c in row.beyond]) == always
        expected = 2 if any("after" in name for name in row.looked_again) else 1
        assert steps_made == [2] + 5 * [expected]
    assert judge_training(*small(), torch.float16, 2).looked_again == ()


@pytest.mark.parametrize(("share", "beyond"), [(1.0, False), (1.5, False), (3.0, True)])
def test_a_second_look_is_by_all_ratios(share, beyond):
    """Half of PyTorch's trainings and most of ours have a jump, so that ours is beyond by the middle ones of both. What
    errs three times as much throughout is beyond by the ratios too.
    """
    theirs = [3.0, 10.0, 2.5, 10.5, 3.5, 8.0, 2.6]
    ours = [share * e for e in (10.0, 3.2, 2.7, 10.2, 9.0)]
    draws = [
        Comparison("t", error=a, torch_error=b, limit=2 * b, rms=a / 2, torch_rms=b / 2, rms_limit=b)
        for a, b in zip([*ours, 0.0, 0.0], theirs, strict=True)
    ]
    assert by_the_middle(*draws).rms > by_the_middle(*draws).rms_limit
    judged = by_all_ratios(draws, 5)
    assert (judged.rms > judged.rms_limit, judged.error > judged.limit) == (beyond, beyond)
    assert (judged.error, judged.rms) == (9.0 * share, 4.5 * share)
    middle = sorted(a / b for a in ours for b in theirs)[17]
    assert judged.error / judged.torch_error == judged.rms / judged.torch_rms == pytest.approx(middle)
    exact = by_all_ratios([Comparison("t", error=0.0, torch_error=0.0, limit=1.0, rms=0.0, rms_limit=1.0)], 1)
    assert (exact.error, exact.torch_error, exact.limit) == (0.0, 0.0, 1.0)


def at_float64(compare):
    """`compare` for a tensor of ours that is float64, since float32 would round what spoils it."""

    def wider(name, mine, theirs, *others, **how):
        return compare(name, mine, theirs.to(mine.dtype), *others, **how)

    return wider


def test_the_limit_is_by_the_middle_one_of_pytorchs_own_errors(monkeypatch):
    """One draw of PyTorch's may be lucky, and one may jump at a kink; each is compared with the float64 network on its
    own images.
    """
    draws = [
        Comparison("t", error=3.0, torch_error=own, limit=2 * own + 1, rms=2.0, torch_rms=own / 2, rms_limit=own + 1)
        for own in (1.0, 1e6, 2.0)
    ]
    judged = by_the_middle(*draws)
    assert (judged.error, judged.torch_error, judged.limit) == (3.0, 2.0, 5.0)
    assert (judged.rms, judged.torch_rms, judged.rms_limit) == (2.0, 1.0, 3.0)

    found = []
    monkeypatch.setattr(trained, "by_the_middle", lambda *draws: found.append(draws) or by_the_middle(*draws))
    row = judge_training(*small(), torch.float16, 1)
    assert [len(draws) for draws in found] == [5] * len(row.comparisons)
    (output,) = ([c.torch_rms for c in draws] for draws in found if draws[0].tensor == "output")
    assert len(set(output)) == 5
    assert max(output) < 1.5 * min(output)
