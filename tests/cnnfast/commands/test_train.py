"""`cnnfast train` and `cnnfast evaluate` as their users meet them, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import cnnfast
from cnnfast.__main__ import app
from cnnfast.torchvision_import import make_importable

make_importable()  # lightning imports torchvision
pytest.importorskip("lightning", reason="training needs lightning")
PIL = pytest.importorskip("PIL.Image")
NET = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(3, 4, 3, 2), nn.BatchNorm2d(4), nn.Linear(4, 5)

    def forward(self, x):
        return self.fc(torch.relu(self.bn(self.conv(x))).mean((2, 3)))
"""
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# A folder of three colours, a network in a file of its own, two epochs.
RUN = ("photos", "--model", "net.py:Net", "--size", "16", "--epochs", "2", "--batch", "8", "--out", "run")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(NET)
    for name, colour in {"blue": (0, 0, 250), "green": (0, 200, 0), "red": (220, 0, 0)}.items():
        Path("photos", name).mkdir(parents=True)
        for i in range(8):
            PIL.new("RGB", (20 + i, 30), tuple(max(0, c - 4 * i) for c in colour)).save(
                Path("photos", name, f"{i}.png")
            )
    with cnnfast.backend("torch"):
        yield


def run(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "120", "TERM": "dumb"})
    assert result.exit_code == code, result.output
    return " ".join(result.output.replace("│", " ").split())


def test_from_a_folder_to_a_frozen_network():
    told = run("train", *RUN, "--json", "train.json")
    assert "of held-out images right, best in epoch" in told
    assert "Next: cnnfast predict run IMAGE, or cnnfast evaluate run DATA" in told
    assert {file.name for file in Path("run").iterdir()} >= {
        "config.json", "metrics.csv", "best.safetensors", "last.safetensors", "last.ckpt", "evaluation.json",
        "curves.png", "confusion.png", "augmented.png", "model.cnnfast",
    }  # fmt: skip
    found = json.loads(Path("train.json").read_text())
    assert found["classes"] == ["blue", "green", "red"]
    assert len(found["epochs"]) == 2
    assert found["accuracy"] == json.loads(Path("run/evaluation.json").read_text())["accuracy"]

    seen = cnnfast.load("run/model.cnnfast").preprocessing
    assert seen is not None
    assert (seen.size, seen.crop, seen.mean, seen.std) == (18, (16, 16), MEAN, STD)

    by_run = run("evaluate", "run", "photos", "--json", "run.json", "--picture", "seen.png")
    assert "of 24 right" in by_run
    assert PIL.open("seen.png").format == "PNG"
    run("evaluate", "run/model.cnnfast", "photos", "--json", "file.json")
    assert json.loads(Path("run.json").read_text()) == json.loads(Path("file.json").read_text())
    assert "red" in run("predict", "run", "photos/red/0.png", "--top", "3")

    assert "of held-out images right" in run("train", *RUN, "--resume")  # it is over
    assert "holds a run already" in run("train", *RUN, code=2)
    assert "epochs was 2 and is 3 now" in run("train", *RUN, "--resume", "--epochs", "3", code=2)


def test_transfer_from_a_file(monkeypatch):
    run("train", *RUN)
    again = [*RUN[:-1], "second"]
    told = run("train", *again, "--weights", "run/best.safetensors", "--freeze", "backbone")
    assert "9 tensors loaded" in told
    first, second = (cnnfast.training.read_run(Path(name)).model.state_dict() for name in ("run", "second"))
    assert first["conv.weight"].equal(second["conv.weight"])
    assert first["bn.running_mean"].equal(second["bn.running_mean"])
    assert not first["fc.weight"].equal(second["fc.weight"])


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("nowhere",), "there is no folder and no CSV nowhere"),
        (("photos", "--model", "resnet19"), "no model of"),
        (("photos", "--model", "net.py:Net", "--augment", "turn=3"), "no option of augmentation"),
        (("photos", "--model", "net.py:Net", "--augment", "degrees"), "NAME=VALUE"),
        (("photos", "--model", "net.py:Net", "--validation", "1.5"), "a share is from 0 to below 1"),
        (("photos", "--model", "net.py:Net", "--validation", "test"), "there is no folder"),
        (("photos", "--model", "net.py:Net", "--freeze", "stem", "--size", "16"), "frozen names no part"),
        (("photos", "--model", "net.py:Net", "--optimizer", "adan", "--size", "16"), "optimizer 'adan' is none of"),
        (("photos", "--model", "net.py:Net", "--weights", "w.pth", "--size", "16"), "there is no file w.pth"),
        (("photos", "--model", "net.py:Net", "--mixed", "fp8", "--size", "16"), "'fp8' is none of"),
        (("photos/red", "--model", "net.py:Net"), "class"),
    ],
)
def test_what_train_refuses(words, told):
    assert told in run("train", *words, "--out", "run", "--epochs", "1", code=2)
    assert not Path("run").exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("nowhere", "photos"), "there is no file or folder nowhere"),
        (("photos", "photos"), "photos is no folder of a run"),
        (("net.py", "photos"), "net.py"),
    ],
)
def test_what_evaluate_refuses(words, told):
    assert told in run("evaluate", *words, code=2)


def test_images_that_do_not_fit_are_refused(monkeypatch):
    from cnnfast.training import evaluating

    run("train", *RUN)
    Path("photos/red/3.png").write_bytes(b"")
    PIL.new("L", (250_000, 1)).save("photos/red/5.png")
    monkeypatch.setattr(evaluating, "judged", None)  # no image is looked at by a network
    for network in ("run", "run/model.cnnfast"):
        told = run("evaluate", network, "photos", code=2)
        assert "2 of 24 images cannot be read: photos/red/3.png: the file is empty; photos/red/5.png: 250000 x" in told
    Path("photos", "red").rename("photos/violet")
    assert "violet" in run("evaluate", "run", "photos", code=2)


def test_the_first_of_several_processes_tells(monkeypatch):
    from cnnfast.training import ranks

    monkeypatch.setattr(ranks, "rank", lambda: 1)
    told = run("train", *RUN, "--json", "train.json")
    assert "Next:" not in told
    assert "images right, best" not in told
    assert not Path("train.json").exists()
