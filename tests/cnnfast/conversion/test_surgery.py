"""A model is changed after its conversion: what counts is what is there at the call."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import nn

import cnnfast
from tests.support.blocks import CHANNELS, CONVOLUTIONS, block, build, image
from tests.support.steps import assert_same_steps, converted_and_original


def replace_head(model):
    model.fc = nn.Linear(CHANNELS, 7, dtype=torch.float64, device=model.fc.weight.device)
    nn.init.constant_(model.fc.weight, 0.3)
    nn.init.zeros_(model.fc.bias)


def replace_norm(model):
    model.layers[0].bn = nn.Identity()


def replace_norm_in_a_sequential(model):
    model.stem[1] = nn.Identity()


def replace_activation(model):
    model.layers[0].relu = nn.Tanh()


def replace_activation_by_another_that_is_fused(model):
    model.layers[0].relu = nn.SiLU()


def replace_convolution(model):
    conv = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=2, dilation=2, dtype=torch.float64, device=model.fc.weight.device)
    nn.init.constant_(conv.weight, 0.1)
    nn.init.zeros_(conv.bias)
    model.layers[0].conv = conv


def replace_block(model):
    model.layers[0] = nn.ReLU()


def replace_in_the_dictionary(model):
    """As SyncBatchNorm's conversion and many tools do: no attribute is set."""
    model.layers[0]._modules["bn"] = nn.Identity()
    model.stem._modules["2"] = nn.Tanh()


def add_under_the_same_name(model):
    model.layers[0].add_module("bn", nn.Identity())


def set_submodule(model):
    model.set_submodule("layers.0.bn2", nn.Identity())


def append(model):
    model.stem.append(nn.Tanh())


def insert(model):
    model.stem.insert(1, nn.Tanh())


def extend(model):
    model.stem.extend([nn.Tanh(), nn.Hardsigmoid()])


def delete(model):
    del model.stem[2]


def pop(model):
    model.stem.pop(1)


def move_a_member(model):
    """The same modules in another order."""
    norm, relu = model.stem[1], model.stem[2]
    model.stem[1], model.stem[2] = relu, norm


def share_a_norm(model):
    model.layers[0].bn2 = model.layers[0].bn


def change_the_norms_numbers(model):
    norm = model.layers[0].bn
    norm.eps, norm.momentum = 0.5, 0.9
    model.stem[1].momentum = None


def change_the_convolutions_numbers(model):
    conv = model.layers[0].conv
    conv.padding, conv.dilation = (2, 2), (2, 2)
    model.stem[0].padding_mode = "reflect"
    model.stem[0].padding = (1, 1)
    model.stem[0]._reversed_padding_repeated_twice = [1, 1, 1, 1]


def replace_parameters(model):
    norm = model.layers[0].bn
    norm.weight = nn.Parameter(norm.weight.detach() * 2)
    norm.bias = None
    model.stem[0].weight = nn.Parameter(model.stem[0].weight.detach() * 2)
    model.layers[0].conv.bias = None


def replace_statistics(model):
    norm = model.layers[0].bn
    norm.running_mean = norm.running_mean + 1
    norm.running_var, norm.num_batches_tracked = norm.running_var * 2, norm.num_batches_tracked + 5
    model.stem[1].track_running_stats = False


def write_into_parameters(model):
    model.layers[0].conv.weight.data.mul_(2)
    model.stem[1].weight.data = torch.full_like(model.stem[1].weight, 3)
    with torch.no_grad():
        model.layers[2].bn.running_mean.add_(1)


SURGERY = [
    replace_head,
    replace_norm,
    replace_norm_in_a_sequential,
    replace_activation,
    replace_activation_by_another_that_is_fused,
    replace_convolution,
    replace_block,
    replace_in_the_dictionary,
    add_under_the_same_name,
    set_submodule,
    append,
    insert,
    extend,
    delete,
    pop,
    move_a_member,
    share_a_norm,
    change_the_norms_numbers,
    change_the_convolutions_numbers,
    replace_parameters,
    replace_statistics,
    write_into_parameters,
]


@pytest.mark.parametrize("change", SURGERY, ids=lambda change: change.__name__)
def test_surgery_after_conversion(change, net, x):
    """A module or a number in it is replaced after conversion: what counts is what is there at the call."""
    ours, original = converted_and_original(net, change, "after")
    assert list(ours.state_dict()) == list(original.state_dict())
    assert_same_steps(ours, original, x)
    assert_same_steps(cnnfast.convert(ours), original, x)
    assert_same_steps(cnnfast.revert(ours), original, x)


def test_numbers_of_an_activation_after_conversion(quick):
    model = build(
        lambda: nn.Sequential(nn.Conv2d(CHANNELS, CHANNELS, 1), nn.BatchNorm2d(CHANNELS), nn.LeakyReLU(0.1)), quick
    )

    def change(model):
        model[2].negative_slope = 0.7

    ours, original = converted_and_original(model, change, "after")
    assert_same_steps(ours, original, image().to(quick))
    model = build(lambda: nn.Sequential(nn.Conv2d(CHANNELS, CHANNELS, 1), nn.BatchNorm2d(CHANNELS), nn.GELU()), quick)

    def approximate(model):
        model[2].approximate = "tanh"

    ours, original = converted_and_original(model, approximate, "after")
    assert_same_steps(ours, original, image().to(quick))


def scaled(self, x):
    y = self.relu(self.bn(self.conv(x)) * self.scale)
    return y if self.options["residual"] else y + x


def test_attributes_that_forward_reads_after_conversion(quick):
    """A number that is set anew, and one inside of something that is not."""
    model = build(block(scaled, scale=1.0, options={"residual": False}), quick)
    original, ours, x = copy.deepcopy(model), cnnfast.convert(model), image().to(quick)
    assert_same_steps(ours, original, x)
    ours.scale = original.scale = 2.0
    assert_same_steps(ours, original, x)
    ours.options["residual"] = original.options["residual"] = True
    assert_same_steps(ours, original, x)


def asks_a_member(self, x):
    y = self.relu(self.bn(self.conv(x)))
    return self.drop(y) if self.drop.p > 0 else y


def test_numbers_of_a_member_that_forward_reads_after_conversion(quick):
    """As schedules of stochastic depth set them."""
    model = build(block(asks_a_member, drop=functools.partial(nn.Dropout, 0.0)), quick)

    def change(model):
        model.drop.p = 0.5

    ours, original = converted_and_original(model, change, "after")
    assert_same_steps(ours, original, image().to(quick))


def test_converting_again_after_surgery_fuses_again(net, x):
    ours = cnnfast.convert(net)
    ours.layers[0].bn = nn.BatchNorm2d(CHANNELS, dtype=torch.float64, device=x.device)
    again = cnnfast.convert(ours)
    assert_same_steps(again, copy.deepcopy(cnnfast.revert(ours)), x, fused=CONVOLUTIONS)
