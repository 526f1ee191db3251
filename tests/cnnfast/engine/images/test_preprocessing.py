"""What is made of an image is, bit for bit, what torchvision's presets and timm's transforms make of it; and what tells
how images are prepared is understood, or refused with the field that is wrong.
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cnnfast.engine.graph import Input
from cnnfast.engine.images.from_libraries import FORMS
from cnnfast.engine.images.preprocessing import Preprocessing
from tests.support.packages import package

PIL = pytest.importorskip("PIL.Image")

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PLAIN = Preprocessing(40, (32, 32), "bilinear", MEAN, STD)
# (height, width): landscape, portrait, smaller than any crop in both sides and in one, a single pixel and a line of
# them, as large as the crop, and larger by an even and by an odd number of pixels.
SIZES = [(67, 101), (101, 67), (10, 17), (9, 300), (1, 1), (17, 1), (32, 32), (36, 34), (33, 35), (40, 41)]
ids = "x".join


def photograph(height: int, width: int, mode: str = "RGB"):
    """Random pixels: nothing smooth hides a shift by one."""
    generator = np.random.default_rng(height * 1000 + width)
    channels = len(PIL.new(mode, (1, 1)).getbands())
    pixels = generator.integers(0, 256, (height, width, channels), dtype=np.uint8)
    return PIL.fromarray(pixels if channels > 1 else pixels[..., 0], mode=mode if channels == 4 else None)


def same(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return ours.dtype == theirs.dtype == torch.float32 and torch.equal(ours, theirs)


# ----------------------------------------------------------------------------------------------------------------------
# torchvision


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("interpolation", ["BILINEAR", "BICUBIC", "NEAREST", "NEAREST_EXACT", "LANCZOS"])
def test_classification_as_torchvision(size, interpolation):
    presets = package("torchvision.transforms._presets")
    how = presets.InterpolationMode[interpolation]
    for crop, resize in ((32, 40), (32, 32), (33, 20)):
        preset = presets.ImageClassification(crop_size=crop, resize_size=resize, interpolation=how)
        image = photograph(*size)
        assert same(Preprocessing.of(preset).apply(image), preset(image)), (crop, resize)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("resize", [24, None])
def test_segmentation_as_torchvision(size, resize):
    preset = package("torchvision.transforms._presets").SemanticSegmentation(resize_size=resize)
    image = photograph(*size)
    ours = Preprocessing.of(preset)
    assert ours.output_size is None
    assert same(ours.apply(image), preset(image))


def test_weights_of_torchvision_however_they_are_given():
    weights = package("torchvision").models.ResNet50_Weights.IMAGENET1K_V2
    expected = Preprocessing(232, (224, 224), "bilinear", MEAN, STD)
    named = ("ResNet50_Weights.IMAGENET1K_V2", "torchvision:ResNet50_Weights.IMAGENET1K_V2")
    for given in (weights, weights.transforms, weights.transforms(), expected, *named):
        assert Preprocessing.of(given) == expected
    image = photograph(300, 451)
    assert same(Preprocessing.of(weights).apply(image), weights.transforms()(image))
    with pytest.raises(ValueError, match=r"IMAGENET1K_V9' is the name of no weights of torchvision"):
        Preprocessing.of("ResNet50_Weights.IMAGENET1K_V9")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr"])
@pytest.mark.parametrize("size", [(67, 101), (10, 17)], ids=str)
def test_other_modes_as_torchvisions_loaders(mode, size):
    """Which convert to RGB first."""
    preset = package("torchvision.transforms._presets").ImageClassification(crop_size=32, resize_size=40)
    image = photograph(*size).convert(mode)
    ours = Preprocessing.of(preset)
    assert same(ours.apply(image), preset(image.convert("RGB")))
    with_mean_of_one = replace(ours, mean=(0.5,), std=(0.25,))
    grey = package("torchvision.transforms._presets").ImageClassification(
        crop_size=32, resize_size=40, mean=(0.5,), std=(0.25,)
    )
    assert same(with_mean_of_one.apply(image), grey(image.convert("L")))
    with_alpha = replace(ours, mean=(0.5,) * 4, std=(0.25,) * 4)
    assert with_alpha.apply(image).shape == (4, 32, 32)


# ----------------------------------------------------------------------------------------------------------------------
# timm


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("mode", ["center", "squash", "border"])
@pytest.mark.parametrize("made", [(32, 32), (24, 40)], ids=str)
def test_every_crop_mode_as_timm(size, mode, made):
    data = package("timm.data")
    for crop_pct, interpolation in ((0.9, "bicubic"), (1.0, "bilinear"), (0.95, "lanczos")):
        cfg = {"input_size": (3, *made), "crop_pct": crop_pct, "crop_mode": mode, "interpolation": interpolation}
        cfg |= {"mean": (0.1, 0.5, 0.9), "std": (0.2, 0.3, 0.4)}
        theirs = data.create_transform(**data.resolve_data_config(pretrained_cfg=cfg), is_training=False)
        ours = Preprocessing.of(cfg)
        assert ours.output_size == made
        image = photograph(*size)
        assert same(ours.apply(image), theirs(image)), (crop_pct, interpolation)


def test_what_timm_leaves_out_has_timms_defaults():
    data = package("timm.data")
    cfg = {"input_size": (3, 64, 64)}
    theirs = data.create_transform(**data.resolve_data_config(pretrained_cfg=cfg), is_training=False)
    image = photograph(90, 71)
    assert same(Preprocessing.of(cfg).apply(image), theirs(image))


def test_a_model_of_timm_and_its_configuration():
    timm = package("timm")
    model = timm.create_model("resnet10t")
    expected = Preprocessing.of(timm.get_pretrained_cfg("resnet10t"))
    theirs = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    for given in (model, model.pretrained_cfg, "timm:resnet10t"):
        assert Preprocessing.of(given) == expected
    image = photograph(300, 451)
    assert same(expected.apply(image), theirs(image))
    with pytest.raises(ValueError, match="'timm:resnet10q' is no model of timm"):
        Preprocessing.of("timm:resnet10q")


# ----------------------------------------------------------------------------------------------------------------------
# transformers


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ViTImageProcessor", {}),
        ("ViTImageProcessor", {"resample": 3, "size": {"height": 30, "width": 50}}),
        ("ConvNextImageProcessor", {"size": {"shortest_edge": 56}}),
        ("ConvNextImageProcessor", {"size": {"shortest_edge": 384}}),
        ("BitImageProcessor", {"size": {"shortest_edge": 36}, "crop_size": {"height": 32, "width": 32}}),
        ("MobileNetV2ImageProcessor", {"do_normalize": False}),
        ("CLIPImageProcessor", {"do_resize": False}),
    ],
    ids=str,
)
def test_as_transformers_but_for_rounding(name, options):
    """Its default processors resize tensors. The sizes are even, and so is what is cropped: it rounds a half down."""
    processor = getattr(package("transformers"), name)(**options)
    image = photograph(8, 10).resize((400, 320), PIL.Resampling.BILINEAR)
    theirs = processor(image, return_tensors="pt")["pixel_values"][0]
    ours = Preprocessing.of(processor).apply(image)
    assert ours.shape == theirs.shape
    steps = (ours - theirs).abs() * torch.tensor(Preprocessing.of(processor).std).view(-1, 1, 1) * 255
    assert steps.max() < 1.1, "a pixel is another by more than its rounding"
    assert steps.mean() < 0.05


def test_processors_with_rules_of_their_own_are_refused():
    transformers = package("transformers")
    with pytest.raises(ValueError, match="LevitImageProcessor may have rules of its own; known are BitImageProcessor"):
        Preprocessing.of(transformers.LevitImageProcessor())
    with pytest.raises(ValueError, match="does not divide by 255"):
        Preprocessing.of(transformers.ViTImageProcessor(rescale_factor=1 / 127.5))
    with pytest.raises(ValueError, match="resizes by longest_edge, shortest_edge, which is not known here"):
        Preprocessing.of(transformers.ViTImageProcessor(size={"shortest_edge": 30, "longest_edge": 50}))


# ----------------------------------------------------------------------------------------------------------------------
# Mappings and files


def test_a_mapping_a_file_of_it_and_what_was_written():
    given = {"size": 40, "crop": 32, "interpolation": "bicubic", "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}
    expected = Preprocessing(40, (32, 32), "bicubic", (0.5,) * 3, (0.25,) * 3)
    assert Preprocessing.of(given) == expected
    assert Preprocessing.of({"size": [30, 40], "crop": None, "mean": 0.5, "std": 1}) == Preprocessing(
        (30, 40), None, "bilinear", (0.5,), (1,)
    )
    framed = replace(expected, size=(40, 50), fit="contain", fill=(1, 2, 3))
    for one in (PLAIN, expected, framed, replace(PLAIN, size=None, crop=None)):
        assert Preprocessing.from_json(json.loads(json.dumps(one.to_json()))) == one


def test_a_file_of_json(tmp_path):
    file = tmp_path / "images.json"
    file.write_text(json.dumps(PLAIN.to_json()))
    assert Preprocessing.of(str(file)) == Preprocessing.of(file) == PLAIN
    file.write_text("{")
    with pytest.raises(ValueError, match=r"images\.json is no JSON: "):
        Preprocessing.of(file)
    with pytest.raises(ValueError, match=r"none\.json cannot be read: No such file"):
        Preprocessing.of(tmp_path / "none.json")


WRONG = [
    ({"size": 0}, "size is 0, and must be a number of pixels from 1 to 16384"),
    ({"size": 16385}, "size is 16385"),
    ({"size": True}, "size is True"),
    ({"size": 256.0}, r"size is 256\.0"),
    ({"size": [256]}, r"size is \(256,\)"),
    ({"size": [256, -1]}, r"size is \(256, -1\)"),
    ({"size": [[256, 2], 3]}, "size is"),
    ({"crop": 0}, "crop is 0, and must be"),
    ({"crop": "224"}, "crop is '224'"),
    ({"crop": [224, 224, 3]}, r"crop is \(224, 224, 3\)"),
    ({"crop": {"height": 2}}, "crop is"),
    ({"interpolation": "cubic"}, "interpolation must be 'nearest', .*Did you mean 'bicubic'?"),
    ({"interpolation": None}, "interpolation must be"),
    ({"interpolation": ["bicubic"]}, "interpolation must be"),
    ({"fit": "squash"}, "fit must be 'stretch', 'cover' or 'contain'"),
    ({"mean": [0.5, 0.5]}, r"mean is \(0\.5, 0\.5\), and must be 1, 3 or 4 numbers"),
    ({"mean": [0.5, 0.5, float("nan")]}, "mean is"),
    ({"mean": [0.5, 0.5, 10**400]}, "mean is"),
    ({"mean": [0.5, 0.5, "0.5"]}, "mean is"),
    ({"mean": None}, "mean is None"),
    ({"mean": 0.5}, r"std is .*, and must be as many numbers as mean, which is \(0\.5,\)"),
    ({"std": [1, 1, float("inf")]}, "std is"),
    ({"std": [1, 1, 0]}, "std is .* numbers above 0"),
    ({"std": [1, 1, 1e-60]}, "std is .* numbers above 0, in float32 too"),
    ({"std": [1, 1, -1]}, "std is .* numbers above 0"),
    ({"fill": [0, 0, 256]}, "fill is .* whole numbers from 0 to 255"),
    ({"fill": [0.5, 0, 0]}, "fill is"),
    ({"fill": [0]}, "fill is .* as many numbers as mean"),
    ({"meen": 1}, "'meen' is none of its fields, which are 'size', 'crop', .*Did you mean 'mean'?"),
    ({3: 1}, "3 is none of its fields"),
]


@pytest.mark.parametrize(("change", "says"), WRONG, ids=str)
def test_a_wrong_field_is_named(change, says):
    """However it comes: from a file, or in a call."""
    with pytest.raises(ValueError, match=says):
        Preprocessing.from_json(PLAIN.to_json() | change)
    with pytest.raises(ValueError, match=says):
        Preprocessing.of(PLAIN.to_json() | change)


def test_what_is_missing_is_named():
    with pytest.raises(ValueError, match="'size' or 'mean' is missing"):
        Preprocessing.from_json({"crop": 224, "std": 1})
    for nothing in (None, [], "text", 3):
        with pytest.raises(ValueError, match="is no mapping of 'size', 'crop'"):
            Preprocessing.from_json(nothing)


@pytest.mark.parametrize(
    "given", [3, [256, 224], torch.nn.ReLU(), object, lambda image: image], ids=lambda g: type(g).__name__
)
def test_anything_else_is_refused_with_what_can_be_given(given):
    with pytest.raises(
        ValueError, match="is nothing that tells how images are prepared: give a mapping with"
    ) as refused:
        Preprocessing.of(given)
    assert str(refused.value).endswith(FORMS)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("resnet50", "'resnet50' is none of a JSON file (*.json), weights of torchvision, such as ResNet50_W"),
        ("ResNet50_Weights", "or timm:NAME. Did you mean 'ResNet50_Weights.DEFAULT'?"),
        ("here.txt", "; here.txt is a file, but its name does not end in .json"),
    ],
)
def test_a_text_that_names_nothing_is_refused(given, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here.txt").touch()
    with pytest.raises(ValueError, match=re.escape(says)):
        Preprocessing.of(given)


@pytest.mark.parametrize(("name", "text"), [("timm", "timm:resnet18"), ("torchvision", "ResNet50_Weights.DEFAULT")])
def test_a_library_that_is_not_installed_is_named(name, text, monkeypatch):
    package(name)

    def gone():
        raise ModuleNotFoundError("No module named 'torchvision'")

    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.setattr("cnnfast.engine.images.from_libraries.torchvision", gone)
    with pytest.raises(ValueError, match=f"{text} needs {name}, which is not installed"):
        Preprocessing.of(text)


@pytest.mark.parametrize(
    "change",
    [
        {"input_size": 224},
        {"input_size": (224,)},
        {"crop_pct": "0.9"},
        {"mean": 0.5},
        {"input_size": (3, "a", "b")},
        {"crop_mode": "border", "mean": "abc"},
    ],
    ids=str,
)
def test_a_configuration_that_makes_no_sense_is_refused(change):
    cfg = {"input_size": (3, 32, 32), "mean": MEAN, "std": STD}
    with pytest.raises(ValueError, match="preprocessing"):
        Preprocessing.of(cfg | change)


def test_presets_for_other_tasks_are_refused():
    presets = package("torchvision.transforms._presets")
    for preset in (presets.ObjectDetection(), presets.VideoClassification(crop_size=(8, 8), resize_size=(8, 8))):
        with pytest.raises(ValueError, match=f"{type(preset).__name__} is not for classification of images"):
            Preprocessing.of(preset)


# ----------------------------------------------------------------------------------------------------------------------
# Whether a network takes it


def network(*shape: int | None, fixed: str = "", inputs: int = 1):
    graph = SimpleNamespace(inputs=(Input("x", shape, torch.float32),) * inputs)
    return SimpleNamespace(graph=graph, fixed=fixed)


def test_a_network_must_take_what_is_made():
    for shape in ((None, 3, None, None), (None, 3, 32, 32), (1, 3, 32, None), (None, None, None, None)):
        PLAIN.check_sizes(network(*shape))
    replace(PLAIN, size=(32, 32), crop=None).check_sizes(network(None, 3, 32, 32))
    replace(PLAIN, crop=None).check_sizes(network(None, 3, None, None))
    for field, says in (
        (PLAIN, r"makes images of 32 height, and the network takes 24 only \(export failed\): give crop=\[24, 40\]"),
        (replace(PLAIN, crop=(24, 32)), "makes images of 32 width, and the network takes 40 only"),
        (replace(PLAIN, crop=None), "makes images of any height, and the network takes 24 only"),
        (replace(PLAIN, crop=None, size=(24, 40), fit="cover"), "makes images of any height"),
    ):
        with pytest.raises(ValueError, match=says):
            field.check_sizes(network(None, 3, 24, 40, fixed="export failed"))
    with pytest.raises(ValueError, match=r"makes images of 3 channels, .*, and the network takes 1"):
        PLAIN.check_sizes(network(None, 1, 32, 32))
    for other in (network(None, 3, 32, 32, inputs=2), network(None, 3), network(None, 3, 4, 32, 32)):
        with pytest.raises(ValueError, match="for a network that takes one tensor, of images"):
            PLAIN.check_sizes(other)


# ----------------------------------------------------------------------------------------------------------------------
# Exact numbers, without any library beside


def test_a_crop_of_one_image_by_hand():
    """Pixels 0 to 14 of a row, no resizing: from the middle, and in the middle of a frame."""
    image = PIL.fromarray(np.arange(15, dtype=np.uint8).reshape(1, 15))
    grey = Preprocessing(None, (1, 4), "bilinear", (0.0,), (1 / 255,), fill=(200,))
    assert grey.apply(image).round().flatten().tolist() == [6, 7, 8, 9]  # (15 - 4) / 2 = 5.5, to an even number
    assert replace(grey, crop=(1, 6)).apply(image).round().flatten().tolist() == [4, 5, 6, 7, 8, 9]  # 4.5, likewise
    wide = replace(grey, crop=(3, 18))
    assert wide.apply(image)[0, 1].round().tolist() == [200, *range(15), 200, 200]
    assert wide.apply(image)[0, [0, 2]].round().unique().tolist() == [200]
    shifted = replace(grey, mean=(2 / 255,), std=(2 / 255,))
    assert shifted.apply(image).flatten().tolist() == pytest.approx([2, 2.5, 3, 3.5])


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
def test_what_is_resized_is_what_is_cropped_and_normalised(mode):
    how = Preprocessing(40, None, "bilinear", (0.0,) * 3, (1.0,) * 3)
    image = photograph(67, 101, mode)
    resized = how.resize(image)
    assert (resized.mode, resized.size) == ("RGB", how.resized(101, 67)) == ("RGB", (60, 40))
    assert torch.equal(how.apply(image), torch.from_numpy(np.array(resized)).permute(2, 0, 1).float() / 255)


def test_an_image_that_would_need_all_memory_is_refused():
    line = PIL.new("L", (20000, 1))
    with pytest.raises(ValueError, match="20000 x 1 pixels would become 80000000 x 4000 when resized"):
        Preprocessing(4000, (224, 224), "bilinear", (0.5,), (0.5,)).apply(line)
