"""`cnnfast predict` as its users meet it: tables, CSV and JSON; broken images; and what is refused."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from cnnfast import engine
from cnnfast.__main__ import app
from cnnfast.commands.predict import FEW_IMAGES, MOST_LINES, printable
from cnnfast.engine.graph import Input
from cnnfast.engine.images.images import NO_PILLOW
from cnnfast.engine.images.preprocessing import Preprocessing
from tests.support.packages import package

PIL = pytest.importorskip("PIL.Image")

LOAD = engine.load
COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}
SQUARE = Preprocessing((8, 8), None, "nearest", (0.0,) * 3, (1.0,) * 3)


class Colours:
    """In place of a frozen network: the class of an image is its colour."""

    def __init__(self, **changes) -> None:
        graph = SimpleNamespace(inputs=(Input("x", (None, 3, None, None), torch.float32),))
        self.network = SimpleNamespace(graph=graph, fixed="")
        self.preprocessing: Preprocessing | None = SQUARE
        self.classes: tuple[str, ...] | None = tuple(COLOURS)
        vars(self).update(changes)

    def __call__(self, x):
        return x.mean((2, 3)) * 4


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """The current folder: a file of a network, and three photographs, one of which is in a folder in their folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(engine, "load", lambda file: Colours())
    Path("model.cnnfast").touch()
    Path("photos/deep").mkdir(parents=True)
    for file, colour in {"photos/a.png": "red", "photos/b.jpg": "green", "photos/deep/c.webp": "blue"}.items():
        PIL.new("RGB", (20, 10), COLOURS[colour]).save(file)
    return tmp_path


def predict(*arguments: str, width: int = 120, code: int = 0):
    result = CliRunner().invoke(
        app, ["predict", "model.cnnfast", *arguments], env={"COLUMNS": str(width), "TERM": "dumb"}
    )
    assert result.exit_code == code, result.output
    return result


def lines(text: str) -> list[list[str]]:
    """The cells of each line of a table."""
    return [[cell.strip() for cell in line.strip("│┃").split("│")] for line in text.splitlines() if "│" in line]


# exp(4) / (exp(4) + 2)
BEST = torch.tensor([4.0, 0, 0], dtype=torch.float64).softmax(0)[0].item()


def test_a_folder_as_a_table():
    result = predict("photos", "--top", "2")
    rows = lines(result.stdout)
    assert [row[0] for row in rows] == ["photos/a.png", "", "photos/b.jpg", "", "photos/deep/c.webp", ""]
    assert [row[1] for row in rows][::2] == ["red", "green", "blue"]
    assert rows[0][2] == f"{BEST:.1%}"
    assert "3 of 3 images predicted" in result.stdout


def test_one_image_has_its_five_best_classes_or_all(folder):
    result = predict("photos/b.jpg")
    assert lines(result.stdout)[0][1] == "green"
    assert len(lines(result.stdout)) == 3
    assert "predicted" not in result.stdout


def test_more_images_have_a_line_each_and_not_all_of_them(monkeypatch):
    for i in range(FEW_IMAGES + 1 - 3):
        PIL.new("RGB", (2, 2), COLOURS["blue"]).save(f"photos/x{i}.bmp")
    assert len(lines(predict("photos").stdout)) == FEW_IMAGES + 1
    monkeypatch.setattr("cnnfast.commands.predict.MOST_LINES", 4)
    result = predict("photos", "--csv", "all.csv")
    assert len(lines(result.stdout)) == 4
    assert "4 lines of a kind are shown; --csv FILE and --json FILE have all." in result.stdout
    assert len(Path("all.csv").read_text().splitlines()) == 1 + 3 * (FEW_IMAGES + 1)
    assert MOST_LINES > FEW_IMAGES


def test_the_same_as_csv_and_json():
    predict("photos", "--csv", "out.csv", "--json", "out.json", "--batch", "2")
    table = list(csv.DictReader(Path("out.csv").read_text().splitlines()))
    data = json.loads(Path("out.json").read_text())
    assert [one["file"] for one in data] == ["photos/a.png", "photos/b.jpg", "photos/deep/c.webp"]
    assert data[1]["top"][0] == {"class": 1, "name": "green", "probability": pytest.approx(BEST, abs=0.02)}
    assert data[0]["error"] is None
    flat = [(one["file"], rank, top) for one in data for rank, top in enumerate(one["top"], 1)]
    assert len(table) == len(flat) == 9
    for row, (file, rank, top) in zip(table, flat, strict=True):
        assert (row["file"], row["rank"], row["class"]) == (file, str(rank), str(top["class"]))
        assert (row["name"], row["error"]) == (top["name"], "")
        assert float(row["probability"]) == pytest.approx(top["probability"], rel=1e-5)


@pytest.mark.parametrize("kind", ["--csv", "--json"])
def test_standard_output_holds_nothing_else(kind):
    result = predict("photos", kind, "-", "--top", "1")
    if kind == "--json":
        assert [one["top"][0]["name"] for one in json.loads(result.stdout)] == ["red", "green", "blue"]
    else:
        assert [row["name"] for row in csv.DictReader(io.StringIO(result.stdout))] == ["red", "green", "blue"]
    assert "3 of 3 images predicted" in result.stderr


def test_classes_without_names_are_numbers(monkeypatch):
    monkeypatch.setattr(engine, "load", lambda file: Colours(classes=None))
    result = predict("photos/a.png", "--json", "out.json")
    assert lines(result.stdout)[0][1] == "class 0"
    assert "These classes have no names here: --classes NAMES gives them." in result.stdout
    assert json.loads(Path("out.json").read_text())[0]["top"][0]["name"] is None


def test_what_cannot_be_read_is_named_and_left_out():
    Path("photos/aa.png").write_bytes(b"no image")
    PIL.effect_noise((64, 64), 50).save("photos/half.jpg")
    Path("photos/half.jpg").write_bytes(Path("photos/half.jpg").read_bytes()[:700])
    result = predict("photos", "--json", "out.json", "--csv", "out.csv", code=1)
    assert "photos/aa.png: Pillow knows no image format like this" in result.stdout
    assert "photos/half.jpg: image file is truncated" in result.stdout
    assert "3 of 5 images predicted, 2 left out" in result.stdout
    data = json.loads(Path("out.json").read_text())
    assert [one["error"] for one in data][:2] == [None, "Pillow knows no image format like this"]
    assert data[1]["top"] == []
    broken = [row for row in csv.DictReader(Path("out.csv").read_text().splitlines()) if row["error"]]
    assert [(row["file"], row["rank"]) for row in broken] == [("photos/aa.png", ""), ("photos/half.jpg", "")]


def test_nothing_but_broken_images(tmp_path):
    Path("photos/aa.png").write_bytes(b"")
    result = predict("photos/aa.png", code=1)
    assert "photos/aa.png: the file is empty" in result.stdout
    assert "0 of 1 images predicted, 1 left out" in result.stdout


def test_names_cannot_write_into_a_terminal(monkeypatch):
    monkeypatch.setattr(engine, "load", lambda file: Colours(classes=("\x1b[31mred", "[bold]green", "blue\n")))
    os.rename("photos/a.png", "photos/[red]\x1b[2J.png")
    os.rename("photos/b.jpg", os.fsencode("photos/b") + b"\xff.jpg")
    result = predict("photos", "--csv", "out.csv", "--json", "out.json")
    assert "\x1b" not in result.stdout
    assert "photos/[red]\N{REPLACEMENT CHARACTER}[2J.png" in result.stdout
    assert "[bold]green" in result.stdout
    assert printable("a b\tß\x9b\udcff") == "a b\N{REPLACEMENT CHARACTER}ß" + "\N{REPLACEMENT CHARACTER}" * 2
    assert "photos/b\\udcff.jpg" in Path("out.csv").read_text()


def test_an_interrupt_keeps_what_is_done(monkeypatch):
    def interrupted(x):
        calls.append(x)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return x.mean((2, 3))

    calls: list[torch.Tensor] = []
    network = Colours()
    monkeypatch.setattr(Colours, "__call__", lambda self, x: interrupted(x))
    monkeypatch.setattr(engine, "load", lambda file: network)
    result = predict("photos", "--batch", "1", "--json", "out.json", code=128 + signal.SIGTERM)
    assert "2 of 3 images predicted" in result.stdout
    assert "Interrupted: the rest was not looked at." in result.stdout
    assert [one["file"] for one in json.loads(Path("out.json").read_text())] == ["photos/a.png", "photos/b.jpg"]


def test_a_network_that_was_really_frozen(monkeypatch):
    """The probabilities are those of the model on what torchvision's preset makes of the images."""
    preset = package("torchvision.transforms._presets").ImageClassification(crop_size=12, resize_size=16)
    generator = np.random.default_rng(0)
    sizes = {"a.png": (20, 31), "b.png": (33, 17), "c.png": (5, 40), "d.png": (12, 12)}
    Path("many").mkdir()
    for name, (height, width) in sizes.items():
        PIL.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(f"many/{name}")
    Path("many/bb.png").write_bytes(b"no image")
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(8, 7)).eval()
    names = [f"kind {i}" for i in range(7)]
    frozen = engine.freeze(model, torch.zeros(1, 3, 12, 12), preprocessing=preset, classes=names)
    frozen.save("real.cnnfast")
    monkeypatch.setattr(engine, "load", LOAD)
    arguments = ["predict", "real.cnnfast", "many", "--batch", "3", "--top", "7", "--json", "-"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1, result.output
    data = {Path(one["file"]).name: one for one in json.loads(result.stdout)}
    assert list(data) == ["a.png", "b.png", "bb.png", "c.png", "d.png"]
    assert data.pop("bb.png")["error"]
    images = torch.stack([preset(PIL.open(one["file"])) for one in data.values()])
    with torch.no_grad():
        expected = model.double()(images.double()).softmax(1)
    for row, one in zip(expected, data.values(), strict=True):
        assert [top["name"] for top in one["top"]] == [names[i] for i in row.argsort(descending=True)]
        assert [top["probability"] for top in one["top"]] == pytest.approx(row.sort(descending=True)[0].tolist(), 1e-5)


# ----------------------------------------------------------------------------------------------------------------------
# What is refused


def refused(*arguments: str) -> str:
    """What is said on standard error, in one line."""
    result = predict(*arguments, code=2, width=1000)
    assert result.stdout == ""
    return " ".join(result.stderr.replace("│", " ").split())


def test_a_network_that_does_not_say_how_images_are_prepared(monkeypatch):
    monkeypatch.setattr(engine, "load", lambda file: Colours(preprocessing=None))
    said = refused("photos")
    assert (
        "model.cnnfast does not say how images are prepared for it. Give it here, such as --preprocessing ResNet50_W"
        in said
    )
    Path("how.json").write_text(json.dumps(SQUARE.to_json()))
    assert "3 of 3 images" in predict("photos", "--preprocessing", "how.json").stdout
    Path("how.json").write_text('{"size": 256, "crop": 224, "mean": 0.5}')
    assert "'std' is missing" in refused("photos", "--preprocessing", "how.json")
    assert "'imagenet' is none of a JSON file" in refused("photos", "--preprocessing", "imagenet")


def test_names_of_classes_that_are_given(monkeypatch):
    Path("names.txt").write_text("rot\ngrün\nblau\n")
    assert lines(predict("photos/a.png", "--classes", "names.txt").stdout)[0][1] == "rot"
    assert "the file of classes none.txt cannot be read" in refused("photos", "--classes", "none.txt")
    Path("names.txt").write_text("rot\ngrün\n")
    said = refused("photos", "--classes", "names.txt")
    assert "Invalid value for --classes: these are names of 2 classes, and the network tells 3" in said


def test_a_network_whose_result_is_not_of_classes(monkeypatch):
    class Segments(Colours):
        def __call__(self, x):
            return {"out": x}

    monkeypatch.setattr(engine, "load", lambda file: Segments())
    said = refused("photos")
    assert "its result is a dict of Nx3x8x8, and classes are read from one tensor of N x classes" in said
    assert (
        "Call it in Python: network = cnnfast.load('model.cnnfast'); network(network.preprocessing.apply(image)[None])"
        in said
    )


def test_a_network_that_takes_other_images(monkeypatch):
    graph = SimpleNamespace(inputs=(Input("x", (None, 3, 24, 24), torch.float32),))
    other = Colours(network=SimpleNamespace(graph=graph, fixed="export failed"))
    monkeypatch.setattr(engine, "load", lambda file: other)
    assert "makes images of 8 height, and the network takes 24 only (export failed)" in refused("photos")


def test_a_file_that_is_no_network(monkeypatch):
    def load(file):
        raise ValueError(f"{file} is no frozen network")

    monkeypatch.setattr(engine, "load", load)
    assert "Invalid value for NETWORK: model.cnnfast is no frozen network" in refused("photos")


def test_a_place_without_images(tmp_path):
    (tmp_path / "empty").mkdir()
    assert "Invalid value for IMAGE: there is no file in there" in refused("empty")
    (tmp_path / "empty" / "a.HEIC").touch()
    (tmp_path / "empty" / "b.heic").touch()
    (tmp_path / "empty" / "Makefile").touch()
    assert "there are files with .heic, no extension" in refused("empty")
    assert "there is no file or folder nothing.png" in refused("photos", "nothing.png")


def test_without_pillow(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "PIL", None)
    assert NO_PILLOW in refused("photos")


def test_a_file_that_is_not_there():
    arguments = ["predict", "modle.cnnfast", "photos"]
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "1000", "TERM": "dumb"})
    assert result.exit_code == 2
    assert "there is no file modle.cnnfast. Did you mean 'model.cnnfast'?" in result.stderr


def test_only_one_of_both_goes_to_standard_output():
    assert "standard output can take the CSV or the JSON" in refused("photos", "--csv", "-", "--json", "-")
    assert "there is no folder nowhere" in refused("photos", "--csv", "nowhere/out.csv")
