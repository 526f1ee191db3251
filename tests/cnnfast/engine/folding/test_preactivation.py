"""Batch norm and ReLU before a convolution without padding are one maximum where that is accurate, and only there."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cnnfast.engine.folding.folding import fold
from tests.support.agreement import integers, normal
from tests.support.graphs import called, exactly_folded, in_float64, relative_error, written

aten = torch.ops.aten

IMAGE = (None, 4, None, None)
X = integers(3, 4, 6, 5, largest=5)
FILTERS = {"w": integers(6, 4, 1, 1)}
BIAS = {"b": integers(6, seed=1)}


def statistics(*gamma: float) -> dict[str, Tensor]:
    """Scales of 2 gamma, gamma, gamma / 2, ..."""
    channels = len(gamma)
    return {
        "gamma": torch.tensor(gamma, dtype=torch.float32),
        "beta": integers(channels, largest=2, seed=2),
        "mean": integers(channels, largest=2, seed=3),
        "var": torch.tensor([0.25, 1, 4, 1])[:channels],
    }


def rectified(c, x):
    return aten.relu.default(aten.batch_norm.default(x, c.gamma, c.beta, c.mean, c.var, False, 0.1, 0.0, False))


def network(c, x, stride=1, padding=0, groups=1):
    return aten.conv2d.default(rectified(c, x), c.w, None, [stride] * 2, [padding] * 2, [1, 1], groups)


@pytest.mark.parametrize(
    ("gamma", "call"),
    [
        ((1, 2, 4, 0.5), "aten.maximum.default"),
        ((1, 0, 4, 0), "aten.maximum.default"),  # a constant
        ((1, -2, 4, -0.5), "aten.clamp.Tensor"),
        ((-1, -2, 0, -0.5), "aten.clamp.Tensor"),
    ],
)
@pytest.mark.parametrize("stride", [1, 2])
def test_it_is_one_maximum(gamma, call, stride):
    graph = written(lambda c, x: network(c, x, stride), IMAGE, **FILTERS, **statistics(*gamma))
    folded = exactly_folded(graph, X)
    assert called(folded) == {call: 1, "cnnfast.convolution": 1}
    bounds = [folded.constant(n) for node in folded.calls.nodes if node.name == "relu_default" for n in node.args[1:]]
    assert [tuple(bound.shape) for bound in bounds if bound is not None] == [(1, 4, 1, 1)] * len(bounds)


@pytest.mark.parametrize("groups", [2, 4])
def test_groups(groups):
    filters = {"w": integers(8, 4 // groups, 1, 1)}
    graph = written(lambda c, x: network(c, x, groups=groups), IMAGE, **filters, **statistics(1, -2, 4, 0.5))
    assert called(exactly_folded(graph, X)) == {"aten.clamp.Tensor": 1, "cnnfast.convolution": 1}


def test_more_taps_without_padding_and_other_ranks():
    graph = written(network, IMAGE, w=integers(6, 4, 3, 3), **statistics(1, -2, 4, 0.5))
    assert called(exactly_folded(graph, X)) == {"aten.clamp.Tensor": 1, "cnnfast.convolution": 1}

    def of_signals(c, x):
        return aten.conv1d.default(rectified(c, x), c.w, c.b)

    graph = written(of_signals, (None, 4, None), w=integers(6, 4, 3), **BIAS, **statistics(1, 2, 4, 0.5))
    assert called(exactly_folded(graph, X[..., 0])) == {"aten.maximum.default": 1, "cnnfast.convolution": 1}


AFFINE = {"cnnfast.affine": 1, "cnnfast.convolution": 1}


def test_a_border_of_zeros_comes_after_the_relu():
    graph = written(lambda c, x: network(c, x, padding=1), IMAGE, **FILTERS, **statistics(1, 2, 4, 0.5))
    assert called(exactly_folded(graph, X)) == AFFINE


@pytest.mark.parametrize("who", ["the norm", "the relu"])
def test_other_users_want_what_the_norm_and_the_relu_give(who):
    """As the shortcut of a pre-activation ResNet."""

    def shared(c, x):
        y = aten.batch_norm.default(x, c.gamma, c.beta, c.mean, c.var, False, 0.1, 0.0, False)
        z = aten.relu.default(y)
        return aten.conv2d.default(z, c.w), z if who == "the relu" else y

    calls = called(exactly_folded(written(shared, IMAGE, **FILTERS, **statistics(1, 2, 4, 0.5)), X))
    assert calls["cnnfast.affine"] == calls["cnnfast.convolution"] == 1
    assert "aten.maximum.default" not in calls


def test_a_batch_norm_after_the_convolution_is_folded_too():
    def network(c, x):
        y = aten.conv2d.default(rectified(c, x), c.w)
        return aten.batch_norm.default(y, None, None, c.mean, c.var, False, 0.1, 0.0, False)

    graph = written(network, IMAGE, w=integers(4, 4, 1, 1), **statistics(1, 2, 4, 0.5))
    assert called(exactly_folded(graph, X)) == {"aten.maximum.default": 1, "cnnfast.convolution": 1}


def adversarial() -> dict[str, dict[str, Tensor]]:
    """Statistics of 64 channels."""
    c = 64
    usual = {
        "gamma": 0.5 + normal(c, seed=1).abs(),
        "beta": normal(c, seed=2) - 0.5,
        "mean": normal(c, seed=3),
        "var": 0.2 + normal(c, seed=4).abs(),
    }
    few = torch.arange(c) % 8 == 0
    return {
        "usual": usual,
        "negative": {**usual, "gamma": torch.where(few, -1, 1) * usual["gamma"]},
        "zeros": {**usual, "gamma": torch.where(few, 0, usual["gamma"])},
        "small": {**usual, "gamma": torch.where(few, 1e-6, usual["gamma"])},
        "tiny": {**usual, "gamma": torch.where(few, 1e-20, usual["gamma"])},
        "below what float32 can divide by": {**usual, "gamma": torch.where(few, 1e-42, usual["gamma"])},
        "never positive": {**usual, "beta": -30 * usual["gamma"]},
        "far from zero": {**usual, "mean": 1e4 * usual["mean"]},
        "far from zero and narrow": {**usual, "mean": 1e3 + usual["mean"], "var": 1e-4 * usual["var"]},
        "huge shift": {**usual, "beta": 1e6 * usual["beta"]},
        "a dead channel": {
            **usual,
            "var": torch.where(few, 0, usual["var"]),
            "beta": torch.where(few, 1e3, usual["beta"]),
        },
    }


STATISTICS = adversarial()
# Where a maximum is used: the others keep the norm.
CUT = {"usual", "negative", "zeros", "small", "tiny", "huge shift", "a dead channel"}


@pytest.mark.parametrize("name", STATISTICS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_as_accurate_as_what_it_replaces(name, dtype):
    """Inputs of which the statistics are true."""

    def network(c, x):
        y = aten.batch_norm.default(x, c.gamma, c.beta, c.mean, c.var, False, 0.1, 1e-5, False)
        return aten.conv2d.default(aten.relu.default(y), c.w)

    given = {key: value.float() for key, value in STATISTICS[name].items()}
    graph = written(network, (None, 64, None, None), w=normal(32, 64, 1, 1).float(), **given)
    x = normal(4, 64, 8, 8, seed=9) * given["var"].sqrt().reshape(-1, 1, 1) + given["mean"].reshape(-1, 1, 1)
    x = x.to(dtype)
    folded = fold(graph, dtype)
    cut = {"aten.maximum.default", "aten.clamp.Tensor"} & {*called(folded)}
    assert bool(cut) == (name in CUT and dtype == torch.float32)
    (ours,), (right,) = folded.run([x]), in_float64(graph, [x])
    assert ours.isfinite().all()
    if name == "far from zero and narrow" and dtype == torch.bfloat16:
        return  # numbers around 1000 are 4 apart in it, and the statistics say that they differ by 0.01
    if name == "never positive":
        assert torch.equal(ours, torch.zeros_like(ours))
        assert torch.equal(right, torch.zeros_like(right))
        return
    rounded = {key: value.to(dtype) for key, value in graph.constants.items()}
    theirs = type(graph)(graph.calls, rounded, graph.inputs).run([x])[0]
    floor = torch.finfo(dtype).eps * 16
    assert relative_error(ours, right) <= 2 * relative_error(theirs, right) + floor
