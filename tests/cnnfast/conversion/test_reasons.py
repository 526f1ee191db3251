"""Why a convolution is not fused, or not with all that follows it: the report names what it is, not what it might have
been.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import cnnfast
from tests.support.blocks import CHANNELS, Block, block, build


class Scaled(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) * 2


class Clamped(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).clamp(-0.5, 0.5)


class Strange(nn.Module):
    def forward(self, x):
        return x + 1


class Shifted(nn.ReLU):
    def forward(self, x):
        return super().forward(x - 0.3)


def used_twice(self, x):
    y = self.conv(x)
    return self.relu(self.bn(y)) + torch.sigmoid(y)


def also_returned(self, x):
    y = self.conv(x)
    return self.relu(self.bn(y)), y


def not_used(self, x):
    self.conv(x)
    return self.relu(self.bn2(self.conv2(x)))


def pooled(self, x):
    return self.pool(self.conv(x)), self.bn2(self.conv2(x))


def returned(self, x):
    return self.conv(self.relu(self.bn(x)))


def resized_before_the_norm(self, x):
    return self.relu(self.bn(F.interpolate(self.conv(x), scale_factor=2)))


def plain(self, x):
    return self.relu(self.bn(self.conv(x)))


def written_by_a_module(self, x):
    y = self.conv(x)
    r = self.inplace(x)
    return self.relu(self.bn(y) + r)


def written_before_the_sum(self, x):
    y = self.bn(self.conv(x))
    x += 1
    return self.relu(y + x)


def written_by_out(self, x):
    y = self.bn(self.conv(x)) + x
    torch.mul(x, 0.5, out=x)
    return self.relu(y)


def statistics_of_a_child(self, x):
    return self.relu(self.bn(self.conv(x)) + self.child(x))


def norm_called_again(self, x):
    a = self.bn(self.conv(x))
    b = self.bn(self.conv2(x))
    return self.relu(a + b)


def sum_used_twice(self, x):
    y = self.bn(self.conv(x)) + x
    return self.relu(y) + y


def norm_used_twice(self, x):
    y = self.bn(self.conv(x))
    return self.relu(y) + y


def doubled(self, x):
    y = self.bn(self.conv(x))
    return self.relu(y + y)


def a_number_added(self, x):
    return self.relu(self.bn(self.conv(x)) + 1)


def scaled_sum(self, x):
    return self.relu(torch.add(self.bn(self.conv(x)), x, alpha=2))


def sum_into_the_other(self, x):
    y = self.bn(self.conv(x))
    x += y
    return self.relu(x)


def sigmoid(self, x):
    return torch.sigmoid(self.bn(self.conv(x)))


def two_arguments(self, x):
    return self.relu(self.bn(self.conv(x), x))


def slope_from_elsewhere(self, x):
    return F.leaky_relu(self.bn(self.conv(x)), x.size(0))


def hooked(self, x):
    return self.relu(self.bn(self.conv(x)) + self.pool(x))


def hook(model: Any) -> None:
    model.pool.register_forward_hook(lambda *_: None)


def share(model: Any) -> None:
    model.child = nn.Sequential(model.conv2, model.bn)


CASES: dict[str, tuple[Any, dict[str, Any], Any, str]] = {
    # name: (forward, members, what is done before the conversion, the reason)
    "used_twice": (used_twice, {}, None, "self.conv, because its result is used by self.bn and sigmoid"),
    "also_returned": (also_returned, {}, None, "self.conv, because its result is used by self.bn and is returned"),
    "not_used": (not_used, {}, None, "self.conv, because its result is not used"),
    "pooled": (
        pooled,
        {"pool": functools.partial(nn.MaxPool2d, 2)},
        None,
        "self.conv, because its result goes to self.pool, which is no batch norm, sum or activation",
    ),
    "returned": (returned, {}, None, "self.conv, because its result is returned"),
    "resized": (
        resized_before_the_norm,
        {},
        None,
        "self.conv, because its result goes to interpolate, which is no batch norm, sum or activation",
    ),
    "group_norm": (
        plain,
        {"bn": functools.partial(nn.GroupNorm, 2, CHANNELS)},
        None,
        "self.conv, because its norm self.bn (GroupNorm) is not one that kernels know",
    ),
    "norm_with_a_forward": (
        plain,
        {"bn": functools.partial(Clamped, CHANNELS)},
        None,
        "self.conv, because its norm self.bn (Clamped) is not one that kernels know",
    ),
    "convolution_with_a_forward": (
        plain,
        {"conv": functools.partial(Scaled, CHANNELS, CHANNELS, 1)},
        None,
        "self.conv, because Scaled has its own forward",
    ),
    "written_by_a_module": (
        written_by_a_module,
        {"inplace": functools.partial(nn.ReLU, inplace=True)},
        None,
        "self.conv, because self.inplace, called before self.bn, may write into what self.conv reads",
    ),
    "written_before_the_sum": (
        written_before_the_sum,
        {},
        None,
        "self.conv only up to self.bn, because +=, called before +, may write into what self.conv reads",
    ),
    "written_by_out": (
        written_by_out,
        {},
        None,
        "self.conv only up to +, because mul, called before self.relu, may write into what self.conv reads",
    ),
    "statistics_of_a_child": (
        statistics_of_a_child,
        {},
        share,
        "self.conv only up to self.bn, because self.child, called before +, "
        "may use or change the statistics of self.bn",
    ),
    "norm_called_again": (
        norm_called_again,
        {},
        None,
        "self.conv only up to self.bn, because self.bn is called again before +, "
        "and its statistics change with each call",
    ),
    "norm_used_twice": (
        norm_used_twice,
        {},
        None,
        "self.conv only up to self.bn, because the result of self.bn is used by self.relu and +",
    ),
    "sum_used_twice": (
        sum_used_twice,
        {},
        None,
        "self.conv only up to +, because the result of + is used by self.relu and +",
    ),
    "doubled": (doubled, {}, None, "self.conv only up to self.bn, because the result of self.bn is added to itself"),
    "a_number_added": (
        a_number_added,
        {},
        None,
        "self.conv only up to self.bn, because what is added to the result of self.bn is not a tensor",
    ),
    "scaled_sum": (scaled_sum, {}, None, "self.conv only up to self.bn, because add is called with alpha"),
    "sum_into_the_other": (
        sum_into_the_other,
        {},
        None,
        "self.conv only up to self.bn, because += writes the sum into x",
    ),
    "elu": (
        plain,
        {"relu": nn.ELU},
        None,
        "self.conv only up to self.bn, because self.relu (ELU) is not an activation that kernels know",
    ),
    "activation_with_a_forward": (
        plain,
        {"relu": Shifted},
        None,
        "self.conv only up to self.bn, because self.relu (Shifted) is not an activation that kernels know",
    ),
    "sigmoid": (
        sigmoid,
        {},
        None,
        "self.conv only up to self.bn, because sigmoid is not an activation that kernels know",
    ),
    "slope": (
        slope_from_elsewhere,
        {},
        None,
        "self.conv only up to self.bn, because leaky_relu, as it is called, is not an activation that kernels know",
    ),
    "two_arguments": (
        two_arguments,
        {},
        None,
        "self.conv, because its norm self.bn is called with something else than one tensor",
    ),
    "stranger": (
        statistics_of_a_child,
        {"child": Strange},
        None,
        "self.conv only up to self.bn, because self.child, called before +, runs code that conversion does not know",
    ),
    "hooked": (
        hooked,
        {"pool": functools.partial(nn.MaxPool2d, 3, 1, 1)},
        hook,
        "self.conv only up to self.bn, because self.pool, called before +, "
        "has hooks or a forward of its own on the instance",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_reason_is_the_true_one(name, quick):
    forward, members, prepare, reason = CASES[name]
    model = build(block(forward, **members), quick)
    if prepare is not None:
        prepare(model)
    (row,) = [row for row in cnnfast.report(cnnfast.convert(model, inplace=True)).rows if row.name == ""]
    assert (row.status, row.reason) == ("left", f"not fused: {reason}")


def test_each_convolution_has_its_own_reason(quick):
    def forward(self, x):
        y = self.bn(self.conv(x))
        z = self.conv2(x)
        return self.relu(y), self.relu(self.bn2(z)) + y, z

    (row,) = [row for row in cnnfast.report(cnnfast.convert(build(block(forward), quick))).rows if row.name == ""]
    assert row.reason == (
        "not fused: self.conv only up to self.bn, because the result of self.bn is used by self.relu and +; "
        "self.conv2, because its result is used by self.bn2 and is returned"
    )


@pytest.mark.parametrize("forward", [plain, Block.forward], ids=["plain", "block"])
def test_what_is_fused_as_far_as_it_goes_needs_no_reason(forward, quick):
    assert not [row for row in cnnfast.report(cnnfast.convert(build(block(forward), quick))).rows if row.name == ""]


def test_a_forward_that_calls_nothing_that_could_be_fused(quick):
    def forward(self, x):
        return self.relu(x) + self.bn(x).sigmoid().mean()

    (row,) = [row for row in cnnfast.report(cnnfast.convert(build(block(forward), quick))).rows if row.name == ""]
    assert row.reason == "not fused: self.bn, because .sigmoid() is not an activation that kernels know"

    def pools(self, x):
        return F.max_pool2d(self.bn(x), 2)

    (row,) = [row for row in cnnfast.report(cnnfast.convert(build(block(pools), quick))).rows if row.name == ""]
    assert row.reason == "not fused: its forward calls nothing that could be"


def test_a_model_that_was_not_converted(quick):
    rows = {row.name: row.reason for row in cnnfast.report(build(block(plain), quick)).rows}
    assert rows[""] == "not fused: self.conv, because it was not converted"
