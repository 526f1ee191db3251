"""Weights from files, and those that libraries published."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from cnnfast.targets.target import TargetError
from cnnfast.training.weights import load_weights, pretrained, read_weights
from tests.support.packages import package


def network(classes: int = 5, seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, classes))


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(t, b.state_dict()[name]) for name, t in a.state_dict().items())


WRAPPED = {
    "a state_dict": lambda state: state,
    "a checkpoint": lambda state: {"epoch": 3, "state_dict": state, "optimizer": {}},
    "of DDP": lambda state: {"model": {f"module.{k}": v for k, v in state.items()}},
    "compiled, of Lightning": lambda state: {"state_dict": {f"model._orig_mod.{k}": v for k, v in state.items()}},
}


@pytest.mark.parametrize("how", WRAPPED)
def test_weights_are_found_in_what_scripts_save(how, tmp_path):
    trained, model = network(), network(seed=1)
    torch.save(WRAPPED[how](trained.state_dict()), tmp_path / "w.pth")
    loading = load_weights(model, read_weights(tmp_path / "w.pth"))
    assert loading.whole
    assert loading.loaded == len(trained.state_dict())
    assert same(model, trained)


def test_safetensors(tmp_path):
    trained, model = network(), network(seed=1)
    save_file(trained.state_dict(), tmp_path / "w.safetensors")
    assert load_weights(model, read_weights(tmp_path / "w.safetensors")).whole
    assert same(model, trained)


def test_heads_of_other_classes_start_anew():
    trained, model = network(classes=5), network(classes=7, seed=1)
    before = model[3].weight.clone()
    loading = load_weights(model, trained.state_dict(), heads=["3"])
    assert loading.new == ("3.weight", "3.bias")
    assert loading.whole
    assert torch.equal(model[3].weight, before)
    assert torch.equal(model[0].weight, trained[0].weight)
    assert "start anew, as heads of other classes: 3.weight, 3.bias" in str(loading)


def test_a_head_of_as_many_classes_is_loaded():
    trained, model = network(), network(seed=1)
    assert load_weights(model, trained.state_dict(), heads=["3"]).new == ()
    assert same(model, trained)


def test_what_does_not_fit_is_listed():
    weights: dict[str, Tensor] = network(seed=1).state_dict()
    weights["0.weight"] = torch.zeros(4, 3, 5, 5)
    weights["extra.gain"] = weights.pop("1.bias")
    model = network()
    kept = model[0].weight.clone()
    loading = load_weights(model, weights)
    assert loading.missing == ("1.bias",)
    assert loading.unexpected == ("extra.gain",)
    assert loading.other_shapes == {"0.weight": ((4, 3, 5, 5), (4, 3, 3, 3))}
    assert not loading.whole
    assert torch.equal(model[0].weight, kept)
    assert str(loading) == (
        "7 tensors loaded\nmissing in the file: 1.bias\nunexpected, of which the network has none: extra.gain\n"
        "of another shape in the file: 0.weight 4x3x5x5, not 4x3x3x3"
    )


def test_long_lists_are_cut():
    weights = {**network().state_dict(), **{f"other.{i}": torch.zeros(1) for i in range(30)}}
    assert "other.7 and 22 more" in str(load_weights(network(), weights))


def test_a_file_in_which_nothing_fits_is_refused():
    with pytest.raises(ValueError, match=r"no tensor fits Sequential: the file has 'a'.*, the network '0.weight'"):
        load_weights(network(), {"a": torch.zeros(1)})


class Runs:
    """What its pickle would do."""

    def __reduce__(self):
        return Path.touch, (Path("touched"),)


def test_files_that_hold_no_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, content in {"none.pt": b"", "text.pt": b"hello", "text.safetensors": b"hello"}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=name):
            read_weights(tmp_path / name)
    torch.save({"state_dict": {"a": Runs()}}, "code.pt")
    with pytest.raises(ValueError, match="which could run code"):
        read_weights(Path("code.pt"))
    assert not Path("touched").exists()
    torch.save([torch.zeros(1)], "list.pt")
    with pytest.raises(ValueError, match="holds list, not a mapping"):
        read_weights(Path("list.pt"))
    torch.save({"epoch": 3}, "empty.pt")
    with pytest.raises(ValueError, match=r"holds no weights.* it has 'epoch'"):
        read_weights(Path("empty.pt"))
    with pytest.raises(ValueError, match=r"there is no file missing\.pt"):
        read_weights(Path("missing.pt"))


def offline(*arguments, **options):
    raise socket.gaierror(-2, "Name or service not known")


@pytest.mark.parametrize(
    ("name", "library", "at"),
    [
        ("torchvision:googlenet", "torchvision", "https://download.pytorch.org/models/googlenet-1378be20.pth"),
        ("resnet18", "torchvision", "https://download.pytorch.org/models/resnet18-f37072fd.pth"),
        ("timm:resnet18", "timm", "https://huggingface.co/timm/resnet18.a1_in1k"),
    ],
)
def test_without_a_network_the_error_names_the_file(name, library, at, tmp_path, monkeypatch):
    package(library)
    monkeypatch.setattr(socket, "getaddrinfo", offline)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(TargetError, match="cannot be fetched") as caught:
        pretrained(name)
    assert at in str(caught.value)
    assert "--weights FILE" in str(caught.value)


def test_published_weights_are_loaded_from_the_cache(tmp_path, monkeypatch):
    """As they are where the file lies in torch.hub's folder: the numbers are torchvision's own model's."""
    models = package("torchvision").models
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        published = models.squeezenet1_1()
    monkeypatch.setattr(socket, "getaddrinfo", offline)
    monkeypatch.setattr(
        type(models.SqueezeNet1_1_Weights.DEFAULT), "get_state_dict", lambda self, **options: published.state_dict()
    )
    assert same(pretrained("torchvision:squeezenet1_1"), published)


def test_models_without_published_weights(monkeypatch):
    package("timm")
    with pytest.raises(TargetError, match=r"cnnfast\.demo\.digits:DigitNet has no published weights here"):
        pretrained("cnnfast.demo.digits:DigitNet")
