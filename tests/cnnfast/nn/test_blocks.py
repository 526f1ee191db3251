"""ConvBNAct and the residual blocks against PyTorch's modules one after the other, and torchvision's blocks."""

from __future__ import annotations

import copy
import functools
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

import cnnfast
import cnnfast.nn as cnn
from tests.support.agreement import assert_close, assert_served_by_kernels, normal
from tests.support.modules import assert_same_buffers, one_by_one, outcome, randomise

X = (2, 4, 6, 5)
EVAL = ["conv_fprop_kernel"]
TRAINING = ["conv_fprop_kernel", "combine_kernel", "update_running_kernel", "normalize_kernel"]


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize(
    ("args", "options", "padding", "size"),
    [
        ((4, 6, 3), {}, "same", (6, 5)),
        ((4, 6, 3, 2), {}, (1, 1), (3, 3)),
        ((4, 6, (5, 1), (1, 2)), {"dilation": (2, 1)}, (4, 0), (6, 3)),
        ((4, 6, 7, 2), {"groups": 2}, (3, 3), (3, 3)),
        ((4, 6, 2), {}, "same", (6, 5)),
        ((4, 6, 3), {"padding": "valid"}, "valid", (4, 3)),
        ((4, 6, 3), {"padding": (0, 1)}, (0, 1), (4, 5)),
        ((4, 6, 3, 2), {"padding_mode": "reflect"}, (1, 1), (3, 3)),
    ],
    ids=str,
)
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_conv_bn_act(args, options, padding, size, training, device):
    ours = cnn.ConvBNAct(
        *args, **options, bias=True, activation="gelu", momentum=0.3, eps=0.01, device=device, dtype=torch.float64
    )
    assert ours.conv.padding == padding
    randomise(ours).train(training)
    theirs = nn.ModuleDict(
        {
            "conv": nn.Conv2d(
                *args[:3], ours.conv.stride, padding, **{k: v for k, v in options.items() if k != "padding"}
            ),
            "bn": nn.BatchNorm2d(6, momentum=0.3, eps=0.01),
        }
    )
    theirs.to(device, torch.float64).load_state_dict(ours.state_dict())
    theirs.train(training)
    x, residual = normal(*X).to(device), normal(2, 6, *size, seed=1).to(device)
    mine = outcome(ours, x, residual)
    assert_close(mine, outcome(theirs, x, residual, function=lambda m, x, r: one_by_one(*m.values(), x, r, "gelu")))
    assert_served_by_kernels(mine.trace)
    assert_same_buffers(ours, theirs)


@pytest.mark.parametrize("per_channel", [True, False])
def test_slopes_of_prelu_belong_to_the_block(per_channel, device):
    """They are trained, saved and moved with it, whoever serves."""
    slopes = nn.Parameter(torch.linspace(0.1, 0.8, 6 if per_channel else 1, dtype=torch.float64))
    ours = cnn.ConvBNAct(4, 6, 3, activation="prelu", activation_arg=slopes, dtype=torch.float64)
    assert next(iter(ours.state_dict())) == "activation_arg"
    assert f"activation=prelu, activation_arg=slopes of size [{len(slopes)}]" in repr(ours)
    randomise(ours).to(device)
    theirs = nn.Sequential(nn.Conv2d(4, 6, 3, padding="same", bias=False), nn.BatchNorm2d(6), nn.PReLU(len(slopes)))
    first, *others = ours.state_dict().values()
    theirs.to(device, torch.float64).load_state_dict(dict(zip(theirs.state_dict(), [*others, first], strict=True)))
    for training in (True, False):
        x, results = normal(*X).to(device), []
        for model in (ours.train(training), theirs.train(training)):
            y = model(x)
            y.square().sum().backward()
            results.append(y.detach())
        torch.testing.assert_close(*results)
        torch.testing.assert_close(ours.activation_arg.grad, theirs[2].weight.grad)
        with torch.no_grad():
            torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize(
    ("keyword", "says"),
    [
        ("act", "Did you mean 'activation'?"),
        ("act_layer", "Did you mean 'activation'?"),
        ("kernel", "Did you mean 'kernel_size'?"),
        ("in_ch", "Did you mean 'in_channels'?"),
        ("negative_slope", "Did you mean 'activation_arg'?"),
        (
            "norm_layer",
            "Its arguments are in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, "
            "activation, activation_arg, eps, momentum, padding_mode, device, dtype",
        ),
    ],
)
def test_an_unknown_keyword_of_conv_bn_act(keyword, says):
    with pytest.raises(TypeError) as refused:
        cnn.ConvBNAct(4, 6, 3, **{keyword: None})
    assert str(refused.value) == f"ConvBNAct() got an unexpected keyword argument {keyword!r}. {says}"


def test_conv_bn_act_launches_and_state(device):
    module = cnn.ConvBNAct(4, 6, 3, activation="leaky_relu", activation_arg=0.2).to(device)
    x = normal(*X, dtype=torch.float32).to(device)
    for training, launches in ((True, TRAINING), (False, EVAL)):
        with torch.no_grad(), cnnfast.trace() as trace:
            module.train(training)(x, module.conv(x))
        assert trace.launches == EVAL + launches
    assert "activation=leaky_relu, activation_arg=0.2" in repr(module)
    assert {name.rpartition(".")[0] for name in module.state_dict()} == {"conv", "bn"}
    for twin in (pickle.loads(pickle.dumps(module)), copy.deepcopy(module)):
        assert torch.equal(twin(x), module(x))
    for wrong in ({"activation": "tanh"}, {"activation_arg": 0.1}, {"padding": "full"}):
        with pytest.raises(ValueError, match=next(iter(map(str, wrong.values())))):
            cnn.ConvBNAct(4, 6, 3, **wrong)
    with pytest.raises(ValueError, match="expected 4D input"):
        module(x[0])


def test_hooks_see_pytorchs_tensors(device):
    """A hook on a member gets what PyTorch's module would have handed it, and may change it; the result is the same."""
    module = randomise(cnn.ConvBNAct(4, 6, 3).to(device, torch.float64)).eval()
    x = normal(*X).to(device)
    with torch.no_grad():
        y = module(x)
        seen = {}
        handles = [
            m.register_forward_hook(lambda m, args, out: seen.update({type(m).__name__: out}))
            for m in module.children()
        ]
        torch.testing.assert_close(module(x), y, rtol=1e-12, atol=1e-12)
        right = F.conv2d(x, module.conv.weight, padding="same")
        torch.testing.assert_close(seen["Conv2d"], right, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(
            seen["BatchNorm2d"], nn.BatchNorm2d.forward(module.bn, right), rtol=1e-12, atol=1e-12
        )
        for handle in handles:
            handle.remove()
        module.bn.register_forward_hook(lambda m, args, out: out + 1)
        torch.testing.assert_close(
            module(x), F.relu(nn.BatchNorm2d.forward(module.bn, right) + 1), rtol=1e-12, atol=1e-12
        )


class Scaled(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


def test_replaced_members(device):
    """By classes that compute something else they are called; by PyTorch's, or with a parametrized weight, fused."""
    module = randomise(cnn.ConvBNAct(4, 6, 3).to(device, torch.float64)).eval()
    x = normal(*X).to(device)
    for name, replacement in {
        "conv": Scaled(4, 6, 3, padding=1, bias=False),
        "bn": nn.GroupNorm(2, 6),
    }.items():
        other = copy.deepcopy(module)
        setattr(other, name, replacement.to(device, torch.float64))
        torch.testing.assert_close(other(x), F.relu(other.bn(other.conv(x))), rtol=1e-12, atol=1e-12)
    module.conv.__class__, module.bn.__class__ = nn.Conv2d, nn.BatchNorm2d
    parametrizations.weight_norm(module.conv)
    with torch.no_grad(), cnnfast.trace() as trace:
        y = module(x)
    torch.testing.assert_close(y, F.relu(module.bn(module.conv(x))).detach(), rtol=1e-11, atol=1e-11)
    assert trace.launches == EVAL


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_compile(training, device):
    """One graph, forward and backward, buffers too."""
    torch._dynamo.reset()
    results = []
    for compiled in (True, False):
        shortcut = nn.Sequential(cnn.Conv2d(4, 6, 1, 2, bias=False), cnn.BatchNorm2d(6))
        model = nn.Sequential(cnn.ConvBNAct(3, 4, 3, padding_mode="circular"), cnn.BasicBlock(4, 6, 2, shortcut))
        model = randomise(model).to(device, torch.float64).train(training)
        function = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
        with cnnfast.trace() as trace:
            y = function(normal(2, 3, 5, 6).to(device))
            results.append([y, *torch.autograd.grad(y.square().sum(), list(model.parameters())), *model.buffers()])
        assert_served_by_kernels(trace)
        assert ("conv_stats" in [c.operation for c in trace]) == training
    torch.testing.assert_close(*results)


# ----------------------------------------------------------------------------------------------------------------------
# Residual blocks

BLOCKS = [
    ("BasicBlock", (4, 4), {}),
    ("BasicBlock", (4, 6, 2), {"downsample": (4, 6)}),
    ("Bottleneck", (8, 2), {}),
    ("Bottleneck", (4, 2, 2), {"downsample": (4, 8)}),
    ("Bottleneck", (8, 2), {"groups": 2, "base_width": 96, "dilation": 2}),
]


def blocks(torchvision, name, args, options, device, dtype=torch.float64, norm=None) -> tuple[nn.Module, nn.Module]:
    """(ours, torchvision's), strictly from one another's state_dict."""
    made = []
    for library in (cnn, torchvision.models.resnet):
        more = dict(options)
        if "downsample" in options:
            before, after = options["downsample"]
            more["downsample"] = nn.Sequential(
                nn.Conv2d(before, after, 1, args[2], bias=False), (norm or nn.BatchNorm2d)(after)
            )
        made.append(getattr(library, name)(*args, **more, norm_layer=norm))
    ours, theirs = made
    theirs.load_state_dict(randomise(ours).state_dict())
    ours.load_state_dict(theirs.state_dict())
    return ours.to(device, dtype), theirs.to(device, dtype)


@pytest.mark.parametrize(("name", "args", "options"), BLOCKS, ids=str)
def test_residual_blocks(name, args, options, torchvision, device):
    """Output, gradients and buffers of both modes; one kernel a convolution in eval."""
    ours, theirs = blocks(torchvision, name, args, options, device)
    assert list(ours._modules) == list(theirs._modules)
    x = normal(2, args[0], 6, 5).to(device)
    convolutions = sum(isinstance(m, nn.Conv2d) for m in ours.modules())
    for training in (True, False):
        mine = outcome(ours.train(training), x)
        assert_close(mine, outcome(theirs.train(training), x))
        assert_served_by_kernels(mine.trace)
        assert_same_buffers(ours, theirs)
        with torch.no_grad(), cnnfast.trace() as trace:
            ours(x)
        theirs.load_state_dict(ours.state_dict())
        assert trace.launches == (TRAINING if training else EVAL) * convolutions


@pytest.mark.parametrize("watched", ["bn1", "conv2", "relu", "downsample", "downsample.1"])
def test_hooks_within_a_block(watched, torchvision, device):
    """What a hook sees, and that the rest is still fused."""
    made = blocks(torchvision, *BLOCKS[1], device)
    x, seen = normal(*X).to(device), ([], [])
    with torch.no_grad(), cnnfast.trace() as trace:
        results = []
        for module, outputs in zip(made, seen, strict=True):
            module.eval().get_submodule(watched).register_forward_hook(
                lambda m, args, out, outputs=outputs: outputs.append(out.clone())
            )
            results.append(module(x))
    torch.testing.assert_close(*results, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(*seen, rtol=1e-11, atol=1e-11)
    assert len(seen[0]) == (2 if watched == "relu" else 1)
    assert [c.operation for c in trace].count("conv_bn_act") == (1 if watched == "relu" else 2)


def test_blocks_with_other_members(torchvision, device):
    """Another norm, a shortcut that is more than a convolution and a norm, another activation put in the place
    of relu.
    """
    frozen = torchvision.ops.FrozenBatchNorm2d
    for norm in (frozen, functools.partial(nn.GroupNorm, 2), nn.SyncBatchNorm):
        ours, theirs = (m.eval() for m in blocks(torchvision, *BLOCKS[1], device, norm=norm))
        x = normal(*X).to(device)
        with torch.no_grad(), cnnfast.trace() as trace:
            y = ours(x)
        torch.testing.assert_close(y, theirs(x).detach(), rtol=1e-11, atol=1e-11)
        assert ([c.operation for c in trace] == ["conv_bn_act"] * 3) == (norm is frozen or norm is nn.SyncBatchNorm)
    ours, theirs = (m.eval() for m in blocks(torchvision, *BLOCKS[1], device))
    for block in (ours, theirs):
        block.relu = nn.SiLU()
        block.downsample = nn.Sequential(nn.AvgPool2d(2, ceil_mode=True), nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6)).to(
            device, torch.float64
        )
    ours.load_state_dict(randomise(theirs).state_dict())
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-11, atol=1e-11)


def test_blocks_under_autocast(torchvision, device):
    """A float32 input: torchvision adds it to the 16-bit output in place, which stays 16-bit."""
    ours, theirs = blocks(torchvision, *BLOCKS[0], device, torch.float32)
    x = normal(*X, dtype=torch.float32).to(device)
    with torch.autocast(device.type, torch.bfloat16):
        results = [m.eval()(x) for m in (ours, theirs)]
    assert {y.dtype for y in results} == {torch.bfloat16}
    torch.testing.assert_close(*results, rtol=0.05, atol=0.1)


def test_block_errors():
    with pytest.raises(ValueError, match="groups=2"):
        cnn.BasicBlock(4, 4, groups=2)
    with pytest.raises(NotImplementedError, match="dilation=2"):
        cnn.BasicBlock(4, 4, dilation=2)
