"""nn.conv_bn_act of existing modules against calling them one after the other, and when it may stand for that."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import Tensor, nn

import cnnfast
import cnnfast.nn as cnn
from cnnfast.activations import ACTIVATIONS
from tests.support.agreement import assert_close, assert_served_by_kernels, normal
from tests.support.modules import assert_same_buffers, one_by_one, outcome, randomise

X, Y = (2, 4, 6, 5), (2, 6, 3, 3)  # of a 3x3 convolution with stride 2 and padding 1
EVAL = ["conv_fprop_kernel"]
TRAINING = ["conv_fprop_kernel", "combine_kernel", "update_running_kernel", "normalize_kernel"]


def members(device, norm=nn.BatchNorm2d, dtype=torch.float64, bias=False, **options) -> nn.ModuleList:
    """PyTorch's (conv, bn), with random state."""
    options = {"stride": 2, "padding": 1, "groups": 2} | options
    return randomise(nn.ModuleList([nn.Conv2d(4, 6, 3, bias=bias, **options), norm(6)])).to(device, dtype)


def compare(
    ours: nn.Module, theirs: nn.Module, x: Tensor, residual: Tensor | None = None, **options
) -> cnnfast.recording.Trace:
    """conv_bn_act of the children of one against calling those of the other: results, all gradients, buffers."""
    mine = outcome(ours, x, residual, function=lambda m, x, r: cnn.conv_bn_act(*m, x, r, **options))
    assert_close(mine, outcome(theirs, x, residual, function=lambda m, x, r: one_by_one(*m, x, r, **options)))
    assert_same_buffers(ours, theirs)
    assert_served_by_kernels(mine.trace)
    return mine.trace


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": True, "groups": 1, "dilation": 2, "padding": (2, 1)},
        *[{"padding_mode": mode, "padding": (1, 2)} for mode in ("reflect", "replicate", "circular")],
        {"padding": "same", "stride": 1},
        {"padding": "same", "stride": 1, "padding_mode": "circular", "dilation": 2},
        {"padding": "valid"},
    ],
    ids=str,
)
def test_convolutions(options, training, device):
    theirs = members(device, **options).train(training)
    x = normal(*X).to(device)
    compare(copy.deepcopy(theirs), theirs, x, activation="silu")
    theirs = copy.deepcopy(theirs)
    with torch.no_grad():
        residual = torch.empty_like(theirs[0](x)).copy_(normal(*theirs[0](x).shape, seed=1))
    with torch.no_grad(), cnnfast.trace() as trace:
        fused = cnn.conv_bn_act(*copy.deepcopy(theirs), x, residual, "relu")
    torch.testing.assert_close(fused, one_by_one(*theirs, x, residual, "relu").detach(), rtol=1e-11, atol=1e-11)
    assert trace.launches == (TRAINING if training else EVAL)  # with the residual: it fits


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize(
    "options",
    [
        {"momentum": None},
        {"momentum": 0.3, "eps": 0.1},
        {"affine": False},
        {"track_running_stats": False},
        {"bias": False},
    ],
    ids=str,
)
def test_batch_norms(options, training, device):
    theirs = members(device, functools.partial(nn.BatchNorm2d, **options))
    ours = copy.deepcopy(theirs)
    for seed in (0, 1):
        compare(ours.train(training), theirs.train(training), normal(*X, seed=seed).to(device), activation="relu")
    if training and options.get("track_running_stats", True):
        assert ours[1].num_batches_tracked == 2


@pytest.mark.parametrize("mode", ["training", "eval", "no batches", "no statistics"])
def test_frozen_within_training(mode, device):
    """bn.eval() and frozen parameters inside a model that trains: the fused form of evaluation, with gradients."""
    theirs = members(device).train()
    theirs[1].train(mode not in ("eval", "no statistics")).requires_grad_(False)
    if mode.startswith("no "):
        for name in ("num_batches_tracked",) if mode == "no batches" else ("running_mean", "running_var"):
            setattr(theirs[1], name, None)
    ours = copy.deepcopy(theirs)
    trace = compare(ours, theirs, normal(*X).to(device), activation="relu")
    assert (trace.calls[0].operation == "conv_bn_act") == (mode == "eval")


def test_sync_batch_norm(device):
    theirs = members(device, nn.SyncBatchNorm).eval()
    ours = copy.deepcopy(theirs)
    x = normal(*X).to(device)
    assert cnn.fusable(x, *ours)
    compare(ours, theirs, x, activation="relu")
    assert not cnn.fusable(x, *ours.train())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_frozen_batch_norm(dtype, torchvision, device):
    """torchvision's: its parameters are buffers, and an image of fewer bits than they have is promoted."""
    theirs = members(device, torchvision.ops.FrozenBatchNorm2d).train()
    ours, x, residual = copy.deepcopy(theirs), normal(*X).to(device), normal(*Y, seed=1).to(device)
    assert compare(ours, theirs, x, residual, activation="relu").launches[:1] == EVAL
    right = one_by_one(*theirs, x, residual, "relu").detach()
    ours[0].to(dtype)
    ours[1].float() if dtype != torch.float64 else None
    theirs = copy.deepcopy(ours)
    with torch.no_grad(), cnnfast.trace() as trace:
        y = cnn.conv_bn_act(*ours, x.to(dtype), residual.to(dtype), "relu")
    assert y.dtype == one_by_one(*theirs, x.to(dtype), residual.to(dtype), "relu").dtype
    torch.testing.assert_close(y.double(), right, rtol=0, atol=20 * torch.finfo(dtype).eps)
    assert trace.launches == EVAL


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_activations(activation, device, monkeypatch):
    # PyTorch's own differentiates by float32's sixth
    monkeypatch.setitem(ACTIVATIONS, "hardsigmoid", lambda u, slope: torch.nn.functional.relu6(u + 3) / 6)
    theirs = members(device).eval()
    x, residual = normal(*X).to(device), normal(*Y, seed=1).to(device)
    slopes = {"leaky_relu": 0.3, "prelu": normal(6).to(device)}
    options = {"activation_arg": slopes[activation]} if activation in slopes else {}
    compare(copy.deepcopy(theirs), theirs, x, residual, activation=activation, **options)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("shape", [(6, 1, 1), (2, 1, 3, 3), (), (5, 2, 6, 3, 3)], ids=str)
def test_broadcast_residual(shape, training, device):
    theirs = members(device).train(training)
    compare(copy.deepcopy(theirs), theirs, normal(*X).to(device), normal(*shape, seed=1).to(device), activation="relu")


def test_residual_of_another_kind(device):
    """Another dtype is promoted as PyTorch does, a number is added."""
    theirs = members(device, dtype=torch.float32).eval()
    x = normal(*X, dtype=torch.float32).to(device)
    for residual in (normal(*Y).to(device), normal(*Y, dtype=torch.float16).to(device), 1.5):
        with torch.no_grad(), cnnfast.trace() as trace:
            y = cnn.conv_bn_act(*copy.deepcopy(theirs), x, residual, "relu")
        torch.testing.assert_close(y, one_by_one(*theirs, x, residual, "relu").detach(), rtol=1e-5, atol=1e-5)
        assert trace.launches == EVAL


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("norm", ["BatchNorm2d", "FrozenBatchNorm2d"])
def test_autocast(norm, training, torchvision, device):
    """dtypes and numbers as the modules one after the other: float32 residuals stay float32."""
    kind = nn.BatchNorm2d if norm == "BatchNorm2d" else torchvision.ops.FrozenBatchNorm2d
    theirs = members(device, kind, torch.float32).train(training)
    x, low = normal(*X, dtype=torch.float32).to(device), torch.bfloat16
    for residual in (None, normal(*Y, dtype=torch.float32).to(device), normal(*Y, dtype=low).to(device)):
        results = []
        for function, modules in ((cnn.conv_bn_act, copy.deepcopy(theirs)), (one_by_one, copy.deepcopy(theirs))):
            with torch.autocast(device.type, low), cnnfast.trace() as trace:
                y = function(*modules, x, residual, "relu")
            results.append(
                [y, *torch.autograd.grad(y.float().square().sum(), list(modules.parameters())), *modules.buffers()]
            )
            assert {c.served_by for c in trace} <= {"kernels"}
        torch.testing.assert_close(*results, rtol=0.05, atol=0.3)
        assert [t.dtype for t in results[0]] == [t.dtype for t in results[1]]


# ----------------------------------------------------------------------------------------------------------------------
# When members may be fused


def test_fusable(device):
    x, modules = normal(*X).to(device), [nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU()]
    with cnnfast.trace() as trace:
        assert cnn.fusable(x, *modules)
        assert cnn.fusable(x)
        assert not cnn.fusable(x.to(torch.complex64), *modules)
        with cnnfast.backend("torch"):
            assert not cnn.fusable(x, *modules)
    assert len(trace) == 0
    for other in (x[0], x[None], None, [x], 1.0):
        assert not cnn.fusable(other, *modules)
    with cnnfast.backend("kernels"), pytest.raises(RuntimeError, match="because"):
        cnn.fusable(x.int(), *modules)


HOOKS = ("forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook")


@pytest.mark.parametrize("kind", HOOKS)
def test_watched_members_are_not_fused(kind, device):
    x, modules = normal(*X).to(device), [nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)]
    for module in modules:
        handle = getattr(module, f"register_{kind}")(lambda *call: None)
        assert not cnn.fusable(x, *modules)
        handle.remove()
        assert cnn.fusable(x, *modules)
    handle = getattr(nn.modules.module, f"register_module_{kind}")(lambda *call: None)
    assert not cnn.fusable(x, *modules)
    handle.remove()
    modules[1].forward = lambda x: x  # as accelerate does
    assert not cnn.fusable(x, *modules)


def test_check_sees_the_fused_call(device):
    """check captures under backend("torch"), where nothing would be fused otherwise: what kernels shall compute is what
    it judges.
    """
    report = cnnfast.check(cnn.ConvBNAct(4, 6, 3).to(device), normal(*X, dtype=torch.float32).to(device))
    assert [(row.operation, row.layer) for row in report.rows] == [("conv_bn_act", "conv")]
    assert report.ok, str(report)
