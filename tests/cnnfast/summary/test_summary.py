"""Layers of a model: parameters and FLOPs counted by hand, receptive fields measured, and the model left alone."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.flop_counter import FlopCounterMode

import cnnfast
from cnnfast.models import resnet18, resnet50
from cnnfast.summary import Layer, attempt, layers, summarize
from tests.support.packages import package


def meta(build: Callable[..., nn.Module], *arguments: Any) -> nn.Module:
    """Built without memory, and without drawing weights."""
    with torch.device("meta"):
        return build(*arguments)


def image(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta")


def named(found: list[Layer]) -> dict[str, Layer]:
    return {layer.name: layer for layer in found}


# ----------------------------------------------------------------------------------------------------------------------
# Counted by hand


def lenet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2), nn.Tanh(), nn.AvgPool2d(2), nn.Conv2d(6, 16, 5), nn.Tanh(), nn.AvgPool2d(2),
        nn.Flatten(), nn.Linear(400, 120), nn.Tanh(), nn.Linear(120, 84), nn.Tanh(), nn.Linear(84, 10),
    )  # fmt: skip


def test_lenet():
    found = summarize(lenet(), torch.zeros(1, 1, 28, 28))
    facts = [(x.kind, x.output_shape[1:], x.parameters, x.flops, x.receptive_field, x.jump) for x in found.layers]
    assert facts == [
        ("conv", (6, 28, 28), 156, 235_200, 5, 1),
        ("activation", (6, 28, 28), 0, 0, 5, 1),
        ("pool", (6, 14, 14), 0, 0, 6, 2),
        ("conv", (16, 10, 10), 2_416, 480_000, 14, 2),
        ("activation", (16, 10, 10), 0, 0, 14, 2),
        ("pool", (16, 5, 5), 0, 0, 16, 4),
        ("linear", (120,), 48_120, 96_000, None, None),
        ("activation", (120,), 0, 0, None, None),
        ("linear", (84,), 10_164, 20_160, None, None),
        ("activation", (84,), 0, 0, None, None),
        ("linear", (10,), 850, 1_680, None, None),
    ]
    assert (found.parameters, found.trainable, found.unused, found.flops, found.macs) == (
        61_706,
        61_706,
        0,
        833_040,
        416_520,
    )
    values = 2 * 6 * 28 * 28 + 6 * 14 * 14 + 2 * 16 * 10 * 10 + 16 * 5 * 5 + 2 * 120 + 2 * 84 + 10
    assert found.output_bytes == 4 * values
    assert found.layers[0].input_shape == (1, 1, 28, 28)
    assert {x.dtype for x in found.layers} == {"float32"}


def test_the_textbook_convolution():
    """A 3x3 convolution from 64 to 128 channels: (3 * 3 * 64 + 1) * 128."""
    (layer,) = layers(nn.Conv2d(64, 128, 3, padding=1), image(1, 64, 32, 32))
    assert layer.parameters == 73_856
    assert layer.flops == 2 * 32 * 32 * 128 * 64 * 9
    assert layer.name == ""
    assert layer.class_name == "Conv2d"


def vgg16() -> nn.Module:
    modules: list[nn.Module] = []
    channels = 3
    for width, count in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(count):
            modules += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True)]
            channels = width
        modules.append(nn.MaxPool2d(2))
    classifier = [
        nn.AdaptiveAvgPool2d(7),
        nn.Flatten(),
        nn.Linear(25088, 4096),
        nn.Linear(4096, 4096),
        nn.Linear(4096, 1000),
    ]
    return nn.Sequential(*modules, *classifier)


def test_vgg16():
    found = summarize(meta(vgg16), image(1, 3, 224, 224))
    assert found.parameters == 138_357_544
    pools = [(x.receptive_field, x.jump) for x in found.layers if x.kind == "pool"]
    assert pools == [(6, 2), (16, 4), (44, 8), (100, 16), (212, 32), (212, 32)], "the last, 7 to 7, does nothing"
    assert [x.receptive_field for x in found.layers if x.kind == "linear"] == [None] * 3
    assert round(found.macs / 1e9, 2) == 15.47


def test_resnet50():
    found = summarize(meta(resnet50), image(1, 3, 224, 224))
    assert (found.parameters, found.unused, found.flops, found.macs) == (25_557_032, 0, 8_178_368_512, 4_089_184_256)
    by_name = named(found.layers)
    assert (by_name["layer4.2.conv3"].receptive_field, by_name["layer4.2.conv3"].jump) == (427, 32)
    assert by_name["conv1"].parameters == 9_408
    assert by_name["fc"].receptive_field is None


def test_resnet50_with_the_stride_in_the_first_convolution():
    """As first published, with the well-known 483."""
    model = meta(resnet50)
    for block in (model.layer2[0], model.layer3[0], model.layer4[0]):
        block.conv1.stride, block.conv2.stride = block.conv2.stride, block.conv1.stride
    assert max(x.receptive_field or 0 for x in layers(model, image(1, 3, 224, 224))) == 483


@pytest.mark.parametrize(("size", "batch"), [(32, 1), (97, 3)])
def test_flops_are_those_of_torchs_own_counter(size, batch):
    model = meta(resnet18).eval()
    x = image(batch, 3, size, size)
    with FlopCounterMode(display=False) as counter:
        model(x)
    found = summarize(model, x)
    assert found.flops == counter.get_total_flops() == sum(layer.flops for layer in found.layers)


@pytest.mark.parametrize(
    ("module", "size", "parameters", "flops"),
    [
        (nn.Conv2d(8, 12, 3, stride=2, groups=4, bias=False), (2, 8, 9, 7), 12 * 2 * 9, 2 * 2 * 4 * 3 * 12 * 2 * 9),
        (nn.Conv2d(8, 8, 3, dilation=2, groups=8), (1, 8, 9, 9), 80, 2 * 25 * 8 * 9),
        (nn.Conv1d(4, 6, 5), (3, 4, 10), 126, 2 * 3 * 6 * 6 * 4 * 5),
        (nn.Conv3d(2, 3, (1, 3, 3)), (1, 2, 4, 5, 5), 57, 2 * 4 * 9 * 3 * 2 * 9),
        (nn.ConvTranspose2d(4, 6, 2, 2), (1, 4, 5, 5), 102, 2 * 25 * 4 * 6 * 4),
        (nn.Linear(7, 5, bias=False), (2, 3, 7), 35, 2 * 2 * 3 * 7 * 5),
        (nn.BatchNorm2d(6), (1, 6, 4, 4), 12, 0),
        (nn.PReLU(6), (1, 6, 4, 4), 6, 0),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_parameters_and_flops_of_one_layer(module, size, parameters, flops):
    (layer,) = layers(module, torch.zeros(size))
    assert (layer.parameters, layer.flops) == (parameters, flops)
    assert layer.output_shape == module(torch.zeros(size)).shape


# ----------------------------------------------------------------------------------------------------------------------
# Receptive fields, measured


class Block(nn.Module):
    """Branches that meet, dilated on one side."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Sequential(nn.Conv2d(2, 2, 3, padding=3, dilation=3), nn.BatchNorm2d(2), nn.ReLU())
        self.right = nn.Conv2d(2, 2, 5, padding=2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.left(x) + x, self.right(x)], 1)


class Unet(nn.Module):
    def __init__(self, up: nn.Module) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.MaxPool2d(2), nn.Conv2d(2, 2, 3, padding=1), up)
        self.last = nn.Conv2d(4, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.cat([self.inner(x), x], 1))


class Apply(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def space_to_depth(x: Tensor) -> Tensor:
    N, C, H, W = x.shape
    return x.view(N, C, H // 2, 2, W // 2, 2).permute(0, 3, 5, 1, 2, 4).reshape(N, 4 * C, H // 2, W // 2)


def tokens(x: Tensor) -> Tensor:
    """To [N, HW, C] and back, as networks with layer norm do it."""
    C, H, W = x.shape[1:]
    return F.layer_norm(x.flatten(2).transpose(1, 2), (C,)).transpose(1, 2).unflatten(2, (H, W))


def windows(x: Tensor) -> Tensor:
    """Cut into windows of 4x4 and put together again, as networks with local attention do it."""
    N, C, H, W = x.shape
    cut = x.view(N, C, H // 4, 4, W // 4, 4).permute(0, 2, 4, 3, 5, 1).reshape(-1, 16, C)
    return cut.view(N, H // 4, W // 4, 4, 4, C).permute(0, 5, 1, 3, 2, 4).reshape(N, C, H, W)


def focus(x: Tensor) -> Tensor:
    return torch.cat([x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]], 1)


NETWORKS = {
    "strides": nn.Sequential(
        nn.Conv2d(2, 2, 3, 2), nn.Conv2d(2, 2, 5, 1, 2), nn.Conv2d(2, 2, 2, 3), nn.Conv2d(2, 2, 3)
    ),
    "even": nn.Sequential(nn.Conv2d(2, 2, 4, padding="same"), nn.Conv2d(2, 2, 2, padding="same"), nn.AvgPool2d(3, 2)),
    "dilated": nn.Sequential(
        nn.Conv2d(2, 2, 3, dilation=2), nn.MaxPool2d(2, dilation=2), nn.Conv2d(2, 2, 3, dilation=3)
    ),
    "one row": nn.Sequential(nn.Conv2d(2, 2, (1, 7)), nn.Conv2d(2, 2, (5, 1)), nn.MaxPool2d((1, 2))),
    "depthwise": nn.Sequential(
        nn.Conv2d(2, 2, 7, groups=2, padding=3), nn.Conv2d(2, 8, 1), nn.GELU(), nn.Conv2d(8, 2, 1)
    ),
    "branches": nn.Sequential(nn.Conv2d(2, 2, 3, 2), Block(), nn.AvgPool2d(2)),
    "padding": nn.Sequential(nn.ReflectionPad2d(2), nn.Conv2d(2, 2, 5), nn.ZeroPad2d((0, 1, 0, 1)), nn.MaxPool2d(3, 2)),
    "space to depth": nn.Sequential(Apply(space_to_depth), nn.Conv2d(8, 2, 3, padding=1)),
    "pixel unshuffle": nn.Sequential(nn.PixelUnshuffle(4), nn.Conv2d(32, 2, 3, padding=1)),
    "focus": nn.Sequential(Apply(focus), nn.Conv2d(8, 2, 3, padding=1)),
    "windows": nn.Sequential(Apply(windows), nn.Conv2d(2, 2, 3, padding=1)),
    "halves": nn.Sequential(Apply(lambda x: torch.cat(x.chunk(2, 2), 1)), nn.Conv2d(4, 2, 3, padding=1)),
    "tokens": nn.Sequential(nn.Conv2d(2, 2, 4, 4), Apply(tokens), nn.Conv2d(2, 2, 3, padding=1)),
    "channels last": nn.Sequential(
        Apply(lambda x: x.permute(0, 2, 3, 1)), nn.Linear(2, 3), Apply(lambda x: x.permute(0, 3, 1, 2)), nn.MaxPool2d(3)
    ),
    "adaptive": nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.AdaptiveAvgPool2d(8)),
    "chunks": nn.Sequential(
        nn.Conv2d(2, 4, 3), Apply(lambda x: torch.stack(x.chunk(2, 1)).sum(0) * x.unbind(1)[0][:, None])
    ),
}
UPSAMPLING = {
    "transposed": nn.ConvTranspose2d(2, 2, 2, 2),
    "transposed, overlapping": nn.ConvTranspose2d(2, 2, 4, 2, 1),
    "nearest": nn.Upsample(scale_factor=2),
    "bilinear": nn.Upsample(scale_factor=2, mode="bilinear"),
    "bicubic": nn.Upsample(scale_factor=2, mode="bicubic"),
    "pixel shuffle": nn.Sequential(nn.Conv2d(2, 8, 1), nn.PixelShuffle(2)),
}


def rows_seen(model: nn.Module, size: int = 64) -> Tensor:
    """[P, H]: whether row h of the input reaches row p of the output, by a NaN in it."""
    model = copy.deepcopy(model).eval()
    x = torch.rand(1, 2, size, size).repeat(size, 1, 1, 1)
    x[torch.arange(size), :, torch.arange(size)] = float("nan")
    return model(x).isnan().any(3).any(1).T


def last(found: list[Layer]) -> Layer:
    return found[-1]


@pytest.mark.parametrize("name", NETWORKS)
def test_receptive_fields_are_those_that_a_nan_shows(name):
    seen = rows_seen(NETWORKS[name])
    layer = last(layers(nn.Sequential(NETWORKS[name], nn.Identity(), nn.ReLU()), image(1, 2, 64, 64)))
    middle = len(seen) // 2
    rows, below = (seen[p].nonzero().flatten() for p in (middle, middle - 1))
    assert layer.receptive_field == rows[-1] - rows[0] + 1
    assert layer.jump == rows[0] - below[0]


@pytest.mark.parametrize("name", UPSAMPLING)
def test_receptive_fields_after_upsampling(name):
    """Which differ from row to row: the largest counts. It is reached, or passed by the fraction of a step where two
    phases are joined.
    """
    seen = rows_seen(Unet(UPSAMPLING[name]))
    largest = max(int(row.nonzero().max() - row.nonzero().min()) + 1 for row in seen[24:40])
    layer = last(layers(Unet(UPSAMPLING[name]), image(1, 2, 64, 64)))
    assert largest <= layer.receptive_field <= largest + 1
    assert layer.jump == 1


def test_a_gradient_shows_the_same():
    model = NETWORKS["strides"]
    x = torch.rand(1, 2, 64, 64, requires_grad=True)
    y = model(x)
    y[0, :, y.shape[2] // 2].sum().backward()
    rows = x.grad.abs().sum((0, 1, 3)).nonzero().flatten()
    assert last(layers(model, x)).receptive_field == rows[-1] - rows[0] + 1


class Gate(nn.Module):
    """Squeeze and excitation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3, padding=1)
        self.gate = nn.Conv2d(2, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return x * self.gate(x.mean((2, 3), keepdim=True)).sigmoid()


@pytest.mark.parametrize(
    ("module", "field", "jump"),
    [
        (nn.AdaptiveAvgPool2d(1), None, None),
        (nn.AdaptiveMaxPool2d(1), None, None),
        (nn.Sequential(nn.Flatten(), nn.Linear(512, 3)), None, None),
        (nn.Sequential(Gate(), nn.ReLU()), None, 1),
        (nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), Apply(lambda x: torch.fft.fft2(x).real), nn.ReLU()), None, None),
        (nn.Sequential(nn.GroupNorm(1, 2), nn.ReLU()), 1, 1),
        (nn.Sequential(Apply(lambda x: torch.ones_like(x)), nn.ReLU()), 1, 1),
        (nn.Sequential(Apply(lambda x: torch.ones(1, 2, 4, 4)), nn.ReLU()), 0, None),
        (
            nn.Sequential(
                Apply(lambda x: x.flatten(2).transpose(1, 2)),
                nn.TransformerEncoderLayer(2, 1, 4, batch_first=True),
                nn.ReLU(),
            ),
            None,
            1,
        ),
    ],
)
def test_what_sees_everything_and_what_does_not(module, field, jump):
    layer = last(layers(module, image(1, 2, 16, 16)))
    assert (layer.receptive_field, layer.jump) == (field, jump)


def test_sequences_and_volumes():
    assert last(layers(nn.Conv1d(2, 2, 5, 3), torch.zeros(1, 2, 32))).receptive_field == 5
    video = last(layers(nn.Conv3d(2, 2, (9, 3, 5), (4, 2, 1)), torch.zeros(1, 2, 16, 16, 16)))
    assert (video.receptive_field, video.jump) == (3, 2), "along the height"


# ----------------------------------------------------------------------------------------------------------------------
# Models of every kind


class Shared(nn.Module):
    """A module called twice, a weight in two modules, one that only its parent reads, one that is never read, and one
    frozen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.twice = nn.Conv2d(3, 3, 1)
        self.tied = nn.Conv2d(3, 3, 1, bias=False)
        self.tied.weight = self.twice.weight
        self.read = nn.Linear(3, 5)
        self.aside = nn.Linear(7, 7)
        self.frozen = nn.BatchNorm2d(3).requires_grad_(False)
        self.gain = nn.Parameter(torch.ones(3, 1, 1))

    def forward(self, x: Tensor) -> dict[str, Any]:
        x = self.frozen(self.tied(self.twice(self.twice(x)))) * self.gain
        return {"scores": [F.linear(x.mean((2, 3)), self.read.weight, self.read.bias)], "name": "shared"}


def test_parameters_are_counted_once():
    found = summarize(Shared(), image(2, 3, 4, 4))
    assert [(x.name, x.parameters, x.trainable) for x in found.layers] == [
        ("", 3 + 20, True),
        ("twice", 12, True),
        ("twice", 0, True),
        ("tied", 0, True),
        ("frozen", 6, False),
    ]
    assert (found.parameters, found.trainable, found.unused) == (3 + 20 + 12 + 6 + 56, 3 + 20 + 12 + 56, 56)
    assert sum(x.parameters for x in found.layers) == found.parameters - found.unused
    root = found.layers[0]
    assert (root.kind, root.flops, root.output_shape) == ("other", 2 * 2 * 3 * 5, (2, 5))


def test_what_lies_in_the_memory_of_an_input_takes_none():
    found = layers(nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(inplace=True), nn.ReLU()), image(1, 1, 4, 4))
    assert [x.output_bytes for x in found] == [128, 0, 128]


def test_attention_is_counted_whole():
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    found = summarize(model, torch.zeros(2, 5, 8))
    assert found.unused == 0
    attention = named(found.layers)["self_attn"]
    assert attention.kind == "attention"
    assert attention.parameters == 4 * 8 * 8 + 4 * 8
    assert attention.flops == 2 * 2 * 5 * (4 * 8 * 8) + 2 * 2 * 2 * (5 * 5 * 8)
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize("size", [32, 64])
def test_converted_models_show_the_same_layers(size):
    model = resnet18()
    assert layers(cnnfast.convert(model), image(1, 3, size, size)) == layers(model, image(1, 3, size, size))


def test_weight_norm_and_pruning_are_part_of_the_model():
    model = nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3)),
        prune.l1_unstructured(nn.Conv2d(4, 4, 3), "weight", 0.5),
    )
    found = summarize(model, torch.zeros(1, 3, 8, 8))
    assert found.unused == 0
    assert found.flops == 2 * 36 * 4 * 27 + 2 * 16 * 4 * 36


class Branching(nn.Module):
    """Cannot run without values."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) if x.sum().item() == 0 else x.nonexistent


def test_a_model_that_needs_values_runs_on_a_copy():
    model = Branching()
    assert last(layers(model, torch.zeros(1, 3, 5, 5))).output_shape == (1, 4, 3, 3)
    assert attempt(model, torch.zeros(1, 3, 5, 5)) is None
    with pytest.raises(RuntimeError, match=r"Branching does not run on 1x3x5x5: .*item"):
        layers(model, image(1, 3, 5, 5))


def test_lazy_modules_are_not_initialised():
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.ReLU())
    assert layers(model, torch.zeros(1, 3, 5, 5))[0].parameters == 112
    assert isinstance(model[0], nn.LazyConv2d)


def test_errors_say_what_does_not_fit():
    with pytest.raises(RuntimeError, match=r"Conv2d does not run on 1x2x5x5: RuntimeError: .*channels"):
        layers(nn.Conv2d(3, 4, 3), torch.zeros(1, 2, 5, 5))


# ----------------------------------------------------------------------------------------------------------------------
# The model is left alone


def test_nothing_of_the_model_is_touched(monkeypatch):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Conv2d(4, 4, 3))
    calls: list[str] = []
    model[0].register_forward_hook(lambda module, args, output: calls.append("after"))
    model[1].register_forward_pre_hook(lambda module, args: calls.append("before"))
    hooks = [list(m._forward_hooks.items()) + list(m._forward_pre_hooks.items()) for m in model.modules()]
    before = {name: t.clone() for name, t in model.state_dict().items()}
    x = torch.rand(1, 3, 8, 8)
    states = torch.get_rng_state(), random.getstate()
    monkeypatch.setattr(Tensor, "__deepcopy__", lambda self, memo: pytest.fail("a tensor is copied"))
    monkeypatch.setattr(nn.Parameter, "__deepcopy__", lambda self, memo: pytest.fail("a parameter is copied"))
    with cnnfast.backend("kernels"):
        found = layers(model, x)
    assert len(found) == 3
    assert calls == []
    assert model.training
    assert [list(m._forward_hooks.items()) + list(m._forward_pre_hooks.items()) for m in model.modules()] == hooks
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]


def test_hooks_that_are_objects_of_the_model_run():
    """They may be part of what it computes, as pruning and old weight norm are."""

    class Doubling:
        def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
            return torch.cat([output, output], 1)

    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(8, 2, 1))
    model[0].register_forward_hook(Doubling())
    assert last(layers(model, image(1, 3, 4, 4))).output_shape == (1, 2, 4, 4)


# ----------------------------------------------------------------------------------------------------------------------
# Real models


@pytest.mark.parametrize(
    ("library", "name", "options", "size", "field"),
    [
        ("torchvision", "alexnet", {}, 224, 195),
        ("torchvision", "inception_v3", {"init_weights": False}, 299, 1311),
        ("timm", "inception_v4", {}, 299, 2071),
        ("timm", "inception_resnet_v2", {}, 299, 3039),
    ],
)
def test_published_receptive_fields(library, name, options, size, field):
    """Those of the article that receptive_field.py cites."""
    module = package(library)
    create = module.models.get_model if library == "torchvision" else module.create_model
    found = summarize(meta(lambda: create(name, **options)), image(1, 3, size, size))
    assert max(layer.receptive_field or 0 for layer in found.layers) == field
    assert sum(layer.parameters for layer in found.layers) + found.unused == found.parameters


@pytest.mark.parametrize("name", ["ResNet", "ConvNext", "Swin"])
def test_models_of_transformers(name):
    transformers = package("transformers")
    model = meta(lambda: getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")()))
    found = summarize(model, image(1, 3, 224, 224))
    with FlopCounterMode(display=False) as counter:
        model.eval()(image(1, 3, 224, 224))
    assert found.flops == counter.get_total_flops() == sum(layer.flops for layer in found.layers)
    assert found.parameters == sum(p.numel() for p in model.parameters())
