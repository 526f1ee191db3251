"""Members and containers that are not what they seem: forwards of their own, patched instances, ways of their own to be
copied.
"""

from __future__ import annotations

import copy
import re
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import cnnfast
from tests.support.blocks import CHANNELS, Block, block, build, image
from tests.support.steps import assert_same_steps, converted


class ScaledConv2d(nn.Conv2d):
    """As weight standardisation, blurred or equalised convolutions: only its forward differs."""

    def forward(self, x):
        return super().forward(x) * 2


class StandardisedConv2d(nn.Conv2d):
    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight, self.bias)


class PaddedConv2d(nn.Conv2d):
    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(F.pad(input, (1, 0, 1, 0)), weight, bias)


class CalledConv2d(nn.Conv2d):
    def __call__(self, x):
        return super().__call__(x) * 2


class ClampedNorm(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).clamp(-0.5, 0.5)


class ShiftedReLU(nn.ReLU):
    def forward(self, x):
        return super().forward(x - 0.3)


class CheckedNorm(nn.BatchNorm2d):
    """A subclass that changes what a norm reads, not its forward."""

    @property
    def eps(self):
        return 0.1

    @eps.setter
    def eps(self, value):
        pass


@pytest.mark.parametrize("conv", [ScaledConv2d, StandardisedConv2d, PaddedConv2d, CalledConv2d])
def test_convolutions_with_a_forward_of_their_own(conv, quick):
    model = build(lambda: nn.Sequential(conv(CHANNELS, CHANNELS, 3), nn.BatchNorm2d(CHANNELS), nn.ReLU()), quick)
    ours = converted(model, image().to(quick))
    assert type(ours[0]) is conv
    row = next(row for row in cnnfast.report(ours).rows if row.name == "0")
    assert (row.kind, row.status) == (conv.__name__, "left")
    assert row.reason


@pytest.mark.parametrize("norm", [ClampedNorm, CheckedNorm])
@pytest.mark.parametrize("act", [nn.ReLU, ShiftedReLU])
def test_norms_and_activations_with_a_forward_of_their_own(norm, act, quick):
    model = build(lambda: nn.Sequential(nn.Conv2d(CHANNELS, CHANNELS, 3), norm(CHANNELS), act()), quick)
    ours = converted(model, image().to(quick))
    assert isinstance(ours[1], norm)
    assert type(ours[2]) is act
    assert [type(m) for m in cnnfast.revert(ours).modules()] == [type(m) for m in model.modules()]


@pytest.mark.parametrize("member", ["conv", "bn", "relu"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_members_forward_replaced_on_the_instance(member, when, quick):
    """As libraries do that patch models: the class is PyTorch's, the forward is not."""

    def patch(model: nn.Module) -> None:
        module = getattr(model, member)
        plain = type(module).forward
        module.forward = types.MethodType(lambda self, x: plain(self, x) * 2, module)

    model = build(Block, quick)
    original = copy.deepcopy(model)
    patch(original)
    if when == "before":
        patch(model)
        ours = cnnfast.convert(model, inplace=True)  # the new forward is bound to this very module
    else:
        ours = cnnfast.convert(model)
        patch(ours)
    assert_same_steps(ours, original, image().to(quick))


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_containers_forward_replaced_on_the_instance(when, quick):
    def forward(self, x):
        return self.bn(self.conv(x)) * 2

    model, x = build(Block, quick), image().to(quick)
    original = copy.deepcopy(model)
    original.forward = types.MethodType(forward, original)
    if when == "before":
        model.forward = types.MethodType(forward, model)
    ours = cnnfast.convert(model)
    if when == "after":
        ours.forward = types.MethodType(forward, ours)
    assert_same_steps(ours, original, x)
    ours.eval()
    twice = copy.deepcopy(ours)
    assert torch.equal(twice(x), ours(x))


@pytest.mark.parametrize("kind", [nn.Sequential, Block])
def test_a_child_whose_forward_on_the_instance_writes(kind, quick):
    """Its class's would not: what stands beside it in the parent's forward must not be moved past its call."""

    def forward(self, x):
        y = self.bn(self.conv(x))
        z = self.child(x)
        return self.relu(y + z)

    model, x = build(block(forward, child=kind), quick), image().to(quick)
    model.child.forward = types.MethodType(lambda self, x: x.mul_(0.5), model.child)
    original = copy.deepcopy(model)
    assert_same_steps(cnnfast.convert(model), original, x, may_raise=True)


class WithSuper(Block):
    def forward(self, x):
        return super().forward(x) + 1


class WithGetattr(nn.Module):
    """A wrapper that passes on what it does not have."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("block"), name)

    def forward(self, x):
        return self.relu(self.bn(self.conv(x)))


class WithSetattr(Block):
    """Refuses what it does not know."""

    def __setattr__(self, name, value):
        if name not in ("training", "conv", "bn", "relu", "conv2", "bn2") and not name.startswith("_"):
            raise AttributeError(name)
        super().__setattr__(name, value)


class WithProperty(Block):
    @property
    def pair(self):
        return self.bn, self.conv

    def forward(self, x):
        bn, conv = self.pair
        return self.relu(bn(conv(x)))


class WithCall(Block):
    def __call__(self, x):
        return super().__call__(x * 2)


class WithSlots(Block):
    __slots__ = ("note",)

    def __init__(self) -> None:
        super().__init__()
        self.note = "kept"


class WithMethods(Block):
    def features(self, x):
        return self.relu(self.bn(self.conv(x)))

    def head(self, x):
        return self.bn2(self.conv2(x))

    def forward(self, x):
        return self.head(self.features(x))


class WithAnArgumentToInit(Block):
    def __init__(self, width: int = 1) -> None:
        super().__init__()
        self.width = width

    def __repr__(self):
        return f"{type(self).__name__}({self.width})"


class WithCopy(Block):
    def __deepcopy__(self, memo):
        new = type(self)().to(self.bn.bias)
        new.load_state_dict(self.state_dict())
        return new.train(self.training)


@pytest.mark.parametrize(
    "kind", [WithSuper, WithGetattr, WithSetattr, WithProperty, WithCall, WithSlots, WithMethods, WithAnArgumentToInit]
)
def test_containers_with_ways_of_their_own(kind, quick):
    ours = converted(build(kind, quick), image().to(quick))
    assert isinstance(ours, kind)
    assert type(ours).__name__ == kind.__name__
    assert re.sub("  # .*", "", repr(ours)) == repr(build(kind))  # but for comments on what is fused
    assert_same_steps(copy.deepcopy(ours), ours, image().to(quick), modes=("no_grad",))
    assert type(cnnfast.revert(ours)) is kind


def test_a_container_that_copies_itself(quick):
    """In place, where nothing has to be copied; a copy of the result is the container's own copy."""
    model, x = build(WithCopy, quick), image().to(quick)
    original = build(WithCopy, quick)
    ours = cnnfast.convert(model, inplace=True)
    assert_same_steps(copy.deepcopy(ours), copy.deepcopy(original), x)
    assert_same_steps(ours, original, x)


def test_new_instances_of_a_converted_container(quick):
    """type(block)() makes a block: slices of Sequential, and code that builds another of the same kind."""
    model = build(
        lambda: nn.Sequential(nn.Conv2d(CHANNELS, CHANNELS, 1), nn.BatchNorm2d(CHANNELS), nn.ReLU(), Block()), quick
    )
    ours, x = cnnfast.convert(model), image().to(quick)
    for part in (slice(0, 3), slice(0, 2), slice(1, 3), slice(2, None)):
        assert_same_steps(ours[part], copy.deepcopy(model)[part], x)
    new = type(ours[3])().double().to(quick)
    assert_same_steps(new, copy.deepcopy(cnnfast.revert(new)), x)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripted_members_are_left(quick):
    """Of a class that answers to few of a module's questions."""
    model = build(lambda: nn.Sequential(nn.Conv2d(CHANNELS, CHANNELS, 1), nn.BatchNorm2d(CHANNELS)), quick)
    model = nn.Sequential(torch.jit.script(model), Block().double().to(quick))
    assert_same_steps(
        cnnfast.convert(copy.deepcopy(model), inplace=True), model, image().to(quick), modes=("no_grad",), fused=2
    )


def test_lazy_convolutions(quick):
    """They become what they are to be at their first call."""
    model = nn.Sequential(nn.LazyConv2d(CHANNELS, 3), nn.LazyBatchNorm2d(), nn.ReLU()).double().to(quick)
    x = image().to(quick)
    ours = cnnfast.convert(model, inplace=True)
    ours(x)
    assert type(ours[0]).__name__ == "Conv2d"
    assert_same_steps(ours, copy.deepcopy(cnnfast.revert(ours)), x)
    assert_same_steps(cnnfast.convert(ours), copy.deepcopy(cnnfast.revert(ours)), x)
