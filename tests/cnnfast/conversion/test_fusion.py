"""What conversion fuses: a convolution and its norm, with whatever comes after; results are the original's.

Also what the other tests need: that fusion happens at all, lest rules hold only because nothing ever is rewritten.
"""

from __future__ import annotations

import copy
import functools
import gc

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import cnnfast
from cnnfast.nn.fused import observed
from tests.support.blocks import CHANNELS, Block, block, build, image
from tests.support.steps import assert_same_steps, converted

ACTIVATIONS = {
    "none": nn.Identity(),
    "relu": nn.ReLU(),
    "relu_inplace": nn.ReLU(inplace=True),
    "relu6": nn.ReLU6(inplace=True),
    "leaky_relu": nn.LeakyReLU(0.2),
    "gelu": nn.GELU(),
    "gelu_tanh": nn.GELU(approximate="tanh"),
    "silu": nn.SiLU(inplace=True),
    "hardswish": nn.Hardswish(),
    "mish": nn.Mish(inplace=True),
    "hardsigmoid": nn.Hardsigmoid(),
    "prelu": nn.PReLU(CHANNELS),
}
OTHER_ACTIVATIONS = {
    "elu": nn.ELU(),
    "sigmoid": nn.Sigmoid(),
    "hardtanh": nn.Hardtanh(-0.5, 0.5),
    "softmax": nn.Softmax2d(),
    "rrelu": nn.RReLU(),
}


@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("name", [*ACTIVATIONS, *OTHER_ACTIVATIONS])
def test_activations(name, residual, quick):
    """Convolution and norm are fused before any activation; one that has no kernel comes after."""

    def forward(self, x):
        y = self.bn(self.conv(x))
        return self.act(y + x if self.residual else y)

    act = copy.deepcopy({**ACTIVATIONS, **OTHER_ACTIVATIONS}[name])
    model = build(block(forward, act=act, residual=residual), quick)
    assert_same_steps(cnnfast.convert(model), copy.deepcopy(model), image().to(quick), fused=1)


def test_sizes_unpacked(quick):
    """torch.fx leaves what it unpacks in a cycle that only garbage collection ends: that is not a tensor kept."""

    def forward(self, x):
        y = self.relu(self.bn(self.conv(x)))
        N, C, _, _ = y.shape
        return y.reshape(N, C, -1)

    gc.disable()
    try:
        ours = cnnfast.convert(model := build(block(forward), quick))
    finally:
        gc.enable()
    assert_same_steps(ours, copy.deepcopy(model), image().to(quick), fused=1)


def functional_relu(self, x):
    return F.relu(self.bn(self.conv(x)), inplace=True)


def torch_relu(self, x):
    return torch.relu(self.bn(self.conv(x)))


def functional_silu(self, x):
    return F.silu(self.bn(self.conv(x)))


def functional_leaky_relu(self, x):
    return F.leaky_relu(self.bn(self.conv(x)), 0.3)


def functional_leaky_relu_by_name(self, x):
    return F.leaky_relu(self.bn(self.conv(x)), negative_slope=0.3)


def functional_gelu_tanh(self, x):
    return F.gelu(self.bn(self.conv(x)), approximate="tanh")


def residual_first(self, x):
    return F.relu(x + self.bn(self.conv(x)))


def residual_by_torch_add(self, x):
    return self.relu(torch.add(self.bn(self.conv(x)), x))


def residual_in_place(self, x):
    y = self.bn(self.conv(x))
    y += x
    return self.relu(y)


def residual_without_activation(self, x):
    return self.bn(self.conv(x)) + x


def residual_by_another_branch(self, x):
    return self.relu(self.bn(self.conv(x)) + self.bn2(self.conv2(x)))


def assigned_to_the_same_name(self, x):
    x = self.conv(x)
    x = self.bn(x)
    x = self.relu(x)
    return self.relu(self.bn2(self.conv2(x)))


def scripting_is_asked_about(self, x):
    if torch.jit.is_scripting():
        return x
    return self.relu(self.bn(self.conv(x)))


@pytest.mark.parametrize(
    ("forward", "count"),
    [
        (functional_relu, 1),
        (torch_relu, 1),
        (functional_silu, 1),
        (functional_leaky_relu, 1),
        (functional_leaky_relu_by_name, 1),
        (functional_gelu_tanh, 1),
        (residual_first, 1),
        (residual_by_torch_add, 1),
        (residual_in_place, 1),
        (residual_without_activation, 1),
        (residual_by_another_branch, 2),
        (assigned_to_the_same_name, 2),
        (scripting_is_asked_about, 1),
        (Block.forward, 2),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_is_fused(forward, count, quick):
    model = build(block(forward), quick)
    assert_same_steps(cnnfast.convert(model), copy.deepcopy(model), image().to(quick), fused=count)


CONVOLUTIONS = {
    "strided": lambda: nn.Conv2d(CHANNELS, CHANNELS, 3, stride=2, padding=1),
    "dilated": lambda: nn.Conv2d(CHANNELS, CHANNELS, 3, dilation=2),
    "grouped": lambda: nn.Conv2d(CHANNELS, CHANNELS, 3, groups=2),
    "depthwise": lambda: nn.Conv2d(CHANNELS, CHANNELS, 3, groups=CHANNELS),
    "same": lambda: nn.Conv2d(CHANNELS, CHANNELS, 2, padding="same"),
    "valid": lambda: nn.Conv2d(CHANNELS, CHANNELS, (3, 1), padding="valid"),
    "reflect": lambda: nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, padding_mode="reflect"),
    "circular": lambda: nn.Conv2d(CHANNELS, CHANNELS, 3, padding=(1, 2), padding_mode="circular"),
    "frozen": lambda: nn.Conv2d(CHANNELS, CHANNELS, 1).requires_grad_(False),
}
NORMS = {
    "not_affine": lambda: nn.BatchNorm2d(CHANNELS, affine=False),
    "untracked": lambda: nn.BatchNorm2d(CHANNELS, track_running_stats=False),
    "cumulative": lambda: nn.BatchNorm2d(CHANNELS, momentum=None),
    "momentum": lambda: nn.BatchNorm2d(CHANNELS, momentum=0.7, eps=0.1),
    "without_a_momentum": lambda: nn.BatchNorm2d(CHANNELS, momentum=0.0),
    "frozen": lambda: nn.BatchNorm2d(CHANNELS).requires_grad_(False),
    "instance": lambda: nn.InstanceNorm2d(CHANNELS, affine=True),
    "group": lambda: nn.GroupNorm(2, CHANNELS),
    "sync": lambda: nn.SyncBatchNorm(CHANNELS),
}


@pytest.mark.parametrize("conv", CONVOLUTIONS)
def test_kinds_of_convolution(conv, quick):
    converted(
        build(lambda: nn.Sequential(CONVOLUTIONS[conv](), nn.BatchNorm2d(CHANNELS), nn.ReLU()), quick),
        image().to(quick),
    )


@pytest.mark.parametrize("norm", NORMS)
def test_kinds_of_norm(norm, quick):
    """Another kind of norm after the convolution too: no batch norm, or one whose training needs other processes."""
    converted(
        build(lambda: nn.Sequential(nn.Conv2d(CHANNELS, CHANNELS, 1), NORMS[norm](), nn.ReLU()), quick),
        image().to(quick),
    )


# ----------------------------------------------------------------------------------------------------------------------
# Residuals


def broadcast_residual(self, x):
    return self.relu(self.bn(self.conv(x)) + x.mean((2, 3), keepdim=True))


def broadcast_output(self, x):
    """The sum is larger than the convolution's output."""
    return self.relu(self.bn(self.conv(x.mean((2, 3), keepdim=True)) if x.shape[0] > 1 else x) + x)


def broadcast_pooled(self, x):
    return self.relu(self.bn(self.conv(self.pool(x))) + x)


def number_as_residual(self, x):
    return self.relu(self.bn(self.conv(x)) + 1)


def scaled_residual(self, x):
    return self.relu(torch.add(self.bn(self.conv(x)), x, alpha=2))


def subtracted(self, x):
    return self.relu(x - self.bn(self.conv(x)))


def complex_residual(self, x):
    return self.bn(self.conv(x)) + x * 1j


def integer_residual(self, x):
    return self.relu(self.bn(self.conv(x)) + (x > 0).to(torch.int32))


def narrow_residual(self, x):
    return self.relu(self.bn(self.conv(x)) + x.float())


def wide_residual(self, x):
    return self.relu(x + self.bn(self.conv(x.float().double()))).float()


def transposed_residual(self, x):
    return self.relu(self.bn(self.conv(x)) + x.transpose(2, 3))


def expanded_residual(self, x):
    return self.relu(self.bn(self.conv(x)) + x[:, :1].expand(-1, CHANNELS, -1, -1))


RESIDUALS = [
    broadcast_residual,
    broadcast_output,
    broadcast_pooled,
    number_as_residual,
    scaled_residual,
    subtracted,
    complex_residual,
    integer_residual,
    narrow_residual,
    wide_residual,
    transposed_residual,
    expanded_residual,
]


@pytest.mark.parametrize("forward", RESIDUALS, ids=lambda forward: forward.__name__)
def test_residuals(forward, quick):
    converted(build(block(forward, pool=functools.partial(nn.AdaptiveAvgPool2d, 1)), quick), image().to(quick))


def test_a_residual_of_another_dtype(quick):
    """float32 into a float64 sum, and a float64 sum of a float32 convolution: PyTorch promotes, whatever the kernel
    would do.
    """

    def forward(self, x, r):
        return self.relu(self.bn(self.conv(x)) + r)

    x = image().to(quick)
    model = build(block(forward), quick)
    original, ours = copy.deepcopy(model), cnnfast.convert(model)
    for r in (
        x.float(),
        x[:1],
        x[:, :1],
        x[..., :1, :1],
        x.to(torch.bool),
        x.half(),
        torch.tensor(2.0, device=quick),
        3,
    ):
        assert_same_steps(ours, original, x, r)
    assert_same_steps(ours.float(), original.float(), x.float(), x, tolerance=1e-5)


@pytest.mark.parametrize(
    "forward", [Block.forward, residual_in_place, residual_first], ids=lambda forward: forward.__name__
)
def test_autocast_gives_the_dtypes_of_the_original(forward, device):
    """A float32 image added to bfloat16 makes float32, into bfloat16 in place it stays that: whatever is fused."""
    model = build(block(forward), device).float()
    original, ours = copy.deepcopy(model), cnnfast.convert(model)
    x = image().float().to(device)
    within = functools.partial(torch.autocast, device.type, dtype=torch.bfloat16)
    assert_same_steps(ours, original, x, modes=("no_grad", "train"), tolerance=0.05, within=within)


def test_a_sum_in_place_is_fused_on_meta_too():
    """Where nothing takes meta tensors for a GPU's: there is no autocast of theirs to ask about."""
    model = cnnfast.convert(build(block(residual_in_place), torch.device("cpu"))).to("meta")
    x = image().to("meta")
    steps = []
    with observed(lambda modules, residual, activation: steps.append((residual, activation))):
        y = model(x)
    assert (y.shape, y.dtype) == (x.shape, x.dtype)
    assert (True, "relu") in steps
