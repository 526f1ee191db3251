"""Calls that go around PyTorch's dispatcher: only where nothing stands between, and with the results that it gives."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import cnnfast
import cnnfast.functional as ours
from tests.support.agreement import integers, leaf

X, W = integers(2, 3, 5, 5), integers(4, 3, 3, 3)


class Watch(TorchDispatchMode):
    """Notes our operators as they come by."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "cnnfast":
            self.seen.append(func._opname)
        return func(*args, **(kwargs or {}))


def step(x, w):
    """Forward and backward of one convolution: (y, dx, dw)."""
    y = ours.conv2d(x, w, padding=1)
    return y, *torch.autograd.grad(y.square().sum(), (x, w))


@pytest.fixture
def operands(device):
    return leaf(X.to(device)), leaf(W.to(device))


def test_modes_see_the_operators(operands):
    with Watch() as watch:
        seen = step(*operands)
    assert watch.seen == ["conv_fprop", "conv_dgrad", "conv_wgrad"]
    torch.testing.assert_close(seen, step(*operands), rtol=0, atol=0)
    with FlopCounterMode(display=False):
        step(*operands)


def test_the_profiler_sees_the_operators(operands):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step(*operands)
    names = {event.key for event in profile.key_averages()}
    assert {"cnnfast::conv_fprop", "cnnfast::conv_dgrad", "cnnfast::conv_wgrad"} <= names


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_tracers_see_the_operators(operands):
    x, w = (t.detach() for t in operands)
    graph = make_fx(lambda x, w: ours.conv2d(x, w), tracing_mode="symbolic")(x, w)
    assert [node.target for node in graph.graph.nodes if node.op == "call_function"] == [
        torch.ops.cnnfast.conv_fprop.default
    ]


def test_the_older_tracer_records_pytorchs_operators(operands):
    """What it leaves loads where cnnfast is not installed, and takes other sizes."""
    x, w = (t.detach() for t in operands)
    traced = torch.jit.trace(lambda x, w: ours.conv2d(x, w), (x, w))
    assert "cnnfast::" not in str(traced.graph)
    larger = torch.cat([x, x + 1])
    torch.testing.assert_close(traced(larger, w), ours.conv2d(larger, w))


def test_fake_tensors_launch_nothing(operands, launches):
    with FakeTensorMode() as fake:
        x, w = (fake.from_tensor(t) for t in operands)
        y = ours.conv2d(x, w, stride=2)
    assert y.shape == (2, 4, 2, 2)
    assert launches == []


class Tagged(torch.Tensor):
    pass


class Refusing(torch.Tensor):
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if getattr(func, "namespace", "") == "cnnfast":
            raise NotImplementedError("refused")
        return super().__torch_function__(func, types, args, kwargs or {})


def test_subclasses_have_their_say(operands):
    x, w = (t.detach() for t in operands)
    assert type(ours.conv2d(x.as_subclass(Tagged), w)) is Tagged
    with pytest.raises(NotImplementedError, match="refused"):
        CALLS["conv_fprop"](cnnfast.ops.conv_fprop, x, w.as_subclass(Refusing))
    assert type(ours.conv2d(x, torch.nn.Parameter(w))) is torch.Tensor


CALLS = {
    "conv_fprop": lambda f, x, w: f(x, w, None, (1, 1), (1, 1, 1, 1), (1, 1), 1, "auto"),
    "conv_stats": lambda f, x, w: f(x, w, None, (2, 1), (0, 0, 1, 1), (1, 1), 1, "auto"),
    "global_avg_pool": lambda f, x, w: f(x),
    "max_pool": lambda f, x, w: f(x, True, (2, 2), (1, 1), (0, 0), (1, 1), False),
}


@pytest.mark.parametrize("mode", ["inference", "no_grad", "grad"])
@pytest.mark.parametrize("name", CALLS)
def test_both_ways_give_the_same(name, mode, operands):
    """Results, whether they require gradients, and the gradients."""
    x, w = operands
    found = []
    for function in (getattr(cnnfast.ops, name), getattr(torch.ops.cnnfast, name).default):
        with torch.inference_mode(mode == "inference"), torch.set_grad_enabled(mode == "grad"):
            y = CALLS[name](function, x, w)
        first = y[0] if isinstance(y, tuple) else y
        assert first.requires_grad == (mode == "grad")
        assert first.is_inference() == (mode == "inference")
        results = list(y) if isinstance(y, tuple) else [y]
        wanted = [x] if "pool" in name else [x, w]
        found.append(results + (list(torch.autograd.grad(first.square().sum(), wanted)) if mode == "grad" else []))
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_frozen_tensors_have_no_graph(operands):
    x, w = operands
    assert not ours.conv2d(x.detach(), w.detach()).requires_grad
    y = ours.conv2d(x.detach(), w)
    assert y.requires_grad
    assert type(y.grad_fn).__name__ == "_FpropBackward"
