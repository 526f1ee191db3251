"""Forwards that must not be rewritten, or not carelessly: each here goes wrong, silently, under a rewrite that misses
its rule.

Every one is compared in eval, in eval with gradients and in training with an untouched copy: outputs, inputs,
gradients, buffers.
"""

from __future__ import annotations

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import cnnfast
from tests.support.blocks import CHANNELS, Block, block, build, image
from tests.support.steps import assert_same_steps, converted

# ----------------------------------------------------------------------------------------------------------------------
# Containers that own tensors


class OwnParameter(Block):
    """A layer scale, as ConvNeXt's and many ResNets' blocks have one."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(CHANNELS, 1, 1))

    def forward(self, x):
        return self.relu(self.bn(self.conv(x)) * self.gamma + x)


class OwnBuffer(Block):
    """Counts its calls in a buffer: tracing is a call."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("average", torch.zeros(CHANNELS))

    def forward(self, x):
        self.calls += 1
        self.average.lerp_(x.detach().mean((0, 2, 3)), 0.1)
        return self.relu(self.bn(self.conv(x)) + self.average.view(-1, 1, 1))


@pytest.mark.parametrize("kind", [OwnParameter, OwnBuffer])
def test_containers_that_own_tensors_are_left(kind, quick):
    model = build(kind, quick)
    tensors = {name: t.clone() for name, t in model.state_dict().items()}
    ours = cnnfast.convert(model)
    assert all(torch.equal(t, tensors[name]) for name, t in ours.state_dict().items())
    row = next(row for row in cnnfast.report(ours).rows if row.name == "")
    assert row.status == "left"
    assert ("parameter" if kind is OwnParameter else "buffer") in row.reason
    converted(model, image().to(quick))


# ----------------------------------------------------------------------------------------------------------------------
# Arguments


class Optional(Block):
    def forward(self, x, scale=None, flip=False, *, shift=0.0):
        if scale is not None:
            x = x * scale
        y = self.relu(self.bn(self.conv(x)) + x)
        return y.flip(-1) if flip else y + shift


def test_optional_arguments_are_bound_to_their_defaults(quick):
    """A tracer that takes them for tensors finds that they are not None, and true."""
    model, x = build(Optional, quick), image().to(quick)
    original, ours = copy.deepcopy(model), cnnfast.convert(model)
    assert_same_steps(ours, original, x, fused=1)
    for arguments in ((x, x), (x, None, True), (x, 2.0)):
        assert_same_steps(ours, original, *arguments)
    for keywords in ({"scale": x}, {"flip": True}, {"shift": 1.0}, {"scale": None, "flip": False}):
        assert_same_steps(ours, original, x, keywords=keywords)


def test_arguments_by_keyword(quick):
    model, x = build(Block, quick), image().to(quick)
    assert_same_steps(cnnfast.convert(model), copy.deepcopy(model), keywords={"x": x})


class Gather(Block):
    def forward(self, *xs, **options):
        return self.relu(self.bn(self.conv(sum(xs)))) * options.get("scale", 1)


class FromList(Block):
    def forward(self, xs):
        return self.relu(self.bn(self.conv(xs[0]))) + xs[-1]


def test_arguments_of_other_kinds(quick):
    x = image().to(quick)
    model = build(Gather, quick)
    original, ours = copy.deepcopy(model), cnnfast.convert(model)
    assert_same_steps(ours, original, x, x)
    assert_same_steps(ours, original, x, keywords={"scale": 2})
    model = build(FromList, quick)
    original, ours = copy.deepcopy(model), cnnfast.convert(model)
    for xs in ([x], (x, 2 * x), torch.stack([x, 2 * x])):
        assert_same_steps(ours, original, xs)


@pytest.mark.parametrize(
    "size", [(CHANNELS, 5, 5), (2, CHANNELS + 1, 5, 5), (1, CHANNELS, 1, 1), (0, CHANNELS, 5, 5), (2, 5)], ids=str
)
def test_wrong_and_unusual_sizes(size, quick):
    """What PyTorch's module raises, of the same type; what it accepts, accepted."""
    x = torch.ones(size, dtype=torch.float64, device=quick)
    model = build(lambda: nn.Sequential(nn.Conv2d(CHANNELS, CHANNELS, 1), nn.BatchNorm2d(CHANNELS), nn.ReLU()), quick)
    assert_same_steps(cnnfast.convert(model), copy.deepcopy(model), x, may_raise=True)


# ----------------------------------------------------------------------------------------------------------------------
# Operations in place


def input_changed_in_between(self, x):
    y = self.conv(x)
    x.add_(1)
    return self.relu(self.bn(y) + x)


def input_changed_by_an_operator(self, x):
    y = self.conv(x)
    x += 1
    return self.relu(self.bn(y))


def input_changed_after_the_norm(self, x):
    y = self.bn(self.conv(x))
    x *= 2
    return self.relu(y + x)


def input_changed_by_setitem(self, x):
    y = self.conv(x)
    x[:, 0] = 0
    return self.relu(self.bn(y) + x)


def input_changed_by_an_inplace_activation(self, x):
    y = self.conv(x)
    r = F.relu(x, inplace=True)
    return self.bn(y) + r


def input_changed_by_an_inplace_module(self, x):
    y = self.conv(x)
    r = self.inplace(x)
    return self.relu(self.bn(y) + r)


def input_changed_by_out(self, x):
    y = self.conv(x)
    torch.mul(x.detach(), 2, out=x.detach())
    return self.relu(self.bn(y) + x)


def convolution_changed(self, x):
    y = self.conv(x)
    y.mul_(2)
    return self.relu(self.bn(y))


def norm_changed(self, x):
    y = self.bn(self.conv(x))
    y[:, 0] = 1
    return self.relu(y)


def residual_changed_after_it_was_added(self, x):
    r = x * 2
    y = self.bn(self.conv(x)) + r
    r.zero_()
    return self.relu(y) + r


def added_into_the_residual(self, x):
    """The caller's tensor is changed: y += would be harmless, x += is not."""
    y = self.bn(self.conv(x))
    x += y
    return self.relu(x)


def added_into_a_residual_that_others_read(self, x):
    r = self.conv2(x)
    y = self.bn(self.conv(x))
    r += y
    return self.relu(r) + r


def activation_in_place_on_what_others_read(self, x):
    z = self.bn(self.conv(x))
    r = self.inplace(z)
    return r + z


def activation_in_place_under_a_view(self, x):
    z = self.bn(self.conv(x))
    part = z[:, :2]
    r = self.inplace(z)
    return r.sum() + part


def sum_in_place_under_another_name(self, x):
    z = self.bn(self.conv(x))
    other = z
    z += x
    return self.relu(z) + other


def parameters_changed_in_between(self, x):
    y = self.conv(x)
    with torch.no_grad():
        self.bn.bias.add_(1)
    return self.relu(self.bn(y))


def weight_changed_after_the_call(self, x):
    y = self.conv(x.detach())
    self.conv.weight.data.mul_(0.9)
    return self.relu(self.bn(y))


IN_PLACE = [
    input_changed_in_between,
    input_changed_by_an_operator,
    input_changed_after_the_norm,
    input_changed_by_setitem,
    input_changed_by_an_inplace_activation,
    input_changed_by_an_inplace_module,
    input_changed_by_out,
    convolution_changed,
    norm_changed,
    residual_changed_after_it_was_added,
    added_into_the_residual,
    added_into_a_residual_that_others_read,
    activation_in_place_on_what_others_read,
    activation_in_place_under_a_view,
    sum_in_place_under_another_name,
    parameters_changed_in_between,
    weight_changed_after_the_call,
]


@pytest.mark.parametrize("forward", IN_PLACE, ids=lambda forward: forward.__name__)
def test_operations_in_place(forward, quick):
    converted(
        build(block(forward, inplace=functools.partial(nn.ReLU, inplace=True)), quick),
        image().to(quick),
        may_raise=True,
    )
