"""fit, from data to a run."""

from __future__ import annotations

import inspect
import json
import re
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import cnnfast
from cnnfast.commands.train import train
from cnnfast.nn import Augment
from cnnfast.training import Module, fit, fitting
from cnnfast.training.preparing import OF_DIGITS
from cnnfast.training.runs import Epoch, best_of
from tests.support.trainable import SmallNet, few_digits, small_fit, small_net, weights


def test_digits_are_learnt(capfd):
    model = small_net()
    keys = [*model.state_dict()]
    run = small_fit(model, count=400, epochs=16, lr=1e-2)
    assert len(run.history) == 16
    assert run.accuracy is not None
    assert run.accuracy > 0.7
    assert run.history[-1].loss < run.history[0].loss
    assert run.model is model
    assert not model.training
    assert [*model.state_dict()] == keys
    assert cnnfast.report(model).count("fused") == 2
    assert capfd.readouterr() == ("", "")


def test_a_run_s_folder(tmp_path, capfd):
    """What is in it, and that best.safetensors is what the best epoch was validated with."""
    images = few_digits(120)
    run = small_fit(out=tmp_path / "new" / "run", progress=True, name="a name")
    folder = run.folder
    assert folder is not None
    config = json.loads((folder / "config.json").read_text())
    assert config["options"]["model"] == "a name"
    assert config["options"]["epochs"] == 3
    assert config["options"]["processes"] == 1
    assert config["data"]["classes"] == list(images.classes) == list(run.classes)
    assert sum(config["data"]["counts"]) + config["data"]["held_out"] == 120
    assert config["data"]["augment"]["padding"] == 1
    assert config["versions"]["torch"] == torch.__version__
    told = capfd.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in told] == [f"epoch {i} of 3" for i in (1, 2, 3)]
    best = load_file(folder / "best.safetensors")
    assert all(torch.equal(t, best[name]) for name, t in run.model.state_dict().items())
    checkpoint = weights(folder)
    last = load_file(folder / "last.safetensors")
    assert all(torch.equal(t, checkpoint[f"/state_dict/model.{name}"]) for name, t in last.items())
    assert any(not torch.equal(t, checkpoint[f"/current_model_state/model.{name}"]) for name, t in last.items())
    augment = Augment(8, mean=0.5, std=0.5, resize_size=8)
    assert validated(Module(run.model, classes=10, augment=augment).eval()) == run.accuracy


def validated(module: Module) -> float:
    from cnnfast.training.batches import loader
    from cnnfast.training.samples import split

    images = few_digits(120)
    right = [
        module(module.augment(batch.images)).argmax(1) == batch.labels
        for batch in loader(images.resized(8), split(images, 0.2, 0)[1], batch=7)
    ]
    return torch.cat(right).float().mean().item()


def test_the_same_seed_gives_the_same_bits_with_workers_and_another_not(tmp_path):
    for name, options in {"one": {}, "workers": {"workers": 1}, "seed": {"seed": 1}}.items():
        small_fit(out=tmp_path / name, epochs=2, **options)
    one, workers, seed = (weights(tmp_path / name) for name in ("one", "workers", "seed"))
    assert all(torch.equal(t, workers[name]) for name, t in one.items())
    assert not torch.equal(one["/state_dict/model.conv.weight"], seed["/state_dict/model.conv.weight"])


def test_what_comes_after_training_is_made_once(tmp_path):
    """And by the next call, where it was not made to its end, with the frozen network last."""
    usual = {"augment": OF_DIGITS, "epochs": 1, "out": tmp_path, "resume": True, "progress": False}
    for frozen, calls in ((False, 1), (False, 1), (True, 0)):
        if frozen:
            (tmp_path / "model.cnnfast").touch()
        with mock.patch.object(fitting, "finish") as finish:
            fit(small_net(), few_digits(120), **usual)
        assert finish.call_count == calls


def test_other_images_may_be_held_out(tmp_path):
    run = small_fit(out=tmp_path, epochs=1, validation=few_digits(30))
    assert run.accuracy is not None
    assert round(run.accuracy * 30, 4) in range(31)
    assert json.loads((tmp_path / "config.json").read_text())["data"]["held_out"] == 30


def test_small_images_are_trained_by_one_thread(tmp_path):
    torch.set_num_threads(2)
    try:
        small_fit(epochs=1, out=tmp_path)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert json.loads((tmp_path / "config.json").read_text())["machine"]["threads"] == 1


def test_without_average_and_validation():
    run = small_fit(ema=None, validation=0)
    assert run.accuracy is None
    assert run.best.epoch == 3
    assert "nothing held out" in str(run)


@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": "sgd"},
        {"optimizer": "adam", "schedule": "cosine"},
        {"mixed": "bf16"},
        {"class_weights": "balanced", "label_smoothing": 0},
        {"clip": 0.1},
        {"deterministic": True},
        {"augment": {"mixup_alpha": 0.2, "crop_scale": None, "mean": 0.5, "std": 0.5}},
        {"patience": 1},
    ],
)
def test_options_run(options):
    before = torch.are_deterministic_algorithms_enabled()
    run = small_fit(epochs=2, **options)
    assert run.history[1].loss > 0
    assert torch.are_deterministic_algorithms_enabled() == before


class Flat(nn.Module):
    """Its view of what a convolution returns works in one layout only."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(1, 4, 3, padding=1), nn.Linear(4 * 64, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x).view(len(x), -1))


class Twice(SmallNet):
    def forward(self, x: Tensor):
        y = super().forward(x)
        return y, y


def test_a_model_with_views_is_given_the_other_layout():
    assert small_fit(Flat(), epochs=1).history


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"model": Flat(9)}, "Flat tells 9 classes apart, and the data has 10 classes: give it a last layer of 10"),
        ({"model": Twice()}, "Twice returns tuple in training, where logits [N, 10] are wanted"),
        ({"model": nn.Conv2d(3, 10, 3)}, "Conv2d does not run on 2x1x8x8: RuntimeError"),
        ({"epochs": 0}, "epochs is 0, and must be a whole number of 1 or more"),
        ({"batch": 2.5}, "batch is 2.5, and must be a whole number of 1 or more"),
        ({"lr": 0.0}, "lr is 0.0, and must be above 0"),
        ({"lr": float("nan")}, "lr is nan, and must be above 0"),
        ({"ema": 1.0}, "ema is 1.0, and must be 0 or more, and below 1"),
        ({"optimizer": "adamm"}, "optimizer 'adamm' is none of adam, adamw, sgd. Did you mean"),
        ({"schedule": "cosin"}, "schedule 'cosin' is none of one-cycle, cosine. Did you mean 'cosine'?"),
        ({"validation": 1.0}, "validation is 1.0, and must be a share from 0 to below 1, or other data"),
        ({"validation": 0, "patience": 2}, "patience needs images that are held out"),
        ({"class_weights": "balance"}, "class_weights 'balance' is neither 'balanced' nor a number for each class"),
        ({"class_weights": [1.0, 2.0]}, "class_weights are 2 numbers: give 10"),
        ({"mixed": "fp32"}, "mixed 'fp32' is none of bf16, fp16"),
        ({"augment": {"paddin": 1}}, "paddin"),
    ],
)
def test_wrong_input_is_told_before_anything_runs(options, told, tmp_path):
    options = {"model": small_net(), **options}
    with pytest.raises((ValueError, TypeError), match=re.escape(told)):
        small_fit(out=tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_the_command_has_the_defaults_of_fit():
    """README says that its Python does what the command does."""
    command = inspect.signature(train).parameters
    same = (
        "epochs",
        "batch",
        "lr",
        "optimizer",
        "weight_decay",
        "schedule",
        "label_smoothing",
        "ema",
        "patience",
        "seed",
    )
    for name in same:
        assert command[name].default == inspect.signature(fit).parameters[name].default, name
    assert float(command["validation"].default) == inspect.signature(fit).parameters["validation"].default


def test_fp16_on_a_cpu_is_refused():
    if torch.cuda.is_available():
        pytest.skip("interpreter ring: a GPU scales losses")
    with pytest.raises(ValueError, match="mixed 'fp16' needs a GPU"):
        small_fit(mixed="fp16")


def test_the_best_epoch_has_the_highest_accuracy_then_the_lowest_loss():
    held_out = [(0.9, 0.8), (0.7, 0.8), (0.1, 0.7)]  # loss and accuracy
    epochs = [Epoch(i + 1, 0.1, 1.0, 0.5, *numbers, 1.0) for i, numbers in enumerate(held_out)]
    assert best_of(epochs).epoch == 2
    assert best_of([*epochs, epochs[1]._replace(epoch=4)]).epoch == 2
