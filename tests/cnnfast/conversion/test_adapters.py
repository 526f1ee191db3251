"""Layers of other libraries that stand for a batch norm, or a batch norm and what follows it."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

import cnnfast
from cnnfast.functional.entrance import capture
from tests.support.blocks import CHANNELS, build, image
from tests.support.packages import package
from tests.support.steps import assert_same_steps


@pytest.fixture
def ops() -> Any:
    """torchvision.ops"""
    return package("torchvision.ops")


@pytest.fixture
def layers(ops) -> Any:
    """timm.layers"""
    return package("timm.layers")


def after_a_convolution(norm: nn.Module, device: torch.device) -> nn.Module:
    return build(lambda: nn.Sequential(nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1), norm), device)


ACTIVATIONS = {
    "relu": {},
    "none": {"apply_act": False},
    "silu": {"act_layer": nn.SiLU},
    "hardswish": {"act_layer": nn.Hardswish, "inplace": False},
    "leaky_relu": {"act_layer": functools.partial(nn.LeakyReLU, negative_slope=0.3)},
    "gelu": {"act_layer": nn.GELU},
    "mish": {"act_layer": nn.Mish},
    "prelu": {"act_layer": "prelu"},
    "momentum": {"momentum": None, "eps": 0.1},
    "not_affine": {"affine": False},
    "untracked": {"track_running_stats": False},
}
LEFT = {
    "sigmoid": {"act_layer": nn.Sigmoid},
    "dropped": {"drop_layer": functools.partial(nn.Dropout2d, 0.5)},
}


@pytest.mark.parametrize("name", [*ACTIVATIONS, *LEFT])
def test_timms_batch_norm_and_activation(name, layers, quick):
    """BatchNormAct2d and its convolution in one step; an activation without a kernel, or a drop before it,
    comes after.
    """
    model = after_a_convolution(layers.BatchNormAct2d(CHANNELS, **{**ACTIVATIONS, **LEFT}[name]), quick)
    original, ours = copy.deepcopy(model), cnnfast.convert(model)
    assert isinstance(ours[1], layers.BatchNormAct2d)
    assert_same_steps(ours, original, image().to(quick), fused=1 if name in ACTIVATIONS else None)
    rows = {row.name: row for row in cnnfast.report(ours).rows}
    assert (rows["1"].kind, rows["1"].status) == (
        "BatchNormAct2d",
        "fused" if name in ACTIVATIONS else rows["1"].status,
    )
    assert type(cnnfast.revert(ours)[1]) is layers.BatchNormAct2d


@pytest.mark.parametrize(
    "kind",
    [
        "FrozenBatchNormAct2d",
        "SyncBatchNormAct",
        "GroupNormAct",
        "LayerNormAct2d",
        "EvoNorm2dB0",
        "FilterResponseNormAct2d",
    ],
)
def test_timms_other_norms(kind, layers, quick):
    options = {"num_groups": 2} if kind == "GroupNormAct" else {}
    model = after_a_convolution(getattr(layers, kind)(CHANNELS, **options), quick)
    original, ours = copy.deepcopy(model), cnnfast.convert(model)
    assert_same_steps(ours, original, image().to(quick), fused=1 if kind == "FrozenBatchNormAct2d" else None)


def test_timms_norm_before_a_convolution(layers, quick):
    """As ResNet v2 and DenseNet have them: nothing to fuse with, and served by kernels all the same."""
    model = build(lambda: nn.Sequential(layers.BatchNormAct2d(CHANNELS), nn.Conv2d(CHANNELS, CHANNELS, 3)), quick)
    original, ours = copy.deepcopy(model), cnnfast.convert(model)
    traces = assert_same_steps(ours, original, image().to(quick), fused=0)
    assert [call.operation for call in traces["no_grad"]] == ["normalize", "conv_fprop"]
    converted_alone = cnnfast.convert(copy.deepcopy(model[0]))
    assert_same_steps(converted_alone, copy.deepcopy(model[0]), image().to(quick))


def test_timms_norm_before_a_convolution_with_hooks(layers, quick):
    """It is one step by itself, until a hook wants its activation's call."""
    ours = cnnfast.convert(build(lambda: nn.Sequential(layers.BatchNormAct2d(CHANNELS)), quick))
    x, calls = image().to(quick), []
    (row,) = cnnfast.report(ours, x).rows
    assert (row.status, row.reason) == ("fused", "0 + relu")
    handle = ours[0].act.register_forward_hook(lambda *call: calls.append(call))
    (row,) = cnnfast.report(ours, x).rows
    assert row.status == "replaced"
    y = ours(x)
    assert len(calls) == 1
    handle.remove()
    assert torch.equal(ours(x), y)
    assert len(calls) == 1


def test_a_frozen_norm_and_its_activation_alone(layers, quick):
    """The activation is applied once, whatever the fused step does not take."""
    make = functools.partial(layers.FrozenBatchNormAct2d, CHANNELS, act_layer=nn.SiLU)
    model = build(lambda: nn.Sequential(nn.MaxPool2d(2), make()), quick)
    original, ours = copy.deepcopy(model), cnnfast.convert(model)
    assert_same_steps(ours, original, image().to(quick))
    assert_same_steps(ours, original, image().to(quick)[0], may_raise=True)
    assert {row.status for row in cnnfast.report(ours, image().to(quick)).rows if row.name == "1"} == {"fused"}


@pytest.mark.parametrize("name", ["ConvNormAct", "ConvNormActAa", "SeparableConvNormAct"])
def test_timms_blocks(name, layers, quick):
    model = build(lambda: getattr(layers, name)(CHANNELS, CHANNELS, 3, act_layer=nn.SiLU), quick)
    original, ours = copy.deepcopy(model), cnnfast.convert(model)
    assert_same_steps(ours, original, image().to(quick), fused=1)


@pytest.mark.parametrize("name", ["StdConv2d", "StdConv2dSame", "ScaledStdConv2d", "MixedConv2d"])
def test_timms_convolutions_are_left(name, layers, quick):
    """Each computes its weight in a forward of its own, or is no convolution but holds some."""
    model = build(
        lambda: nn.Sequential(getattr(layers, name)(CHANNELS, CHANNELS, 3), nn.BatchNorm2d(CHANNELS), nn.ReLU()), quick
    )
    original, ours = copy.deepcopy(model), cnnfast.convert(model)
    assert type(ours[0]) is getattr(layers, name)
    assert_same_steps(ours, original, image().to(quick))


def test_timms_synchronised_norm_and_activation_alone(layers, quick):
    """One step, as BatchNormAct2d is; drop and act stand where timm's conversion has put them."""
    model = build(lambda: nn.Sequential(layers.BatchNormAct2d(CHANNELS), nn.Conv2d(CHANNELS, CHANNELS, 3)), quick)
    model = layers.convert_sync_batchnorm(model)
    original, ours = copy.deepcopy(model), cnnfast.convert(model)
    called: list[str] = []

    @contextmanager
    def heard(name: str, *call: Any) -> Iterator[None]:
        called.append(name)
        yield

    with capture(heard):
        ours(image().to(quick))
    assert called == ["bn_act", "conv2d"]
    assert_same_steps(ours, original, image().to(quick))


def test_timms_conversions_after_ours(layers, quick):
    """freeze_batch_norm_2d and convert_sync_batchnorm look for classes, and replace modules."""
    x = image().to(quick)
    for change in (layers.freeze_batch_norm_2d, layers.convert_sync_batchnorm):
        model = after_a_convolution(layers.BatchNormAct2d(CHANNELS), quick)
        original, ours = change(copy.deepcopy(model)), change(cnnfast.convert(model))
        assert type(ours[1]) is type(original[1])
        assert_same_steps(ours, original, x)


def test_torchvisions_frozen_batch_norm(ops, quick):
    frozen = ops.FrozenBatchNorm2d(CHANNELS)
    for t in frozen.buffers():
        t.uniform_(0.5, 1.5)
    model = build(lambda: nn.Sequential(nn.Conv2d(CHANNELS, CHANNELS, 3), frozen, nn.ReLU()), quick)
    original, ours = copy.deepcopy(model), cnnfast.convert(model)
    assert_same_steps(ours, original, image().to(quick), fused=1)


def test_torchvisions_blocks(ops, quick):
    model = build(
        lambda: nn.Sequential(ops.Conv2dNormActivation(CHANNELS, CHANNELS, 3), ops.SqueezeExcitation(CHANNELS, 2)),
        quick,
    )
    original, ours = copy.deepcopy(model), cnnfast.convert(model)
    assert_same_steps(ours, original, image().to(quick), fused=1)
