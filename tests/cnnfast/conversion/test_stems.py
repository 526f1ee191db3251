"""A max pool after a convolution and its norm: one operator with them in training, called as before everywhere else."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

import cnnfast
import cnnfast.nn as cnn
from cnnfast.models import resnet18
from tests.support.agreement import leaf, normal

ONE = ["conv_stats", "update_running", "normalize_max_pool"]
APART = ["conv_stats", "update_running", "normalize", "max_pool"]
IN_EVAL = ["conv_bn_act", "max_pool"]


class ASmallStem(nn.Module):
    """As torchvision's ResNet has it."""

    def __init__(self, act=None, pool=None):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.act1 = nn.ReLU(inplace=True) if act is None else act
        self.maxpool = nn.MaxPool2d(3, 2, 1) if pool is None else pool

    def forward(self, x):
        return self.maxpool(self.act1(self.bn1(self.conv1(x))))


class NotActivated(ASmallStem):
    def forward(self, x):
        return self.maxpool(self.bn1(self.conv1(x)))


class Returned(ASmallStem):
    def forward(self, x):
        y = self.act1(self.bn1(self.conv1(x)))
        return self.maxpool(y) + y.mean()


def image(device):
    return normal(2, 3, 13, 11, dtype=torch.float32).to(device, memory_format=torch.channels_last)


def forwards(model, x):
    with cnnfast.trace() as trace:
        z = model(x)
    return z, [call.operation for call in trace]


def agree(model, x):
    """(what a converted copy called), which gives the original's results, gradients and statistics."""
    converted = cnnfast.convert(copy.deepcopy(model))
    z, called = forwards(converted, x)
    right = model(x)
    torch.testing.assert_close(z, right, rtol=1e-5, atol=1e-5)
    if right.requires_grad:
        found, expected = (
            torch.autograd.grad(t.square().sum(), m.parameters()) for t, m in ((z, converted), (right, model))
        )
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(dict(converted.named_buffers()), dict(model.named_buffers()), rtol=1e-5, atol=1e-6)
    return called


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (ASmallStem, ONE),
        (lambda: ASmallStem(nn.ReLU6(), nn.MaxPool2d(2)), ONE),
        (lambda: ASmallStem(nn.LeakyReLU(0.1), nn.MaxPool2d(3, 1, ceil_mode=True)), ONE),
        (NotActivated, ONE),
        (lambda: ASmallStem(nn.LeakyReLU(-0.1)), APART),
        (lambda: ASmallStem(nn.SiLU()), APART),
        (lambda: ASmallStem(pool=nn.MaxPool2d(2, dilation=2)), APART),
        (lambda: ASmallStem(pool=nn.AvgPool2d(2)), [*APART[:3], "avg_pool"]),
        (Returned, APART),
        (lambda: ASmallStem().eval(), IN_EVAL),
    ],
)
def test_what_is_one_operator(model, expected, quick):
    model = model().to(quick)
    called = agree(model, image(quick))
    if not model.training:
        with torch.no_grad():
            called = agree(model, image(quick))
    assert called == expected


def test_without_gradients_it_is_apart(quick):
    model = cnnfast.convert(ASmallStem().to(quick))
    with torch.no_grad():
        assert forwards(model, image(quick))[1] == APART
    model.requires_grad_(False)
    assert forwards(model, image(quick))[1] == APART
    assert forwards(model, leaf(image(quick)))[1] == ONE


class Watching(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("mode", "expected"), [(torch.device, ONE), (lambda device: Watching(), APART)])
def test_modes_that_see_functions(quick, mode, expected):
    """A default device looks at no call of ours; any other may, and sees the public functions."""
    model, x = cnnfast.convert(ASmallStem().to(quick)), image(quick)
    with mode(quick):
        assert forwards(model, x)[1] == expected


def test_by_kernels(device):
    """Numbers of the operator itself."""
    assert agree(ASmallStem().to(device), image(device)) == ONE


def test_a_watched_or_other_pool_is_called(quick):
    model, x = cnnfast.convert(ASmallStem().to(quick)), image(quick)
    z, _ = forwards(model, x)
    seen = []
    hook = model.maxpool.register_forward_hook(lambda *call: seen.append(call[2].shape))
    again, called = forwards(model, x)
    assert (seen, called) == ([z.shape], APART)
    torch.testing.assert_close(again, z)
    hook.remove()
    assert forwards(model, x)[1] == ONE
    model.maxpool = nn.Identity()
    assert forwards(model, x)[1] == APART[:3]
    model.maxpool = nn.MaxPool2d(3, 2, 1, return_indices=True)
    pooled, positions = forwards(cnnfast.convert(model), x)[0]
    torch.testing.assert_close(pooled, z)
    assert positions.dtype == torch.int64


def test_a_hook_on_another_member(quick):
    model, x = cnnfast.convert(ASmallStem().to(quick)), image(quick)
    model.act1.register_forward_hook(lambda *call: None)
    assert forwards(model, x)[1][-1] == "max_pool"


def test_its_report_is_that_of_separate_calls(quick):
    model = cnnfast.convert(ASmallStem().to(quick))
    rows = {row.name: (row.status, row.reason) for row in cnnfast.report(model, image(quick)).rows}
    fused = ("fused", "conv1 + bn1 + act1")
    assert rows == {"conv1": fused, "bn1": fused, "maxpool": ("replaced", "")}


def test_our_own_resnet(quick):
    model, x = resnet18(num_classes=3).to(quick), normal(2, 3, 32, 32, dtype=torch.float32).to(quick)
    called = forwards(model, x)[1]
    assert called[:3] == ONE
    assert "max_pool" not in called
    model.maxpool.register_forward_hook(lambda *call: None)
    assert forwards(model, x)[1][:4] == APART
    assert forwards(model.eval(), x)[1][:2] in (IN_EVAL, ["conv_fprop", "normalize"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast(dtype, device):
    """The dtypes of the separate calls, and their bits."""
    model, x = cnnfast.convert(ASmallStem().to(device)), image(device)
    apart = copy.deepcopy(model)
    apart.maxpool.register_forward_hook(lambda *call: None)
    with torch.autocast(device.type, dtype):
        (z, called), (right, others) = forwards(model, x), forwards(apart, x)
    assert (called, others) == (ONE, APART)
    assert z.dtype == right.dtype == dtype
    assert torch.equal(z, right)
    z.float().square().sum().backward()
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}


def test_a_frozen_norm_and_one_that_synchronises_with_nobody(quick):
    model, x = ASmallStem().to(quick), image(quick)
    model.bn1.eval()
    assert forwards(cnnfast.convert(copy.deepcopy(model)), x)[1][-1] == "max_pool"
    synced = cnnfast.convert(nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model).train()))
    assert isinstance(synced.bn1, cnn.SyncBatchNorm)
    assert forwards(synced, x)[1] == ONE
