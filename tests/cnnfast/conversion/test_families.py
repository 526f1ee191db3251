"""convert on networks that nobody here wrote: the original's numbers in eval and in training, and a report that says
the truth.
"""

from __future__ import annotations

import copy
import json
from fnmatch import fnmatch

import pytest
import torch
from torch import fx, nn
from torch.nn.utils import parametrize

import cnnfast
from tests.support.model_zoo import FAMILIES, Family
from tests.support.packages import package
from tests.support.steps import Mode, assert_same_steps
from tests.support.told import assert_reports_are_true


def is_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.BatchNorm2d) or type(module).__name__ == "FrozenBatchNorm2d"


def classes(model: nn.Module) -> dict[str, type]:
    """Of each module by name; GraphModule for torch.fx's, and of a parametrized one what it was before: PyTorch makes
    each its class.
    """
    kinds = {name: parametrize.type_before_parametrizations(module) for name, module in model.named_modules()}
    return {name: fx.GraphModule if issubclass(kind, fx.GraphModule) else kind for name, kind in kinds.items()}


def convolutions_before_a_norm(model: nn.Module, x: torch.Tensor) -> set[str]:
    """Names of the convolutions of which an output goes straight into a batch norm, as the original calls them
    in eval.
    """
    names = {module: name for name, module in model.named_modules()}
    normalised: set[str] = set()
    made_by: dict[int, tuple[str, torch.Tensor]] = {}  # the tensors are kept, so that no other takes their place

    def remember(module, inputs, output):
        made_by[id(output)] = names[module], output

    def look(module, inputs):
        if id(inputs[0]) in made_by:
            normalised.add(made_by[id(inputs[0])][0])

    hooks = [m.register_forward_hook(remember) for m in model.modules() if isinstance(m, nn.Conv2d)]
    hooks += [m.register_forward_pre_hook(look) for m in model.modules() if is_norm(m)]
    with torch.no_grad():
        model.eval()(x)
    for hook in hooks:
        hook.remove()
    return normalised


# Convolutions that stand before a norm and are not fused with it. Where the norm is in another container, each is
# called by its own.
UNFUSED = {
    "torchvision-feature_pyramid": ["body.conv1"],  # torchvision's IntermediateLayerGetter loops over its children
    "torchvision-feature_pyramid_frozen_bn": ["body.conv1"],
    "timm-resnet26d": ["conv1.6"],  # the norm is in another container
    "timm-seresnext26t_32x4d": ["conv1.6"],
    "timm-resnest14d": ["conv1.6"],
    "timm-resnetaa34d": ["conv1.6"],
    "timm-coatnet_pico_rw": ["stem.conv2"],
    "timm-dpn48b": ["features.conv*"],
    "timm-skresnet18": ["layer*.fc_reduce"],  # forward asserts a size
    "timm-hrnet_w18_small": ["conv1", "conv2"],  # forward asks for types
    "timm-hrnet_w18_small_features": ["conv1", "conv2"],
    "transformers-EfficientNet": ["efficientnet.encoder.top_conv"],
    "timm-ghostnet_050": ["conv_stem"],  # forward asks whether it trains
    "transformers-MobileNetV1": ["*.convolution"],  # forward computes its padding from sizes
    "transformers-MobileNetV2": ["*.convolution"],
}


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_a_family(family, quick):
    """Keys in their order, every tensor the same object, eval and training output, gradients and buffers, and back
    again.
    """
    model, x = family.make()
    model, x = model.to(quick), x.to(quick)
    original = copy.deepcopy(model)
    keys, tensors = list(model.state_dict()), [*model.parameters(), *model.buffers()]
    kinds = classes(model)

    ours = cnnfast.convert(model)
    assert list(ours.state_dict()) == keys
    assert all(a is b for a, b in zip([*ours.parameters(), *ours.buffers()], tensors, strict=True))
    assert classes(model) == kinds
    assert list(dict(ours.named_modules())) == list(kinds)
    assert all(isinstance(module, kinds[name]) for name, module in ours.named_modules())
    traces = assert_same_steps(ours, original, x, modes=("no_grad", "train"))
    assert {call.served_by for trace in traces.values() for call in trace} <= {"kernels"}

    reports = assert_reports_are_true(ours, x, modes=("no_grad", "train"))
    report = reports["train"]
    rows = {row.name: row for row in report.rows}
    missing = {name for name, kind in kinds.items() if issubclass(kind, nn.Conv2d | nn.BatchNorm2d)} - set(rows)
    assert not missing, "covered modules without a row"
    assert all(row.reason for row in report.rows if row.status == "left")
    assert 0 <= report.coverage <= 1
    fused = {name for name, row in rows.items() if row.status == "fused" and issubclass(kinds[name], nn.Conv2d)}
    normalised = convolutions_before_a_norm(original, x)
    expected = UNFUSED.get(str(family), [])
    unfused = {name for name in normalised - fused if not any(fnmatch(name, pattern) for pattern in expected)}
    assert not unfused

    back = cnnfast.revert(ours)
    assert classes(back) == kinds
    assert_same_steps(back, original, x, modes=("no_grad",))


def test_resnet50_fuses_53_of_53(quick):
    """In ImageNet's size: 4.09 billion multiply-adds of convolutions, as everybody counts them, and 2 million of the
    classifier.
    """
    model = package("torchvision").models.resnet50()
    report = cnnfast.report(cnnfast.convert(model), torch.empty(1, 3, 224, 224))
    rows = [row for row in report.rows if row.kind == "Conv2d"]
    assert [row.status for row in rows] == ["fused"] * 53
    assert sum(row.flops for row in rows) == 2 * 4_087_136_256
    assert report.coverage == pytest.approx(4_087_136_256 / (4_087_136_256 + 2_048_000))
    assert json.loads(report.to_json())["coverage"] == report.coverage


# ----------------------------------------------------------------------------------------------------------------------
# By the kernels themselves: in the interpreter most families take minutes


def run_by_kernels(family: Family, size: tuple[int, ...], modes: tuple[Mode, ...], device: torch.device) -> None:
    model, _ = family.make()
    x = torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    model, x = model.to(device), x.to(device)
    traces = assert_same_steps(cnnfast.convert(model), copy.deepcopy(model), x, modes=modes, tolerance=1e-9)
    for trace in traces.values():
        assert {call.served_by for call in trace} == {"kernels"}


SMALL: dict[str, tuple[tuple[int, ...], tuple[Mode, ...]]] = {
    "transformers-ResNet": ((2, 3, 32, 32), ("no_grad",)),
    "torchvision-densenet": ((2, 3, 32, 32), ("no_grad",)),
    "unet": ((1, 3, 16, 16), ("no_grad", "train")),
}


@pytest.mark.parametrize("family", [family for family in FAMILIES if str(family) in SMALL], ids=str)
def test_a_small_family_by_kernels(family, device):
    run_by_kernels(family, *SMALL[str(family)], device)


@pytest.mark.slow  # on a GPU too: each has 200 to 400 kernels to compile
@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_a_family_by_kernels(family, device):
    run_by_kernels(family, family.size, ("no_grad", "train"), device)
