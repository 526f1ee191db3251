"""`cnnfast augment` as its users meet it: the sheet, what is said of it, and what is refused."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import cnnfast
from cnnfast.__main__ import app
from cnnfast.commands.augment import RECIPE
from cnnfast.engine.images.images import NO_PILLOW
from cnnfast.sheets.composing import GAP, MARGIN, SMALLEST_SIDE, WIDE_GAP

PIL = pytest.importorskip("PIL.Image")
SIZE = SMALLEST_SIDE  # whose pixels are those of the sheet
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """The current folder, with two images of noise."""
    monkeypatch.chdir(tmp_path)
    generator = np.random.default_rng(0)
    for name, (height, width) in {"a.png": (100, 120), "b.png": (90, 70)}.items():
        PIL.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(name)
    return tmp_path


def augment(*arguments: str, code: int = 0):
    result = CliRunner().invoke(app, ["augment", *arguments], env={"COLUMNS": "1000", "TERM": "dumb"})
    assert result.exit_code == code, result.output
    return result


def told(*arguments: str) -> dict:
    return json.loads(augment(*arguments, "--json", "-").stdout)


def pixels_of(name: str) -> torch.Tensor:
    return torch.from_numpy(np.array(PIL.open(name).convert("RGB")))


def tiles(count: int, expected: torch.Tensor) -> list[np.ndarray]:
    """The images of augmented.png, all in one row. expected: the first one, which tells where the row begins."""
    sheet = np.array(PIL.open("augmented.png"))
    left = MARGIN + SIZE + WIDE_GAP
    line = levels(expected)[0].astype(int)
    top = next(y for y in range(len(sheet)) if np.abs(sheet[y, left : left + SIZE] - line).max() <= 1)
    return [sheet[top : top + SIZE, left + i * (SIZE + GAP) :][:, :SIZE] for i in range(count)]


def levels(image: torch.Tensor) -> np.ndarray:
    """A normalised image [3, H, W] as [H, W, 3] of 0 to 255."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    return ((image * std + mean).clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()


def by_python(data: dict, images: list[torch.Tensor]) -> torch.Tensor:
    """What the line of Python gives that the command tells."""
    names = {"cnnfast": cnnfast, "torch": torch, "images": images}
    with cnnfast.backend("torch"):
        exec(data["python"], names)
    return names["results"]


OPTIONS = ("degrees=20", "brightness=0.4,1.2", "erasing_p=0.5", "vertical_flip_p=0.5", "hue=0.1")


def test_the_sheet_shows_what_the_line_of_python_gives():
    data = told("a.png", *OPTIONS, "--size", str(SIZE), "--count", "3", "--columns", "3", "--seed", "5")
    assert data["options"] == list(OPTIONS)
    assert (data["file"], data["size"], data["seed"]) == ("augmented.png", SIZE, 5)
    results = by_python(data, [pixels_of("a.png")] * 3)
    shown = tiles(3, results[0])
    for i, result in enumerate(results):
        assert np.abs(shown[i].astype(int) - levels(result)).max() <= 1, i
    assert not (shown[0] == shown[1]).all()


def test_what_was_drawn_is_told_of_each_result():
    data = told("a.png", *OPTIONS, "--size", "16", "--count", "5")
    with_these = cnnfast.nn.Augment(16, **cnnfast.nn.augment_options(OPTIONS), seed=0)
    draws = with_these.draw([(32, 38)] * 5, range(5))
    assert [one["index"] for one in data["results"]] == list(range(5))
    assert {one["image"] for one in data["results"]} == {"a.png"}
    for one, map_, colours in zip(data["results"], draws.maps.tolist(), draws.colours.tolist(), strict=True):
        assert one["map"] == map_
        assert [one["brightness"], one["hue"]] == [colours[0], colours[3]]
        assert min(abs(one["turned"]), 180 - abs(one["turned"])) < 20.001, "flips upside down are told as turns"
    assert any(one["erased"] for one in data["results"])


def test_evaluation_stands_beside():
    augment("a.png", "--size", str(SIZE), "--count", "1", "--out", "sheet.png")
    evaluating = cnnfast.nn.Augment(SIZE).eval()
    with cnnfast.backend("torch"):
        expected = levels(evaluating([pixels_of("a.png")])[0])
    sheet = np.array(PIL.open("sheet.png"))
    assert any((sheet[y : y + SIZE, MARGIN : MARGIN + SIZE] == expected).all() for y in range(len(sheet) - SIZE))


def test_without_a_word_a_photograph_is_shown_with_something_of_each_kind():
    pytest.importorskip("sklearn")
    result = augment("--size", "16", "--json", "out.json")
    said = result.stdout.splitlines()
    assert said[0].startswith("augmented.png is written: 24 results of 16 x 16 pixels, of scikit-learn's china.jpg")
    assert "(640 x 427 pixels, shrunk to 48 x 32)" in said[0]
    assert said[1] == f"Options: {' '.join(RECIPE)} (none was given: these show something of each kind)"
    assert said[2] == (
        "In Python: results = cnnfast.nn.Augment(16, degrees=15, brightness=0.3, contrast=0.3, saturation=0.3, "
        "hue=0.05, erasing_p=0.3, seed=0)(images, index=torch.arange(24))"
    )
    results = json.loads(Path("out.json").read_text())["results"]
    assert len(results) == 24
    assert len({tuple(map(tuple, one["map"])) for one in results}) == 24
    assert {one["mirrored"] for one in results} == {True, False}


@pytest.mark.parametrize(
    ("name", "kind"), [("a.PNG", "PNG"), ("a.jpg", "JPEG"), ("a.jpeg", "JPEG"), ("a.webp", "WEBP")]
)
def test_the_ending_says_what_is_written(name, kind):
    result = augment("b.png", "hue=0", "--size", "16", "--count", "2", "--out", name)
    assert PIL.open(name).format == kind
    assert "none was given" not in result.stdout


def test_the_same_seed_gives_the_same_whatever_the_count():
    few, many, other = (
        told("a.png", "--size", "16", "--count", count, "--seed", seed)["results"]
        for count, seed in (("2", "1"), ("40", "1"), ("2", "2"))
    )
    assert few == many[:2]
    assert few != other
    augment("a.png", "--size", "16", "--count", "2", "--out", "first.png")
    augment("a.png", "--size", "16", "--count", "2", "--out", "second.png")
    assert Path("first.png").read_bytes() == Path("second.png").read_bytes()


def test_images_take_turns():
    data = told("a.png", "b.png", "--size", str(SIZE), "--count", "3", "--columns", "3")
    assert [one["image"] for one in data["results"]] == ["a.png", "b.png", "a.png"]
    results = by_python(data, [pixels_of(name) for name in ("a.png", "b.png", "a.png")])
    for shown, result in zip(tiles(3, results[0]), results, strict=True):
        assert np.abs(shown.astype(int) - levels(result)).max() <= 1


@pytest.mark.parametrize("kind", ["mixup_alpha=1", "cutmix_alpha=1"])
def test_no_image_is_mixed_with_itself(kind):
    data = told("a.png", "b.png", kind, "--size", str(SIZE), "--count", "7", "--columns", "7")
    results = data["results"]
    assert len(results) == 7
    mixed = [one for one in results if one["partner"] is not None]
    assert len(mixed) >= 4
    assert all(one["partner"] // 2 == one["index"] // 2 and one["partner"] != one["index"] for one in mixed)
    made = by_python(data, [pixels_of("a.png"), pixels_of("b.png")])[:7]
    for shown, result in zip(tiles(7, made[0]), made, strict=True):
        assert np.abs(shown.astype(int) - levels(result)).max() <= 1


def test_a_single_image_is_mixed_with_a_photograph():
    pytest.importorskip("sklearn")
    result = augment("a.png", "mixup_alpha=1", "--size", "16", "--count", "4")
    assert "of a.png (120 x 100 pixels, shrunk to 38 x 32) and scikit-learn's china.jpg (640" in result.stdout
    alone = told("mixup_alpha=1", "--size", "16", "--count", "4")
    assert [one["image"] for one in alone["results"]][:2] == ["scikit-learn's china.jpg", "scikit-learn's flower.jpg"]


def test_images_are_read_as_predict_reads_them(folder):
    """Of 16 bits, grey, turned by a note of the camera; and by any name."""
    deep = np.linspace(0, 65535, 48 * 40).astype(np.uint16).reshape(40, 48)
    PIL.fromarray(deep).save("deep.png")
    exif = PIL.Exif()
    exif[274] = 6  # turn by 90 degrees
    PIL.new("RGB", (60, 40), "red").save("a=b.jpg", exif=exif)
    result = augment("deep.png", "./a=b.jpg", "hue=0", "--size", "32", "--count", "2")
    assert "of deep.png (48 x 40 pixels) and ./a=b.jpg (40 x 60 pixels)." in result.stdout


def refused(*arguments: str) -> str:
    before = sorted(Path().iterdir())
    result = augment(*arguments, code=2)
    assert result.stdout == ""
    assert sorted(Path().iterdir()) == before, "nothing is written"
    return " ".join(result.stderr.replace("│", " ").split())


def test_what_is_no_image_is_refused():
    Path("empty.png").touch()
    Path("text.png").write_text("no image")
    Path("half.png").write_bytes(Path("a.png").read_bytes()[:3000])
    PIL.fromarray(np.ones((4, 4), np.float32)).save("float.tiff")
    assert "IMAGE: empty.png: the file is empty" in refused("empty.png")
    assert "IMAGE: text.png: Pillow knows no image format like this" in refused("a.png", "text.png")
    assert "IMAGE: half.png: " in refused("half.png")
    assert "pixels of 32 bits" in refused("float.tiff")


def test_what_does_not_fit_an_image_is_refused():
    says = refused("a.png", "crop_scale=none", "padding=1", "--size", "128")
    assert "NAME=VALUE: Augment(): size (128, 128) is larger than image 0, of 100 x 120 pixels" in says


def test_a_sheet_that_a_format_does_not_take_is_refused():
    says = refused("a.png", "--size", "16", "--count", "100", "--columns", "1", "--out", "long.webp")
    assert "is too large for WEBP: write a .png, or --columns" in says


def test_what_is_not_installed_is_named(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda wanted, *rest: None if wanted == "sklearn" else found(wanted, *rest)
    )
    says = 'or install scikit-learn, which has photographs: pip install ".[demo]"'
    assert f"IMAGE: name an image, {says}" in refused()
    assert f"IMAGE: name another image to mix with, {says}" in refused("a.png", "cutmix_alpha=1")
    augment("a.png", "--size", "16", "--count", "1", "--out", "x.png")
    Path("x.png").unlink()
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert f"IMAGE: {NO_PILLOW}" in refused("a.png")
