"""How long check will take, before it begins: more work takes longer, and other load on the machine counts."""

from __future__ import annotations

import os

import pytest
import torch
from torch import nn

import cnnfast.functional as F
from cnnfast.checking import duration
from cnnfast.checking.duration import START, estimated_seconds, foreseen
from cnnfast.commands.console import about
from cnnfast.measuring import load


def seconds(model: nn.Module, *shape: int, backward: bool = False) -> float:
    """Of the kernels alone."""
    calls = duration.capture_calls(model.eval(), (torch.zeros(shape),))
    return estimated_seconds(calls, duration.steps(model, backward), backward)


def test_more_work_takes_longer():
    conv = nn.Conv2d(16, 32, 3, padding=1)
    once = seconds(conv, 1, 16, 32, 32)
    assert 3.5 < seconds(conv, 4, 16, 32, 32) / once < 4.5
    assert seconds(nn.Conv2d(16, 32, 5, padding=2), 1, 16, 32, 32) / once == pytest.approx(25 / 9)
    assert seconds(nn.Conv2d(16, 32, 3, padding=1, stride=2), 1, 16, 32, 32) < once / 3
    assert seconds(conv, 1, 16, 32, 32, backward=True) > 3 * once
    assert seconds(nn.Sequential(conv, nn.Conv2d(32, 16, 1)), 1, 16, 32, 32) > once
    assert seconds(nn.ConvTranspose2d(16, 32, 3), 1, 16, 32, 32) > 0
    assert 0 < seconds(nn.MaxPool2d(2), 1, 16, 32, 32) < once


@pytest.mark.parametrize("affine", [True, False])
def test_norms_without_a_convolution_pass_over_memory(affine):
    bn = nn.BatchNorm2d(16, affine=affine)

    def norm_first(x):
        y = F.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias)
        return F.bn_act(y, bn.running_mean, bn.running_var, bn.weight, bn.bias, activation="silu")

    calls = duration.capture_calls(norm_first, (torch.zeros(1, 16, 32, 32),))
    assert [call.operation for call in calls] == ["batch_norm", "bn_act"]
    both = estimated_seconds(calls, [], False)
    assert both == pytest.approx(2 * estimated_seconds(calls[:1], [], False))
    assert 0 < both < seconds(nn.Conv2d(16, 32, 3, padding=1), 1, 16, 32, 32)


def test_a_busy_machine_takes_longer(monkeypatch):
    monkeypatch.setattr(load, "usable_cores", lambda: 2)
    taken = {}
    for others in (0.0, 1.0, 7.0):
        monkeypatch.setattr(os, "getloadavg", lambda others=others: (others, 0.0, 0.0))
        calls, taken[others] = foreseen(nn.Conv2d(3, 4, 3), (torch.zeros(1, 3, 8, 8),), backward=True, dtype=None)
        assert calls == 1
    assert START < taken[0.0] == taken[1.0]
    assert taken[7.0] == pytest.approx(4 * taken[0.0])
    assert load.cores_for(2) == pytest.approx(4 / 9)


def test_nothing_to_check_takes_only_the_start(monkeypatch):
    monkeypatch.setattr(duration, "cores_for", lambda processes: 1.0)
    assert foreseen(torch.relu, (torch.zeros(1),), backward=True, dtype="fp64") == (0, START)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.2, "a few seconds"), (12, "about 12 seconds"), (43, "about 40 seconds"), (61, "about 60 seconds"),
        (170, "about 3 minutes"), (1500, "about 20 minutes"), (5000, "about 80 minutes"), (7300, "about 2 hours"),
        (4000 * 3600, "about 4,000 hours"),
    ],
)  # fmt: skip
def test_durations_are_said_as_people_say_them(seconds, words):
    assert about(seconds) == words
