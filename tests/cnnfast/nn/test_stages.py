"""Residual blocks that follow one another are linked where nobody else sees what stands between them."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import cnnfast
import cnnfast.nn as cnn
from cnnfast.checking.trained import judge_training
from cnnfast.nn.stages import through
from cnnfast.ops import serving
from tests.support.agreement import normal

LAST = torch.channels_last
BLOCKS = 3


class Stage(nn.Sequential):
    """Whose forward links its blocks, as that of cnn.ResNet does."""

    def forward(self, input):
        return through(self, input)[0]


class Plain(nn.Module):
    """A residual block of PyTorch's modules, without a shortcut of its own."""

    def __init__(self, channels):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False), nn.BatchNorm2d(channels)

    def forward(self, x):
        z = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(z)) + x)


class Doubled(Plain):
    """It computes more of its input than a residual block."""

    def forward(self, x):
        return super().forward(x) + x


class Watched(cnn.BasicBlock):
    def forward(self, x):
        return super().forward(x) * 2.0


def stage(kind="basic", device="cpu", dtype=torch.float64) -> Stage:
    torch.manual_seed(0)
    if kind == "basic":
        blocks = [cnn.BasicBlock(8, 8) for _ in range(BLOCKS)]
    else:
        down = nn.Sequential(cnn.Conv2d(8, 16, 1, 2, bias=False), cnn.BatchNorm2d(16))
        blocks = [cnn.Bottleneck(8, 4, 2, down), *(cnn.Bottleneck(16, 4) for _ in range(BLOCKS - 1))]
    return Stage(*blocks).to(device, dtype, memory_format=LAST)


def image(device="cpu", dtype=torch.float64) -> torch.Tensor:
    return normal(2, 8, 6, 5, seed=1).to(device, dtype).contiguous(memory_format=LAST)


def trained(model, x, backend="kernels"):
    """Its result and all gradients by name, buffers, and the trace."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    with cnnfast.backend(backend), cnnfast.trace() as trace:
        y = model(x)
        y.backward(torch.empty_like(y, requires_grad=False).copy_(normal(*y.shape, seed=2)))
    found = {"y": y.detach(), "x": x.grad, **{name: p.grad for name, p in model.named_parameters()}}
    return found | {name: b.clone() for name, b in model.named_buffers()}, trace


def passes(trace) -> int:
    """Blocks that begin their backward with a pass over the gradient of their result."""
    return sum(call.operation == "activation_backward" for call in trace)


def assert_as_pytorch(model, x, expected_passes, backend="kernels"):
    right, _ = trained(copy.deepcopy(model), x, "torch")
    mine, trace = trained(model, x, backend)
    assert mine.keys() == right.keys()
    for name, t in right.items():
        torch.testing.assert_close(mine[name], t, rtol=1e-11, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}")
    assert passes(trace) == expected_passes


@pytest.mark.parametrize("kind", ["basic", "bottleneck"])
def test_float64(device, kind):
    """Only the last block begins with a pass: the others find their gradient masked and summed."""
    assert_as_pytorch(stage(kind, device), image(device), 1)


@pytest.mark.parametrize("kind", ["basic", "bottleneck"])
def test_errs_no_more_than_twice_as_pytorch(device, kind):
    row = judge_training(stage(kind, device, torch.float32), image(device, torch.float32), torch.float16, 2)
    assert not [(c.tensor, c.message, c.rms, c.rms_limit) for c in row.beyond]


def test_a_hook_between(device):
    """It sees the gradient that it sees in PyTorch, and the blocks around it are not linked."""
    model, x = stage(device=device), image(device)
    seen = []
    model[1].register_full_backward_hook(lambda module, inputs, outputs: seen.append((*inputs, *outputs)))
    assert_as_pytorch(model, x, BLOCKS)
    mine, right = seen[1], seen[0]
    for a, b in zip(mine, right, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_a_hook_of_an_inner_module(device):
    """That block runs by its modules; the one before it is no longer the only one that sees its result."""
    model, x = stage(device=device), image(device)
    calls = []
    model[1].bn1.register_forward_hook(lambda module, inputs, output: calls.append(output.shape))
    assert_as_pytorch(model, x, BLOCKS - 1)
    assert len(calls) == 2


def test_an_own_forward_is_not_linked(device):
    model = Stage(cnn.BasicBlock(8, 8), Watched(8, 8), cnn.BasicBlock(8, 8)).to(device, torch.float64)
    assert_as_pytorch(model.to(memory_format=LAST), image(device), BLOCKS)


def test_a_plain_sequential_inside(device):
    """Blocks are linked from one Sequential to the next, unless somebody watches the Sequential."""
    model = Stage(nn.Sequential(*stage(device=device)), nn.Sequential(*stage(device=device)))
    assert_as_pytorch(model, image(device), 1)
    model[0].register_forward_hook(lambda module, inputs, output: None)
    assert passes(trained(model, image(device))[1]) == 1 + BLOCKS


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_block(device, frozen):
    model = stage(device=device)
    model[frozen].requires_grad_(False)
    assert_as_pytorch(model, image(device), 1)


def test_where_the_library_comes_first(device, monkeypatch):
    """Its convolutions mask no gradient."""
    monkeypatch.setattr(serving, "LIBRARY_FIRST", ("cpu", "cuda"))
    assert_as_pytorch(stage(device=device), image(device), BLOCKS, "auto")


def test_second_derivatives(device):
    def penalty(model, backend):
        x = image(device).requires_grad_()
        with cnnfast.backend(backend):
            (dx,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
            return torch.autograd.grad(dx.square().sum(), [x, *model.parameters()])

    model = stage(device=device)
    for mine, right in zip(penalty(model, "kernels"), penalty(copy.deepcopy(model), "torch"), strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed(device, reentrant):
    model, x = stage(device=device), image(device)
    right, _ = trained(copy.deepcopy(model), x)

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.stage = model

        def forward(self, x):
            return checkpoint(self.stage, x, use_reentrant=reentrant)

    mine, _ = trained(Checkpointed(), x)
    for name in ("y", "x"):
        assert torch.equal(mine[name], right[name])
    for name, _ in model.named_parameters():
        assert torch.equal(mine[f"stage.{name}"], right[name])


def test_compiled(device):
    """Into one graph, with the same bits, and linked."""
    torch._dynamo.reset()
    model, x = stage(device=device), image(device)
    right, eager = trained(copy.deepcopy(model), x)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    mine, trace = trained(compiled, x)
    for name, t in right.items():
        found = mine[name if name in ("y", "x") else f"_orig_mod.{name}"]
        assert torch.equal(found, t), name
    assert counter.frame_count == 1
    assert passes(trace) == passes(eager) == 1


def test_a_block_compiled_by_itself(device):
    """It is called as it was compiled."""
    torch._dynamo.reset()
    model, counter = stage(device=device), CompileCounterWithBackend("aot_eager")
    model[1].compile(backend=counter)
    assert_as_pytorch(model, image(device), BLOCKS)
    assert counter.frame_count >= 1


def test_traced_by_fx_a_block_is_called(device):
    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, m, module_qualified_name):
            return isinstance(m, cnn.BasicBlock)

    model = stage(device=device)
    called = [str(node.target) for node in Tracer().trace(model).nodes if node.op == "call_module"]
    assert called == ["0", "1", "2"]


# ----------------------------------------------------------------------------------------------------------------------
# Converted


def converted(device, *blocks) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Identity(), nn.Sequential(*blocks)).to(device, torch.float64, memory_format=LAST)


def test_converted(device):
    """The same class to everybody; copies and pickles are linked too, and what is reverted is not."""
    model, x = converted(device, *(Plain(8) for _ in range(BLOCKS))), image(device)
    right, _ = trained(copy.deepcopy(model), x, "torch")
    own = cnnfast.convert(copy.deepcopy(model))
    for found in (own, copy.deepcopy(own), pickle.loads(pickle.dumps(own))):
        assert isinstance(found[1], nn.Sequential)
        mine, trace = trained(found, x)
        assert passes(trace) == 1
        for name, t in right.items():
            torch.testing.assert_close(mine[name], t, rtol=1e-11, atol=1e-11)
    back = cnnfast.revert(own)
    assert type(back[1]) is nn.Sequential
    assert str(cnnfast.convert(model)) == str(cnnfast.convert(model, memory_format=None))


def test_a_converted_block_that_computes_more(device):
    """Of its input, or is watched, or is changed after the conversion: the block before it is not linked to it."""
    model, x = converted(device, Plain(8), Doubled(8), Plain(8)), image(device)
    right, _ = trained(copy.deepcopy(model), x, "torch")
    mine, trace = trained(cnnfast.convert(model), x)
    assert passes(trace) == BLOCKS
    for name, t in right.items():
        torch.testing.assert_close(mine[name], t, rtol=1e-11, atol=1e-11)


def test_a_converted_block_that_is_replaced(device):
    model, x = cnnfast.convert(converted(device, *(Plain(8) for _ in range(BLOCKS)))), image(device)
    model[1][1] = Doubled(8).to(x).to(memory_format=LAST)
    right, _ = trained(copy.deepcopy(model), x, "torch")
    mine, trace = trained(model, x)
    assert passes(trace) == 2
    for name, t in right.items():
        torch.testing.assert_close(mine[name], t, rtol=1e-11, atol=1e-11)


class Network(nn.Module):
    """Two stages one after another, of whose results nobody but the next sees anything unless it is `shown`."""

    def __init__(self, shown=False):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.first, self.second = (nn.Sequential(*(Plain(8) for _ in range(2))) for _ in range(2))
        self.shown = shown

    def forward(self, x):
        x = self.first(torch.relu(self.bn(self.conv(x))))
        return self.second(x) + x if self.shown else self.second(x)


@pytest.mark.parametrize("shown", [False, True])
def test_stages_of_a_converted_network(device, shown):
    torch.manual_seed(0)
    model, x = Network(shown).to(device, torch.float64, memory_format=LAST), image(device)
    right, _ = trained(copy.deepcopy(model), x, "torch")
    found = cnnfast.convert(model)
    for watched in (False, True):
        mine, trace = trained(copy.deepcopy(found), x)
        assert passes(trace) == 1 + (shown or watched)
        for name, t in right.items():
            torch.testing.assert_close(mine[name], t, rtol=1e-11, atol=1e-11)
        found.second.register_forward_pre_hook(lambda module, inputs: None)


def test_less_memory(device):
    model = cnnfast.convert(converted(device, *(Plain(8) for _ in range(BLOCKS))), memory="less")
    assert_as_pytorch(model, image(device), 1)
