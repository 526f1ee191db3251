"""The loss of a batch, what its weights are, and what is done with its gradient."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from cnnfast.training.averaging import MovingAverage
from cnnfast.training.losses import cross_entropy
from cnnfast.training.optimizing import OPTIMIZERS, make_optimizer
from cnnfast.training.schedule import SCHEDULES, make_schedule
from tests.support.trainable import small_net


def by_definition(logits, shares, weights, smoothing):
    """In float64, sum by sum."""
    K = logits.shape[1]
    smoothed = shares * (1 - smoothing) + smoothing / K
    return -(smoothed * weights * logits.log_softmax(1)).sum() / len(logits)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
def test_labels_and_shares_give_the_loss_by_definition(smoothing, weighted, device):
    logits = torch.randn(7, 5, dtype=torch.float64, device=device)
    labels = torch.tensor([0, 1, 2, 3, 4, 0, 0], device=device)
    weights = torch.tensor([0.5, 2.0, 1.0, 0.0, 3.0], dtype=torch.float64, device=device) if weighted else None
    counted = torch.ones(5, dtype=torch.float64, device=device) if weights is None else weights
    hard = functional.one_hot(labels, 5).double()
    mixed = 0.7 * hard + 0.3 * hard.roll(1, 0)
    for given, shares in ((labels, hard), (hard, hard), (mixed, mixed)):
        loss = cross_entropy(logits, given, weights, smoothing)
        torch.testing.assert_close(loss, by_definition(logits, shares, counted, smoothing), rtol=1e-12, atol=0)


def test_without_weights_it_is_pytorch_s(device):
    logits, labels = torch.randn(6, 4, device=device), torch.tensor([0, 1, 2, 3, 0, 1], device=device)
    assert torch.allclose(
        cross_entropy(logits, labels, None, 0.1), functional.cross_entropy(logits, labels, label_smoothing=0.1)
    )


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_norms_and_biases_do_not_decay(name):
    model = small_net()
    model.fc.weight.requires_grad_(False)
    decays, stays = make_optimizer(name, model, 0.1, 0.02).param_groups
    assert (decays["weight_decay"], stays["weight_decay"]) == (0.02, 0.0)
    of = {id(p): name for name, p in model.named_parameters()}
    assert {of[id(p)] for p in decays["params"]} == {"stem.0.weight", "conv.weight"}
    assert {of[id(p)] for p in stays["params"]} == {"stem.1.weight", "stem.1.bias", "bn.weight", "bn.bias", "fc.bias"}


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_rise_and_fall(name, steps):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(2))], 0.5, momentum=0.9)
    schedule, rates = make_schedule(name, optimizer, steps), []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    highest = max(range(steps), key=rates.__getitem__)
    assert max(rates) <= 0.5
    assert rates[: highest + 1] == sorted(rates[: highest + 1])
    assert rates[highest:] == sorted(rates[highest:], reverse=True)
    if steps == 100:
        assert max(rates) > 0.49
        assert highest == (29 if name == "one-cycle" else 5)
        assert rates[-1] < 0.001


def test_the_average_forgets_the_first_weights_soon_and_copies_counters(device):
    average = MovingAverage(0.9)
    held = [torch.tensor([0.0], device=device)]
    for step in range(200):
        average._steps = step + 1
        average._average(held, [torch.tensor([1.0], device=device)], None)
        if step == 9:
            # the product of (1 + n) / (10 + n) from n = 1 to 10
            first = math.prod((1 + n) / (10 + n) for n in range(1, 11))
            assert held[0].item() == pytest.approx(1 - first, abs=1e-6)
    before = held[0].clone()
    average._average(held, [torch.tensor([0.0], device=device)], None)
    assert held[0].item() == pytest.approx(0.9 * before.item())
    counters = [torch.tensor([3], device=device)]
    average._average(counters, [torch.tensor([8], device=device)], None)
    assert counters[0].item() == 8
