"""Heads of networks, found by what results come from, and replaced."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from cnnfast.training.heads import NoHead, heads_of, replace_heads
from tests.support.packages import package

TORCHVISION = {
    "resnet18": ["fc"],
    "densenet121": ["classifier"],
    "mobilenet_v3_small": ["classifier.3"],
    "squeezenet1_1": ["classifier.1"],
    "googlenet": ["fc", "aux2.fc2", "aux1.fc2"],
    "shufflenet_v2_x0_5": ["fc"],
    "swin_t": ["head"],
}
TIMM = {
    "resnet18": ["fc"],
    "convnext_atto": ["head.fc"],
    "levit_128s": ["head.linear", "head_dist.linear"],
    "crossvit_tiny_240": ["head.0", "head.1"],
    "efficientvit_b0": ["head.classifier.4"],
    "repvit_m0_9": ["head.head.l", "head.head_dist.l"],
}


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in model.state_dict().items()}


@pytest.mark.parametrize(
    ("library", "name"), [*(("torchvision", n) for n in TORCHVISION), *(("timm", n) for n in TIMM)]
)
def test_every_family_has_its_heads(library, name, device):
    source = package(library)
    if library == "torchvision":
        options = {"init_weights": False} if name == "googlenet" else {}
        model, size, expected = source.models.get_model(name, weights=None, **options), 64, TORCHVISION[name]
    else:
        model, expected = source.create_model(name, pretrained=False), TIMM[name]
        size = model.default_cfg["input_size"][-1]
    model = model.to(device).eval()
    images = torch.zeros(2, 3, size, size, device=device)
    before = state_of(model)
    assert replace_heads(model, 7, images) == expected
    heads = [f"{head}." for head in expected]
    for key, value in model.state_dict().items():
        if any(key.startswith(head) for head in heads):
            assert value.shape[0] == 7
        else:
            assert torch.equal(value, before[key]), key
    assert not model.training
    assert model(images).shape == (2, 7)
    assert list(before) == list(model.state_dict())
    if library == "timm":
        assert model.num_classes == 7


def test_finding_leaves_no_trace(device):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Flatten(), nn.Linear(144, 5))
    model.to(device)[1].eval()
    model[0].weight.requires_grad_(False)
    before, random = state_of(model), torch.get_rng_state()
    images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)).to(device)
    assert heads_of(model, images) == ["4"]
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert [module.training for module in model] == [True, False, True, True, True]
    assert not model[0].weight.requires_grad
    assert model[4].weight.grad is None


def test_a_wholly_frozen_network_has_a_head_too(device):
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 5)).to(device).requires_grad_(False)
    assert replace_heads(model, 3, torch.zeros(2, 3, 2, 2, device=device)) == ["1"]
    assert model[1].weight.requires_grad
    assert model[1].weight.shape == (3, 12)


def test_a_new_head_is_as_the_old_one(device):
    old = nn.Conv2d(3, 5, (1, 2), stride=2, padding=1, dilation=1, bias=False, padding_mode="reflect")
    model = nn.Sequential(old, nn.AdaptiveAvgPool2d(1), nn.Flatten()).to(device, torch.float64).eval()
    replace_heads(model, 4, torch.zeros(2, 3, 6, 6, dtype=torch.float64, device=device))
    new = model[0]
    assert isinstance(new, nn.Conv2d)
    for name in ("kernel_size", "stride", "padding", "dilation", "padding_mode", "in_channels"):
        assert getattr(new, name) == getattr(old, name)
    assert new.bias is None
    assert new.weight.dtype == torch.float64
    assert new.weight.device == old.weight.device
    assert not new.training


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(12, 5)
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.flatten(1)) * self.gain


def test_what_cannot_be_replaced_is_named(device):
    images = torch.zeros(2, 3, 2, 2, device=device)
    with pytest.raises(NoHead, match="the last layer with weights in Scaled is the model itself, a Scaled"):
        heads_of(Scaled().to(device), images)
    normed = nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.BatchNorm1d(5)).to(device)
    with pytest.raises(NoHead, match="is 2, a BatchNorm1d"):
        heads_of(normed, images)
    with pytest.raises(NoHead, match="Flatten returns no tensor that depends on its weights"):
        heads_of(nn.Flatten(), images)


def test_a_head_of_a_deepcopy_is_its_own(device):
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 5)).to(device)
    twin = copy.deepcopy(model)
    replace_heads(twin, 2, torch.zeros(2, 3, 2, 2, device=device))
    assert model[1].weight.shape == (5, 12)
