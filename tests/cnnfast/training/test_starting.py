"""Networks that trainings start from."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from cnnfast.targets.target import TargetError
from cnnfast.training import starting
from cnnfast.training.starting import channels_of, start

DIGIT_NET = "cnnfast.demo.digits:DigitNet"


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(t, b.state_dict()[name]) for name, t in a.state_dict().items())


def test_random_weights_follow_from_the_seed():
    random = torch.get_rng_state()
    networks = [start(DIGIT_NET, 10, (8, 8), channels=1, seed=seed).model for seed in (0, 0, 1)]
    assert same(networks[0], networks[1])
    assert not same(networks[0], networks[2])
    assert torch.equal(torch.get_rng_state(), random)


def test_heads_get_the_classes_of_the_data():
    made = start("cnnfast:resnet18", 7, (32, 32))
    assert made.heads == ("fc",)
    assert made.model(torch.zeros(2, 3, 32, 32)).shape == (2, 7)
    assert made.loading is None


def test_a_file_of_weights_with_other_classes(tmp_path):
    five = start(DIGIT_NET, 5, (8, 8), channels=1, seed=3).model
    save_file(five.state_dict(), tmp_path / "five.safetensors")
    made = start(DIGIT_NET, 10, (8, 8), channels=1, weights=tmp_path / "five.safetensors")
    assert made.loading is not None
    assert made.loading.new == ("head.weight", "head.bias")
    assert torch.equal(made.model.stem.conv.weight, five.stem.conv.weight)
    again = start(DIGIT_NET, 5, (8, 8), channels=1, weights=tmp_path / "five.safetensors")
    assert same(again.model, five)


def test_published_heads_are_replaced_even_where_they_have_as_many_classes(monkeypatch):
    published = start(DIGIT_NET, 10, (8, 8), channels=1, seed=5).model
    head = published.head.weight.clone()
    monkeypatch.setattr(starting, "pretrained", lambda name: published)
    made = start(DIGIT_NET, 10, (8, 8), channels=1, published=True)
    assert made.model is published
    assert not torch.equal(made.model.head.weight, head)


def test_both_kinds_of_weights_are_refused(tmp_path):
    with pytest.raises(ValueError, match="name one of them"):
        start("resnet18", 10, (32, 32), published=True, weights=tmp_path)
    with pytest.raises(TargetError, match="Did you mean"):
        start("cnnfast:resnet19", 10, (32, 32))


def test_channels_are_those_of_the_first_layer():
    assert channels_of(DIGIT_NET) == 1
    assert channels_of("cnnfast:resnet18") == 3
