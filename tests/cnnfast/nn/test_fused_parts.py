"""nn.conv_act and nn.bn_act of existing modules, and conv_bn_act of 1-D and of asymmetrically padded convolutions,
against calling the modules one after the other.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import cnnfast
import cnnfast.nn as cnn
from cnnfast.activations import LEAKY_SLOPE, activate
from cnnfast.nn.layers import SameConv2d
from tests.support.agreement import assert_close, assert_served_by_kernels, normal
from tests.support.modules import assert_same_buffers, outcome, randomise

IMAGE = (2, 4, 6, 5)


def after(y: Tensor, residual: Tensor | None, activation: str | None, slope: float | Tensor | None) -> Tensor:
    y = y if residual is None else y + residual
    return activate(y, activation, LEAKY_SLOPE if slope is None else slope)


def compare(modules: nn.ModuleList, step, x: Tensor, residual=None, activation="relu", slope=None) -> list[str]:
    """A step on a copy of the modules against calling them: results, gradients, buffers. Returns the launches of the
    forward pass.
    """
    theirs, ours = modules, copy.deepcopy(modules)

    def called(members, x, residual):
        for member in members:
            x = member(x)
        return after(x, residual, activation, slope)

    mine = outcome(ours, x, residual, function=lambda m, x, r: step(*m, x, r, activation, slope))
    assert_close(mine, outcome(theirs, x, residual, function=called))
    assert_same_buffers(ours, theirs)
    assert_served_by_kernels(mine.trace)
    with torch.no_grad(), cnnfast.trace() as trace:
        step(*copy.deepcopy(ours), x, residual, activation, slope)
    return trace.launches


def made(*modules: nn.Module, training: bool, device: torch.device) -> nn.ModuleList:
    return randomise(nn.ModuleList(modules)).to(device, torch.float64).train(training)


CONVOLUTIONS = [
    {},
    {"padding": (2, 1), "stride": 2, "groups": 2, "bias": False},
    {"padding": 1, "padding_mode": "reflect"},
    {"padding": "same", "dilation": 2},
]


@pytest.mark.parametrize("options", CONVOLUTIONS, ids=str)
def test_conv_act(options, device):
    modules, x = made(nn.Conv2d(4, 6, 3, **options), training=True, device=device), normal(*IMAGE).to(device)
    y = modules[0](x).detach()
    residual = normal(*y.shape, seed=1).to(device)
    for r, activation in ((None, "relu"), (residual, "silu"), (residual, None)):
        assert compare(modules, cnn.conv_act, x, r, activation) == ["conv_fprop_kernel"]


@pytest.mark.parametrize("residual", [(6, 1, 1), (3, 2, 6, 4, 3), ()], ids=str)
def test_conv_act_and_a_broadcast_residual(residual, device):
    modules = made(nn.Conv2d(4, 6, 3), training=True, device=device)
    launches = compare(modules, cnn.conv_act, normal(*IMAGE).to(device), normal(*residual, seed=1).to(device))
    assert launches == ["conv_fprop_kernel"]


NORMS = [
    (nn.BatchNorm1d, (5, 4)),
    (nn.BatchNorm1d, (2, 4, 7)),
    (nn.BatchNorm2d, IMAGE),
    (nn.BatchNorm3d, (2, 4, 3, 2, 2)),
]


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize(("kind", "size"), NORMS, ids=str)
def test_bn_act(kind, size, training, device):
    modules, x = made(kind(4), training=training, device=device), normal(*size).to(device)
    residual = normal(*size, seed=1).to(device)
    for r, activation in ((None, "relu"), (residual, "hardswish"), (residual, None)):
        launches = compare(modules, cnn.bn_act, x, r, activation)
        assert launches.count("normalize_kernel") == 1
        assert (launches == ["normalize_kernel"]) is not training


@pytest.mark.parametrize("options", [{"momentum": None}, {"affine": False}, {"track_running_stats": False}], ids=str)
def test_bn_act_and_a_norms_rules(options, device):
    modules = made(nn.BatchNorm2d(4, **options), training=True, device=device)
    for seed in (0, 1):
        compare(modules, cnn.bn_act, normal(*IMAGE, seed=seed).to(device))


def test_bn_act_of_other_norms(torchvision, device):
    """SyncBatchNorm in eval; a frozen norm, also of parameters that promote the image."""
    x = normal(*IMAGE).to(device)
    assert compare(made(nn.SyncBatchNorm(4), training=False, device=device), cnn.bn_act, x) == ["normalize_kernel"]
    frozen = made(torchvision.ops.FrozenBatchNorm2d(4), training=True, device=device)
    assert compare(frozen, cnn.bn_act, x, x) == ["normalize_kernel"]
    half = x.to(torch.float16)
    y = cnn.bn_act(frozen.float()[0], half, half, "relu")
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, torch.relu(frozen[0](half) + half))


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize(
    "options", [{}, {"stride": 2, "groups": 2}, {"padding": "same", "padding_mode": "circular"}], ids=str
)
def test_one_axis(options, training, device):
    modules = made(nn.Conv1d(4, 6, 3, **options), nn.BatchNorm1d(6), training=training, device=device)
    x = normal(2, 4, 9).to(device)
    residual = normal(*modules[0](x).shape, seed=1).to(device)
    for r in (None, residual, residual[:, :, :1]):
        launches = compare(modules, cnn.conv_bn_act, x, r)
        assert launches[0] == "conv_fprop_kernel"
        assert (launches == ["conv_fprop_kernel"]) is not training
    assert compare(modules[:1], cnn.conv_act, x, residual, "leaky_relu", 0.2) == ["conv_fprop_kernel"]


# ----------------------------------------------------------------------------------------------------------------------
# Another number of zeros at the end of an axis


@pytest.mark.parametrize(
    ("size", "options"),
    [
        ((6, 5), {"kernel_size": 3, "stride": 2}),
        ((7, 6), {"kernel_size": (3, 5), "stride": (2, 3)}),
        ((5, 5), {"kernel_size": (2, 4)}),
        ((6, 6), {"kernel_size": 3, "stride": 2, "dilation": 2, "groups": 2}),
        ((5, 4), {"kernel_size": 1, "stride": 3}),
    ],
    ids=str,
)
def test_tensorflows_padding(size, options, device):
    """Sizes of the result, and the result of the padded image; one kernel, alone and fused."""
    conv, norm = made(SameConv2d(4, 6, **options), nn.BatchNorm2d(6), training=False, device=device)
    x = normal(2, 4, *size).to(device)

    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = copy.deepcopy(conv)
            self.conv.__class__ = nn.Conv2d

        def forward(self, x):
            top, bottom, left, right = conv.sides(x.shape[2:])
            return self.conv(nn.functional.pad(x, (left, right, top, bottom)))

    padded = Padded()
    with cnnfast.trace() as trace:
        y = conv(x)
    assert trace.launches == ["conv_fprop_kernel"]
    assert y.shape[2:] == tuple(-(-n // step) for n, step in zip(size, conv.stride, strict=True))
    torch.testing.assert_close(y, padded(x), rtol=1e-11, atol=1e-11)
    assert_close(outcome(conv, x), outcome(padded, x))
    residual = normal(*y.shape, seed=1).to(device)
    for r in (None, residual):
        with torch.no_grad(), cnnfast.trace() as trace:
            z, u = cnn.conv_bn_act(conv, norm, x, r, "relu"), cnn.conv_act(conv, x, r, "relu")
        assert trace.launches == ["conv_fprop_kernel"] * 2
        torch.testing.assert_close(z, after(norm(padded(x)), r, "relu", None), rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(u, after(padded(x), r, "relu", None), rtol=1e-11, atol=1e-11)
    with cnnfast.backend("torch"):
        torch.testing.assert_close(cnn.conv_bn_act(conv, norm, x, None, "relu"), torch.relu(norm(padded(x))))
        torch.testing.assert_close(cnn.conv_act(conv, x), padded(x))
        torch.testing.assert_close(conv(x), padded(x))


def test_check_judges_tensorflows_padding(device):
    """Each call as it is, with its four paddings."""
    model = nn.Sequential(SameConv2d(4, 4, 3, 2), nn.BatchNorm2d(4), nn.ReLU(), SameConv2d(4, 4, 2)).to(device).eval()
    report = cnnfast.check(model, normal(*IMAGE, dtype=torch.float32).to(device))
    assert report.ok, str(report)
    assert "conv2d" in {row.operation for row in report.rows}


# ----------------------------------------------------------------------------------------------------------------------
# PReLU


@pytest.mark.parametrize("slopes", [1, 6])
@pytest.mark.parametrize("step", [cnn.conv_bn_act, cnn.conv_act])
def test_prelu(step, slopes, device):
    """An operand of the kernel where nothing is differentiated; after it, by PyTorch, elsewhere."""
    norms = [nn.BatchNorm2d(6)] if step is cnn.conv_bn_act else []
    modules = made(nn.Conv2d(4, 6, 3), *norms, nn.PReLU(slopes), training=False, device=device)
    x, residual = normal(*IMAGE).to(device), normal(2, 6, 4, 3, seed=1).to(device)

    def function(modules, x, r):
        return step(*modules[:-1], x, r, "prelu", modules[-1].weight)

    def called(modules, x, r):
        for member in modules[:-1]:
            x = member(x)
        return modules[-1](x if r is None else x + r)

    for r in (None, residual, residual[:, :, :1]):
        assert_close(outcome(copy.deepcopy(modules), x, r, function=function), outcome(modules, x, r, function=called))
        with torch.no_grad(), cnnfast.trace() as trace:
            y = function(modules, x, r)
        assert trace.launches == ["conv_fprop_kernel"]
        torch.testing.assert_close(y, called(modules, x, r).detach(), rtol=1e-11, atol=1e-11)


def test_prelu_without_slopes(device):
    with pytest.raises(TypeError, match="activation_arg must be prelu's slope"):
        cnn.conv_act(nn.Conv2d(4, 4, 1).to(device), torch.ones(IMAGE, device=device), None, "prelu")


def test_prelu_that_pytorch_refuses(device):
    """Its errors are PyTorch's: slopes of another number, or of another dtype."""
    norm, x = nn.BatchNorm2d(4).double().to(device), normal(*IMAGE).to(device)
    for weight in (torch.ones(3, dtype=torch.float64, device=device), torch.ones(4, device=device)):
        with torch.no_grad(), pytest.raises(RuntimeError):
            cnn.bn_act(norm, x, None, "prelu", weight)


@pytest.mark.parametrize("activation", ["relu", "prelu"])
def test_autocast(activation, device):
    """dtypes as the modules one after the other: prelu alone is cast, a norm is not."""
    low = torch.bfloat16
    conv, norm = made(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), training=False, device=device).float()
    slope = torch.full((4,), 0.3, device=device) if activation == "prelu" else None
    for x in (normal(*IMAGE, dtype=torch.float32).to(device), normal(*IMAGE, dtype=low).to(device)):
        for r in (None, x, x.to(low)):
            for step, called in ((cnn.bn_act, norm), (cnn.conv_act, conv)):
                with torch.no_grad(), torch.autocast(device.type, low):
                    mine, right = step(called, x, r, activation, slope), after(called(x), r, activation, slope)
                assert mine.dtype == right.dtype, (step, x.dtype, r)
                torch.testing.assert_close(mine, right, rtol=0.05, atol=0.05)
