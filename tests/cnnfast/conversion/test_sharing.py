"""Values and members that a forward uses more than once, and modules that several containers share."""

from __future__ import annotations

import pytest
import torch.nn.functional as F
from torch import nn

from tests.support.blocks import Block, block, build, image
from tests.support.steps import converted


def convolution_also_returned(self, x):
    y = self.conv(x)
    return self.relu(self.bn(y)), y


def norm_also_returned(self, x):
    y = self.bn(self.conv(x))
    return {"after": self.relu(y), "before": y}


def sum_also_returned(self, x):
    y = self.bn(self.conv(x)) + x
    return [self.relu(y), y]


def convolution_as_residual(self, x):
    y = self.conv(x)
    return self.relu(self.bn(y) + y)


def norm_as_residual(self, x):
    y = self.bn(self.conv(x))
    return self.relu(y + y)


def norm_as_later_residual(self, x):
    y = self.bn(self.conv(x))
    return self.relu(self.bn2(self.conv2(self.relu(y))) + y)


def shared_convolution(self, x):
    return self.relu(self.bn(self.conv(x)) + self.bn2(self.conv(x * 2)))


def shared_convolution_once_alone(self, x):
    return self.relu(self.bn(self.conv(x))) + self.conv(x * 2)


def shared_norm(self, x):
    """Two batches for one norm, and the order in which it sees them is the order of its running statistics."""
    a = self.bn(self.conv(x))
    b = self.bn(self.conv2(x))
    return self.relu(a + b)


def shared_norm_in_the_other_order(self, x):
    a = self.bn(self.conv(x))
    b = self.bn(self.conv2(x) * 3)
    c = F.relu(b)
    return self.relu(a) * c


def shared_norm_of_one_convolution(self, x):
    return self.bn(self.bn(self.conv(x)))


def shared_pair(self, x):
    return self.relu(self.bn(self.conv(self.relu(self.bn(self.conv(x))))))


def norm_before_convolution(self, x):
    return self.conv(self.relu(self.bn(x)))


def unused_result(self, x):
    """The norm sees a batch although nobody reads what it makes of it."""
    self.bn(self.conv(x))
    return self.relu(self.bn2(self.conv2(x)))


def unused_argument_of_another(self, x):
    y = self.bn(self.conv(x))
    z = self.bn2(self.conv2(x))
    return self.relu(z if y is None else y)


REUSED = [
    convolution_also_returned,
    norm_also_returned,
    sum_also_returned,
    convolution_as_residual,
    norm_as_residual,
    norm_as_later_residual,
    shared_convolution,
    shared_convolution_once_alone,
    shared_norm,
    shared_norm_in_the_other_order,
    shared_norm_of_one_convolution,
    shared_pair,
    norm_before_convolution,
    unused_result,
    unused_argument_of_another,
]


@pytest.mark.parametrize("forward", REUSED, ids=lambda forward: forward.__name__)
def test_values_and_members_used_more_than_once(forward, quick):
    converted(build(block(forward), quick), image().to(quick))


def test_a_module_under_two_names(quick):
    """Shared between containers, and twice in one."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = Block()
            self.second = self.first
            self.third = nn.Sequential(self.first.conv, self.first.bn, nn.ReLU(), self.first.conv)

        def forward(self, x):
            return self.third(self.second(self.first(x)))

    ours = converted(build(Twice, quick), image().to(quick))
    assert ours.first is ours.second
    assert ours.third[0] is ours.first.conv is ours.third[3]


def test_a_block_called_twice(quick):
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block()

        def forward(self, x):
            return self.block(self.block(x))

    converted(build(Recurrent, quick), image().to(quick))
