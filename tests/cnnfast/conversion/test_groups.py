"""Steps without a norm, and steps that begin with one: convolution (> sum) > activation, norm (> sum) > activation."""

from __future__ import annotations

import copy
import functools
import importlib
import pickle
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cnnfast
from tests.support.blocks import CHANNELS, block, build, image
from tests.support.packages import package
from tests.support.steps import Mode, assert_same_steps, step
from tests.support.told import MODES, assert_reports_are_true, fused_steps

Steps = dict[str, int]  # how often each of functional's fused functions is called


def steps_of(model: nn.Module, *inputs: Tensor, mode: Mode = "no_grad") -> Steps:
    with cnnfast.trace() as trace, fused_steps(trace) as steps:
        step(model, inputs, mode)
    return dict(Counter(found.function for found in steps))


def assert_fused(model: nn.Module, *inputs: Tensor, steps: Steps, modes: tuple[Mode, ...] = MODES) -> nn.Module:
    """The converted model, in eval, after it has left in every mode what the original leaves, by these steps, and its
    reports have said so.
    """
    original, ours = copy.deepcopy(model), cnnfast.convert(model)
    assert_same_steps(ours, original, *inputs, modes=modes)
    assert_reports_are_true(ours, *inputs, modes=modes)
    for mode in modes:
        assert steps_of(ours, *inputs, mode=mode) == steps, mode
    return ours.eval()


# ----------------------------------------------------------------------------------------------------------------------
# What is a group


def conv_relu(self, x):
    return self.relu(self.conv(x))


def conv_functional(self, x):
    return F.silu(self.conv(x), inplace=True)


def conv_sum(self, x):
    return x + self.conv(x)


def conv_sum_relu(self, x):
    y = self.conv(x)
    y += x
    return F.relu(y)


def conv_method_sum(self, x):
    return self.conv(x).add(x).relu()


def conv_two_branches(self, x):
    return self.relu(self.conv(x) + self.conv2(x))


def conv_identity(self, x):
    return self.relu(self.identity(self.conv(x)))


def norm_relu(self, x):
    return self.relu(self.bn(x))


def norm_sum(self, x):
    return self.bn(x) + x


def norm_sum_relu(self, x):
    return self.relu(self.bn(x).add_(x))


def norm_of_a_result(self, x):
    return self.conv2(F.gelu(self.bn(torch.cat([x[:, :1], x[:, 1:] * 2], 1))))


def pre_activation(self, x):
    y = self.relu(self.bn(x))
    return self.conv2(self.relu(self.bn2(self.conv(y)))) + x


GROUPS = {
    conv_relu: {"conv_act": 1},
    conv_functional: {"conv_act": 1},
    conv_sum: {"conv_act": 1},
    conv_sum_relu: {"conv_act": 1},
    conv_method_sum: {"conv_act": 1},
    conv_two_branches: {"conv_act": 1},
    conv_identity: {"conv_act": 1},
    norm_relu: {"bn_act": 1},
    norm_sum: {"bn_act": 1},
    norm_sum_relu: {"bn_act": 1},
    norm_of_a_result: {"bn_act": 1},
    pre_activation: {"bn_act": 1, "conv_bn_act": 1, "conv_act": 1},
}


@pytest.mark.parametrize("forward", GROUPS)
def test_a_group(forward, quick):
    members = {"relu": functools.partial(nn.ReLU, inplace=True), "identity": nn.Identity}
    assert_fused(build(block(forward, **members), quick), image().to(quick), steps=GROUPS[forward])


ACTIVATIONS = [nn.ReLU6(True), nn.LeakyReLU(0.2), nn.GELU("tanh"), nn.SiLU(), nn.Hardswish(True)]


@pytest.mark.parametrize("act", ACTIVATIONS, ids=repr)
@pytest.mark.parametrize("forward", [conv_relu, norm_relu])
def test_each_activation(forward, act, quick):
    model = build(block(forward, relu=copy.deepcopy(act)), quick)
    assert_fused(model, image().to(quick), steps=GROUPS[forward], modes=("no_grad", "train"))


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_a_padding_mode(mode, quick):
    conv = functools.partial(nn.Conv2d, CHANNELS, CHANNELS, 3, padding=1, padding_mode=mode)
    assert_fused(build(block(conv_sum_relu, conv=conv), quick), image().to(quick), steps={"conv_act": 1})


# ----------------------------------------------------------------------------------------------------------------------
# What is none


def conv_used_twice(self, x):
    y = self.conv(x)
    return self.relu(y) + y


def conv_written_elsewhere(self, x):
    """The activation writes into what is read again."""
    y = self.conv(x)
    z = self.relu(y)
    return y * z


def norm_written_elsewhere(self, x):
    y = self.bn(x)
    z = self.relu(y)
    return y * z


def norm_read_before(self, x):
    y = self.bn(x)
    z = y * 2
    return self.relu(y) + z


def sum_into_the_other(self, x):
    z = x * 1
    z += self.conv(x)
    return z


def identity_written(self, x):
    """The activation in place writes into the argument itself."""
    return self.relu(self.identity(x)) + x


def argument_written_between(self, x):
    y = self.bn(x)
    x += 1
    return self.relu(y) + x


def statistics_used_between(self, x):
    y = self.bn(x)
    z = self.bn(x * 2)
    return self.relu(y) + z


@pytest.mark.parametrize(
    ("forward", "steps"),
    [
        (conv_used_twice, {}),
        (conv_written_elsewhere, {}),
        (norm_written_elsewhere, {}),
        (norm_read_before, {}),
        (sum_into_the_other, {}),
        (identity_written, {}),
        (statistics_used_between, {"bn_act": 1}),  # the second one's with the sum
    ],
)
def test_no_group(forward, steps, quick):
    members = {"relu": functools.partial(nn.ReLU, inplace=True), "identity": nn.Identity}
    assert_fused(build(block(forward, **members), quick), image().to(quick), steps=steps)


def test_the_argument_is_written_between(quick):
    model = build(block(argument_written_between), quick)
    assert_fused(model, image().to(quick), steps={}, modes=("no_grad",))


HOOKS = ("register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook")


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize(("forward", "member"), [(conv_relu, "conv"), (norm_relu, "bn"), (conv_relu, "relu")])
def test_a_hook(forward, member, hook, quick):
    model = build(block(forward), quick)
    ours = assert_fused(model, image().to(quick), steps=GROUPS[forward])
    calls = []
    handle = getattr(getattr(ours, member), hook)(lambda *call: calls.append(member))
    assert steps_of(ours, image().to(quick), mode="eval") == {}
    assert calls == [member]
    handle.remove()
    assert steps_of(ours, image().to(quick), mode="eval") == GROUPS[forward]


def test_a_member_that_is_replaced(quick):
    """A container is traced anew; a child that is replaced in a nested one stops the step."""

    def forward(self, x):
        return self.parts.act(self.parts.conv(x))

    parts = nn.ModuleDict({"conv": nn.Conv2d(CHANNELS, CHANNELS, 3), "act": nn.ReLU()})
    ours = assert_fused(build(block(forward, parts=parts), quick), image().to(quick), steps={"conv_act": 1})
    ours.parts["act"] = nn.Sigmoid()
    x = image().to(quick)
    assert steps_of(ours, x) == {}
    assert torch.equal(ours(x), torch.sigmoid(ours.parts["conv"](x)))


# ----------------------------------------------------------------------------------------------------------------------
# Inputs that a fused step does not take


@pytest.mark.parametrize("forward", [conv_relu, conv_sum_relu, norm_relu, norm_sum_relu, pre_activation])
@pytest.mark.parametrize(
    "size", [(CHANNELS, 5, 5), (2, CHANNELS), (2, CHANNELS, 5, 5, 1), (2, 3, 5, 5), (0, CHANNELS, 5, 5)]
)
def test_unusual_sizes(forward, size, quick):
    """The same results, unbatched, and errors of the same type."""
    model, x = build(block(forward), quick), torch.ones(size, dtype=torch.float64, device=quick)
    assert_same_steps(cnnfast.convert(model), copy.deepcopy(model), x, may_raise=True)


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.BatchNorm3d])
def test_a_norm_of_other_dimensions(kind, quick):
    """PyTorch refuses an image, and so do we, before a batch is counted."""

    def forward(self, x):
        return self.relu(self.bn(self.conv(x)))

    model, x = build(block(forward, bn=functools.partial(kind, CHANNELS)), quick), image().to(quick)
    assert_same_steps(cnnfast.convert(model), copy.deepcopy(model), x, may_raise=True)
    with pytest.raises(ValueError, match="expected"):
        cnnfast.convert(model)(x)


@pytest.mark.parametrize("forward", [conv_sum_relu, norm_sum_relu, conv_sum, norm_sum])
@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
def test_autocast(forward, half, quick):
    """dtypes are those of the modules called one after the other, also of a sum in place."""
    model = build(block(forward), quick).float()
    x = image().to(quick, torch.bfloat16 if half else torch.float32)
    within = functools.partial(torch.autocast, quick.type, torch.bfloat16)
    original, ours = copy.deepcopy(model), cnnfast.convert(model)
    tolerance = 1e-5 if forward in (norm_sum_relu, norm_sum) and not half else 0.02  # a norm is not cast
    traces = assert_same_steps(ours, original, x, within=within, tolerance=tolerance)
    assert all(traces.values())
    with within():
        assert steps_of(ours, x) == GROUPS[forward]


def test_a_number_is_added(quick):
    def forward(self, x):
        y = self.conv(x)
        y += x.size(0)
        return self.relu(y)

    assert_fused(build(block(forward), quick), image().to(quick), steps={"conv_act": 1})


def test_a_residual_of_another_size(quick):
    def forward(self, x, r):
        return self.relu(self.conv(x) + r), self.relu(self.bn(x) + r)

    x, r = image().to(quick), image(1).to(quick)
    assert_fused(build(block(forward), quick), x, r, steps={"conv_act": 1, "bn_act": 1})


# ----------------------------------------------------------------------------------------------------------------------
# Other layers


class Volume(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Conv3d(CHANNELS, 6, 3, padding=1), nn.BatchNorm3d(6), nn.ReLU(True), nn.Conv3d(6, 2, 1))


class Head(nn.Sequential):
    """A perceptron on features, as contrastive methods project them."""

    def __init__(self) -> None:
        layers = [nn.Linear(CHANNELS, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 6), nn.BatchNorm1d(6)]
        super().__init__(nn.AdaptiveAvgPool2d(1), nn.Flatten(), *layers)


class Wave(nn.Sequential):
    def __init__(self, **options) -> None:
        first = nn.Conv1d(CHANNELS, 6, 5, padding=2, **options)
        super().__init__(first, nn.BatchNorm1d(6), nn.ReLU(), nn.Conv1d(6, 6, 3, 2), nn.LeakyReLU(0.1))


def signal(quick):
    return torch.randn(3, CHANNELS, 11, dtype=torch.float64, device=quick)


@pytest.mark.parametrize(
    "options", [{}, {"stride": 3}, {"padding_mode": "reflect"}, {"groups": 2, "dilation": 2}], ids=str
)
def test_one_axis(options, quick):
    """Conv1d, norm and activation are one step, and so are Conv1d and activation."""
    model = build(lambda: Wave(**options), quick)
    ours = assert_fused(model, signal(quick), steps={"conv_bn_act": 1, "conv_act": 1})
    assert_same_steps(ours, copy.deepcopy(model), signal(quick)[0], may_raise=True)
    assert_same_steps(ours, copy.deepcopy(model), signal(quick).mT.contiguous().mT)


def test_one_axis_with_a_residual(quick):
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv1d(CHANNELS, CHANNELS, 3, padding="same"), nn.BatchNorm1d(CHANNELS)

        def forward(self, x):
            return F.relu(self.bn(self.conv(x)) + x) + x.mean(2, keepdim=True)

    assert_fused(build(Residual, quick), signal(quick), steps={"conv_bn_act": 1})


def test_three_axes(quick):
    x = torch.randn(2, CHANNELS, 3, 4, 5, dtype=torch.float64, device=quick)
    ours = assert_fused(build(Volume, quick), x, steps={"bn_act": 1})
    assert isinstance(ours[1], cnnfast.nn.BatchNorm3d)
    assert type(cnnfast.revert(ours)[1]) is nn.BatchNorm3d
    assert_same_steps(cnnfast.convert(build(Volume, quick)), build(Volume, quick), x[:, :, 0], may_raise=True)


def test_two_axes_of_features(quick):
    x = torch.randn(5, CHANNELS, 3, 3, dtype=torch.float64, device=quick)
    ours = assert_fused(build(Head, quick), x, steps={"bn_act": 1})
    assert isinstance(ours[6], cnnfast.nn.BatchNorm1d)
    row = next(row for row in cnnfast.report(ours, x).rows if row.name == "6")
    assert row.status == "replaced"
    assert type(cnnfast.revert(ours)[6]) is nn.BatchNorm1d


def generator() -> nn.Module:
    """DCGAN's (Radford, Metz, Chintala 2015), small."""
    layers: list[nn.Module] = []
    for before, after in ((7, 8), (8, 4)):
        layers += [nn.ConvTranspose2d(before, after, 4, 2, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU(True)]
    return nn.Sequential(*layers, nn.ConvTranspose2d(4, 3, 4, 2, 1), nn.Tanh())


class DenseBlock(nn.Module):
    """ESRGAN's (Wang and others 2018)."""

    def __init__(self, channels: int = CHANNELS, growth: int = 3) -> None:
        super().__init__()
        for i in range(4):
            setattr(self, f"conv{i + 1}", nn.Conv2d(channels + i * growth, growth, 3, 1, 1))
        self.conv5 = nn.Conv2d(channels + 4 * growth, channels, 3, 1, 1)
        self.lrelu = nn.LeakyReLU(0.2, True)

    def forward(self, x):
        x1 = self.lrelu(self.conv1(x))
        x2 = self.lrelu(self.conv2(torch.cat((x, x1), 1)))
        x3 = self.lrelu(self.conv3(torch.cat((x, x1, x2), 1)))
        x4 = self.lrelu(self.conv4(torch.cat((x, x1, x2, x3), 1)))
        x5 = self.conv5(torch.cat((x, x1, x2, x3, x4), 1))
        return x5 * 0.2 + x


@pytest.mark.parametrize(
    ("make", "size", "steps"),
    [
        (generator, (2, 7, 1, 1), {"bn_act": 2}),
        (DenseBlock, (2, CHANNELS, 5, 5), {"conv_act": 4}),
    ],
    ids=["generator", "dense_block"],
)
def test_a_network(make, size, steps, quick):
    x = torch.randn(size, dtype=torch.float64, device=quick)
    assert_fused(build(make, quick), x, steps=steps)


# ----------------------------------------------------------------------------------------------------------------------
# Networks of libraries


def fused_rows(model: nn.Module, x: Tensor, kind: type) -> tuple[int, int]:
    """(how many modules of a class are fused, how many there are), by the report."""
    report = cnnfast.report(cnnfast.convert(model), x)
    rows = [row for row in report.rows if issubclass(kind, nn.Module) and row.kind == kind.__name__]
    return sum(row.status == "fused" for row in rows), len(rows)


@pytest.fixture
def timm():
    package("torchvision")
    return package("timm")


IMAGE = torch.empty(1, 3, 64, 64, device="meta")


@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
def test_vgg16_fuses_13_of_13(training, quick, torchvision):
    with torch.device("meta"):
        model = torchvision.models.vgg16().train(training)
    assert fused_rows(model, IMAGE, nn.Conv2d) == (13, 13)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
def test_densenet121_fuses_120_norms_with_their_activation(training, quick, torchvision):
    """Of 121: norm5 ends the features, and its ReLU stands in another forward."""
    with torch.device("meta"):
        model = torchvision.models.densenet121().train(training)
    assert fused_rows(model, torch.empty(2, 3, 64, 64, device="meta"), nn.BatchNorm2d) == (120, 121)


def test_timms_densenet_and_preactivation(quick, timm):
    with torch.device("meta"):
        models = [timm.create_model(name).eval() for name in ("densenet121", "resnetv2_50")]
    for model in models:
        report = cnnfast.report(cnnfast.convert(model), IMAGE)
        rows = [row for row in report.rows if row.kind == "BatchNormAct2d"]
        assert rows
        assert {row.status for row in rows} == {"fused"}


def test_repvgg_in_its_deploy_form(quick, timm):
    from timm.utils import reparameterize_model

    model = reparameterize_model(timm.create_model("repvgg_a0", num_classes=3).eval(), inplace=True)
    convolutions = sum(isinstance(m, nn.Conv2d) for m in model.modules())
    assert convolutions == 22
    assert fused_rows(model, IMAGE, nn.Conv2d) == (22, 22)


@pytest.mark.parametrize("name", ["byobnet.RepVggBlock", "byobnet.MobileOneBlock", "fastvit.MobileOneBlock"])
def test_a_block_is_reparametrised_after_the_conversion(name, quick, timm):
    """What was branches becomes one convolution. It is PyTorch's until the model is converted again."""
    module, _, kind = name.partition(".")
    make = getattr(importlib.import_module(f"timm.models.{module}"), kind)
    model = build(lambda: nn.Sequential(make(CHANNELS, CHANNELS, 3), make(CHANNELS, 6, 3)), quick)
    original, ours, x = copy.deepcopy(model), cnnfast.convert(model), image().to(quick)
    assert_same_steps(ours, original, x)
    for part in (*original, *ours):
        part.reparameterize()
    assert_same_steps(ours, original, x, modes=("no_grad", "eval"))
    assert steps_of(ours, x) == {}
    ours = cnnfast.convert(ours)
    assert_same_steps(ours, original, x, modes=("no_grad", "eval"))
    assert steps_of(ours, x) == {"conv_act": 2}


# ----------------------------------------------------------------------------------------------------------------------
# Activations with a parameter, and those of timm


class Residual(nn.Module):
    """SRGAN's (Ledig and others 2017): PReLU between the norms, a sum at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(CHANNELS, CHANNELS, 3, 1, 1, bias=False) for _ in range(2))
        self.bn1, self.bn2 = nn.BatchNorm2d(CHANNELS), nn.BatchNorm2d(CHANNELS)
        self.prelu = nn.PReLU(CHANNELS)

    def forward(self, x):
        return self.bn2(self.conv2(self.prelu(self.bn1(self.conv1(x))))) + x


def generator_of_details() -> nn.Module:
    stem = nn.Sequential(nn.Conv2d(3, CHANNELS, 3, 1, 1), nn.PReLU())
    up = nn.Sequential(nn.Conv2d(CHANNELS, 4 * CHANNELS, 3, 1, 1), nn.PixelShuffle(2), nn.PReLU())
    return nn.Sequential(stem, Residual(), up, nn.Conv2d(CHANNELS, 3, 3, 1, 1))


def test_srgan(quick):
    """In eval PReLU is part of its step; where gradients are recorded it is PyTorch's, and its row says why."""
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64, device=quick)
    ours = assert_fused(build(generator_of_details, quick), x, steps={"conv_act": 1, "conv_bn_act": 2})

    def row(name: str) -> tuple[str, str]:
        return next((row.status, row.reason) for row in cnnfast.report(ours, x).rows if row.name == name)

    for training in (False, True):
        ours.train(training)
        status, reason = row("1.prelu")
        assert status == "left"
        assert "gradients are recorded" in reason
        assert row("1.bn1") == row("1.conv1") == ("fused", "conv1 + bn1")
        with torch.no_grad():
            for name in ("1.prelu", "1.conv1", "1.bn1"):
                assert row(name) == ("fused", "conv1 + bn1 + prelu")
            assert row("0.1") == ("fused", "Conv2d + PReLU")
    assert "2.2" not in {row.name for row in cnnfast.report(ours, x).rows}, "what follows PixelShuffle is in no group"


def test_a_frozen_prelu_is_part_of_its_step(quick):
    """Nothing is differentiated, whatever mode gradients are in."""
    model = build(Residual, quick).requires_grad_(False)
    x = image().to(quick)
    ours = cnnfast.convert(model)
    rows = {row.name: row.status for row in cnnfast.report(ours, x).rows}
    assert rows["prelu"] == "fused"
    torch.testing.assert_close(ours(x), model(x), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    "name",
    [
        *("Swish", "Mish", "HardSwish", "HardSigmoid", "GELU", "GELUTanh", "PReLU"),
        *("SwishMe", "MishMe", "HardSwishMe", "HardSigmoidMe"),
    ],
)
@pytest.mark.parametrize("forward", [conv_relu, norm_relu])
def test_timms_activations(forward, name, quick, timm):
    module = "activations_me" if name.endswith("Me") else "activations"
    make = getattr(importlib.import_module(f"timm.layers.{module}"), name)
    # PyTorch's derivative of hardsigmoid, which serves here, is off by 3e-8 in float64
    modes: tuple[Mode, ...] = ("no_grad",) if name.startswith("HardSigmoid") else MODES
    for in_place, tried in ((False, modes), (True, ("no_grad",))):  # timm's own cannot be differentiated in place
        model = build(block(forward, relu=make(inplace=in_place)), quick)
        assert_fused(model, image().to(quick), steps=GROUPS[forward], modes=tried)


@pytest.mark.parametrize("name", ["HardMish", "QuickGELU", "Sigmoid", "Tanh"])
def test_timms_other_activations(name, quick, timm):
    make = getattr(importlib.import_module("timm.layers.activations"), name)
    ours = assert_fused(build(block(conv_relu, relu=make), quick), image().to(quick), steps={})
    (row,) = [row for row in cnnfast.report(ours, image().to(quick)).rows if row.name == ""]
    assert f"self.relu ({name}) is not an activation that kernels know" in row.reason


def test_an_activation_that_changes_after_the_conversion(quick):
    """What a module's attributes say is read at each call."""
    ours = cnnfast.convert(build(block(conv_relu, relu=nn.LeakyReLU(0.1)), quick))
    x = image().to(quick)
    ours.relu.negative_slope = 0.5
    assert torch.equal(ours(x), F.leaky_relu(ours.conv(x), 0.5))
    ours = cnnfast.convert(build(block(norm_relu, relu=nn.PReLU()), quick))
    with torch.no_grad():
        ours.relu.weight.fill_(0.7)
        assert torch.equal(ours(x), F.leaky_relu(ours.bn(x), 0.7))


# ----------------------------------------------------------------------------------------------------------------------
# timm's Conv2dSame


def test_a_stem_with_tensorflows_padding(quick, timm):
    from timm.layers import BatchNormAct2d, Conv2dSame

    def stem():
        return nn.Sequential(
            *(Conv2dSame(3, 4, 3, 2, bias=False), BatchNormAct2d(4, act_layer=nn.SiLU)),
            *(Conv2dSame(4, 4, 5, 2, groups=4), nn.ReLU(), Conv2dSame(4, 2, 2)),
        )

    for size in (7, 8):
        x = torch.randn(2, 3, size, 9, dtype=torch.float64, device=quick)
        ours = assert_fused(build(stem, quick), x, steps={"conv_bn_act": 1, "conv_act": 1})
    assert isinstance(ours[0], Conv2dSame)
    statuses = {row.name: row.status for row in cnnfast.report(ours, x).rows if row.name}
    assert statuses == {"0": "fused", "1": "fused", "2": "fused", "4": "replaced"}
    assert [type(m) for m in cnnfast.revert(ours)] == [type(m) for m in stem()]
    assert_same_steps(ours[4], copy.deepcopy(cnnfast.revert(ours)[4]), image().to(quick)[0])
    with cnnfast.backend("torch"):
        torch.testing.assert_close(ours(x), cnnfast.revert(ours)(x))


def test_tf_efficientnet_fuses_all_but_the_last_of_each_squeeze(quick, timm):
    with torch.device("meta"):
        model = timm.create_model("tf_efficientnet_b0").eval()
    report = cnnfast.report(cnnfast.convert(model), IMAGE)
    left = [row for row in report.rows if row.convolution and row.status != "fused"]
    assert {(row.status, row.name.rpartition(".")[2]) for row in left} == {("replaced", "conv_expand")}
    assert len(left) == 16


# ----------------------------------------------------------------------------------------------------------------------
# More networks


def yolo(act: type[nn.Module]) -> nn.Module:
    """A CSP bottleneck, and a head without norms."""

    def step(before: int, after: int, size: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(before, after, size, 1, size // 2, bias=False), nn.BatchNorm2d(after), act())

    class Bottleneck(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cv1, self.cv2 = step(CHANNELS, 3, 1), step(3, CHANNELS, 3)

        def forward(self, x):
            return x + self.cv2(self.cv1(x))

    return nn.Sequential(step(3, CHANNELS, 3), Bottleneck(), nn.Conv2d(CHANNELS, 6, 1), act(), nn.Conv2d(6, 7, 1))


@pytest.mark.parametrize("act", [nn.SiLU, nn.Mish])
def test_a_yolo_block(act, quick):
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64, device=quick)
    assert_fused(build(lambda: yolo(act), quick), x, steps={"conv_bn_act": 3, "conv_act": 1})


def test_a_block_of_mobilenet_v3(quick, torchvision):
    """Hard swish after the norms; of the squeeze, ReLU after its first convolution and hard sigmoid after its second,
    both without a norm.
    """
    mobilenet = torchvision.models.mobilenetv3
    config = mobilenet.InvertedResidualConfig(8, 3, 16, 8, True, "HS", 1, 1, 1)
    model = build(lambda: mobilenet.InvertedResidual(config, functools.partial(nn.BatchNorm2d, eps=0.001)), quick)
    assert_fused(model, image(8).to(quick), steps={"conv_bn_act": 3, "conv_act": 2})


# ----------------------------------------------------------------------------------------------------------------------
# Copies, and what else must not change


@pytest.mark.parametrize(
    ("make", "steps"),
    [(DenseBlock, {"conv_act": 4}), (lambda: nn.Sequential(nn.BatchNorm2d(CHANNELS), nn.ReLU(True)), {"bn_act": 1})],
    ids=["convolutions", "norm"],
)
def test_copies_and_state(make, steps, quick):
    model = build(make, quick)
    keys, x = list(model.state_dict()), image().to(quick)
    ours = assert_fused(model, x, steps=steps)
    assert list(ours.state_dict()) == keys
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), cnnfast.convert(cnnfast.revert(ours))):
        assert torch.equal(twin(x), ours(x))
        assert steps_of(twin, x) == steps
    back = cnnfast.revert(ours)
    assert [type(m) for m in back.modules()] == [type(m) for m in model.modules()]
    assert steps_of(back, x) == {}
    compiled = torch.compile(ours, backend="eager", fullgraph=True)
    for training in (False, True):
        ours.train(training)
        torch.testing.assert_close(compiled(x), cnnfast.revert(copy.deepcopy(ours))(x))


@pytest.mark.parametrize("fmt", [torch.contiguous_format, torch.channels_last])
def test_memory_formats(fmt, quick):
    model = build(block(pre_activation), quick).to(memory_format=fmt)
    assert_fused(model, image().to(quick, memory_format=fmt), steps=GROUPS[pre_activation])


def test_a_graph_module(quick):
    model = torch.fx.symbolic_trace(build(block(pre_activation), quick))
    ours = cnnfast.convert(model)
    assert_same_steps(ours, copy.deepcopy(model), image().to(quick))
    assert steps_of(ours, image().to(quick)) == GROUPS[pre_activation]


def test_by_kernels(device):
    """The launches of a block before whose convolutions norms stand, and of one without any."""
    ours = cnnfast.convert(build(block(pre_activation), device)).eval()
    x = image().to(device)
    with torch.no_grad(), cnnfast.trace() as trace:
        y = ours(x)
    assert trace.launches == ["normalize_kernel", "conv_fprop_kernel", "conv_fprop_kernel"]
    with torch.no_grad():
        torch.testing.assert_close(y, cnnfast.revert(ours)(x), rtol=1e-11, atol=1e-11)
    dense = build(lambda: DenseBlock(CHANNELS, 2), device)
    assert_same_steps(cnnfast.convert(dense), copy.deepcopy(dense), x, modes=("eval",))
    with torch.no_grad(), cnnfast.trace() as trace:
        cnnfast.convert(dense)(x)
    assert trace.launches == ["conv_fprop_kernel"] * 5
