"""What an image of a set is: its pixels for training and for evaluation, its label and its name; and parts of a set."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from cnnfast.engine.images.images import read, to_mode
from cnnfast.engine.images.preprocessing import Preprocessing
from cnnfast.training.samples import ImageSet, UnreadableSample, class_weights, open_images, split
from tests.support.labelled_images import class_folders, noise, save_noise

PIL = pytest.importorskip("PIL.Image")


def one_of(folder: Path, name: str, image, size: int = 8, channels: int | None = None, **options) -> ImageSet:
    """A set whose first image is this one."""
    class_folders(folder, z=1)
    (folder / "a").mkdir(exist_ok=True)
    image.save(folder / "a" / name, **options)
    return open_images(folder, size, channels=channels)


def pixels(images: ImageSet, i: int = 0) -> np.ndarray:
    image = images[i].image
    assert image.dtype == torch.uint8
    assert image.is_contiguous()
    assert image.shape[2] == images.channels
    return image.numpy()


# ----------------------------------------------------------------------------------------------------------------------
# Digits


def test_the_digits_are_scikit_learns():
    from sklearn.datasets import load_digits

    theirs, labels = load_digits(return_X_y=True)
    images = open_images("digits", 8)
    assert (len(images), images.channels, images.classes, images.notes) == (1797, 1, tuple("0123456789"), ())
    assert images.labels.tolist() == labels.tolist()
    for i in (0, 17, 1796, -1):
        image, label, index = images[i]
        assert np.array_equal(image.numpy().reshape(64), np.floor(theirs[i] * 255 / 16 + 0.5))
        assert (label, index) == (labels[i], i % 1797)
    assert images.name(17) == "digit 17"
    assert images.look(17) == (8, 8)
    with pytest.raises(IndexError):
        images[1797]


def test_digits_may_have_three_channels_and_known_classes():
    grey = open_images("digits", 8)
    colour = open_images("digits", 8, channels=3, classes=("x", *"9876543210"))
    assert np.array_equal(pixels(colour, 5), pixels(grey, 5).repeat(3, 2))
    assert colour.labels.tolist() == (10 - grey.labels).tolist()
    with pytest.raises(ValueError, match="digits has the class '9', and the 9 known ones are '0', '1', '2' and 6 more"):
        open_images("digits", 8, classes=tuple("012345678"))


def test_digits_need_no_torchvision(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    assert open_images("digits", 8)[3].label == 3


def test_without_scikit_learn_it_is_said_how_to_get_it(monkeypatch):
    for name in ("sklearn", "sklearn.datasets"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ModuleNotFoundError, match=r"the digits are scikit-learn's, .* pip install \"\.\[train\]\""):
        open_images("digits", 8)


# ----------------------------------------------------------------------------------------------------------------------
# Pixels for training


@pytest.mark.parametrize(
    ("height", "width", "size", "factor"),
    [
        (16, 20, 8, 1),
        (17, 20, 8, 2),
        (32, 33, 8, 2),
        (33, 100, 8, 3),
        (200, 49, 8, 4),
        (7, 9, 8, 1),
        (1, 200, 8, 1),
        (200, 1, 8, 1),
        (2, 200, 1, 1),
        (3, 200, 1, 2),
        (64, 64, (4, 16), 2),
        (64, 64, (16, 4), 2),
    ],
)
def test_an_image_has_at_most_twice_the_pixels_of_its_result(tmp_path, height, width, size, factor):
    """Each of them is the mean of a square of the file's, as Pillow rounds it."""
    theirs = noise(height, width, 3)
    images = one_of(tmp_path, "a.png", PIL.fromarray(theirs), size)
    ours = pixels(images)
    assert ours.shape == (-(-height // factor), -(-width // factor), 3)
    h, w = height // factor, width // factor  # squares that are whole
    whole = theirs[: h * factor, : w * factor].reshape(h, factor, w, factor, 3).astype(np.float64)
    assert np.abs(ours[:h, :w] - whole.mean((1, 3))).max() <= 0.6
    largest = max(size) if isinstance(size, tuple) else size
    assert min(ours.shape[:2]) <= 2 * largest
    assert min(ours.shape[:2]) >= min(largest, height, width)


@pytest.mark.parametrize("shorter", [15, 16, 17, 31, 32, 33, 47, 64, 100, 129, 200, 300])
def test_a_jpeg_is_made_smaller_in_two_steps(tmp_path, shorter):
    """While it is decoded, and after. It stays at least as large as its result, and shows what the whole image shows:
    nothing has moved.
    """
    rows, columns = np.mgrid[0:shorter, 0 : 2 * shorter] / shorter
    smooth = np.stack([120 + 90 * np.sin(3 * rows), 120 + 90 * np.cos(2 * columns), 100 + 50 * rows * columns], 2)
    image = PIL.fromarray(smooth.astype(np.uint8))
    images = one_of(tmp_path, "a.jpg", image, 8, quality=100, subsampling=0)
    ours = pixels(images)
    h, w = ours.shape[:2]
    assert min(8, shorter) <= h <= 16
    assert abs(w - 2 * h) <= 1
    means = np.asarray(image.resize((w, h), PIL.Resampling.BOX)).astype(np.float64)
    # of the last row and column a part may lie outside of the image, so that they are off by less than a pixel
    assert np.abs(ours[:-1, :-1] - means[:-1, :-1]).max() < 255 / h


def test_a_fine_pattern_becomes_grey_not_a_coarse_one(tmp_path):
    """Without a mean, every tenth row of black and white ones would be all black, or waves."""
    stripes = np.zeros((190, 200, 3), np.uint8)
    stripes[::2] = 255
    for name in ("a.png", "a.jpg"):
        images = one_of(tmp_path, name, PIL.fromarray(stripes), 9)
        inner = pixels(images).astype(int)[:-1]
        assert inner.shape[0] <= 18
        assert np.abs(inner - 127).max() <= 25, name
        (tmp_path / "a" / name).unlink()


ODD = {
    "grey": (PIL.fromarray(noise(6, 5)), "png"),
    "grey with alpha": (PIL.fromarray(noise(6, 5)).convert("LA"), "png"),
    "16 bits": (PIL.fromarray(noise(6, 5).astype(np.uint16) * 257), "png"),
    "palette": (PIL.fromarray(noise(6, 5, 3)).quantize(16), "png"),
    "palette of a gif": (PIL.fromarray(noise(6, 5, 3)).quantize(16), "gif"),
    "black and white": (PIL.fromarray(noise(6, 5)).convert("1"), "png"),
    "alpha": (PIL.fromarray(noise(6, 5, 4)), "png"),
    "four inks": (PIL.fromarray(noise(6, 5, 3)).convert("CMYK"), "jpg"),
    "luma and chroma": (PIL.fromarray(noise(6, 5, 3)).convert("YCbCr"), "tif"),
}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("image", "end"), ODD.values(), ids=ODD)
def test_odd_images_are_as_predict_reads_them(tmp_path, image, end, channels):
    images = one_of(tmp_path, f"a.{end}", image, channels=channels)
    mode = {1: "L", 3: "RGB"}[channels]
    expected = np.asarray(to_mode(read(Path(images.name(0))), mode)).reshape(6, 5, channels)
    assert np.array_equal(pixels(images), expected)
    assert np.array_equal(pixels(images.resized(5)), expected), "as large as it is"


def test_of_several_pictures_the_first_is_read(tmp_path):
    frames = [PIL.new("RGB", (5, 6), (v, v, v)) for v in (10, 200)]
    images = one_of(tmp_path, "a.gif", frames[0], save_all=True, append_images=frames[1:])
    assert pixels(images).max() < 20


@pytest.mark.parametrize("end", ["png", "jpg"])
def test_an_image_stands_as_the_camera_was_held(tmp_path, end):
    exif = PIL.Exif()
    exif[0x0112] = 6  # the camera's right side was down
    left_is_white = np.zeros((64, 96, 3), np.uint8)
    left_is_white[:, :48] = 255
    images = one_of(tmp_path, f"a.{end}", PIL.fromarray(left_is_white), exif=exif)
    for of in (images, images.resized(16)):
        upright = pixels(of)
        assert upright.shape[0] > upright.shape[1]
        assert upright[: len(upright) // 3].min() > 240
        assert upright[-(len(upright) // 3) :].max() < 15


# ----------------------------------------------------------------------------------------------------------------------
# Pixels for evaluation


@pytest.mark.parametrize("end", ["png", "jpg"])
@pytest.mark.parametrize("size", [(67, 101), (101, 67), (10, 17), (64, 64), (9, 300), (1, 1), (17, 1)], ids=str)
@pytest.mark.parametrize("channels", [1, 3])
def test_evaluation_sees_what_a_frozen_network_sees(tmp_path, size, end, channels):
    """The module that augments crops the centre then, and its map moves no pixel."""
    from cnnfast import backend
    from cnnfast.nn import Augment

    images = one_of(tmp_path, f"a.{end}", PIL.fromarray(noise(*size, 3)), 16, channels)
    mean, std = (0.5, 0.4, 0.3)[:channels], (0.2, 0.3, 0.4)[:channels]
    augment = Augment(16, resize_size=20, mean=mean, std=std).eval()
    with backend("torch"):
        ours = augment(images.resized(20)[0].image[None], index=[0])
    frozen = Preprocessing(20, (16, 16), "bilinear", mean, std).apply(read(Path(images.name(0))))
    torch.testing.assert_close(ours[0].cpu(), frozen, rtol=0, atol=2e-6)


def test_a_line_is_no_image_for_evaluation(tmp_path):
    """20,000 pixels in a row would be as many rows when they are resized; training takes it as it is."""
    images = one_of(tmp_path, "a.png", PIL.new("RGB", (20000, 1)), 224)
    assert pixels(images).shape == (1, 20000, 3)
    assert images.look(0) == (20000, 1)
    line = "20000 x 1 pixels would become 5120000 x 256 when resized"
    for reads in (images.resized(256).__getitem__, images.resized(256).look):
        with pytest.raises(UnreadableSample, match=f"a/a.png cannot be read: {line}"):
            reads(0)


# ----------------------------------------------------------------------------------------------------------------------
# Unreadable


@pytest.mark.parametrize("content", [b"", b"no image", None])
def test_what_cannot_be_read_is_named_with_its_reason(tmp_path, content):
    images = open_images(class_folders(tmp_path, a=2, b=2), 8)
    file = tmp_path / "a" / "1.png"
    file.write_bytes(file.read_bytes()[:-30] if content is None else content)
    reason = {b"": "the file is empty", b"no image": "Pillow knows no image format like this"}.get(content, ".*")
    with pytest.raises(UnreadableSample, match=f"^{file} cannot be read: {reason}") as raised:
        images[1]
    error = raised.value
    assert (error.number, error.file) == (1, str(file))
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.number, again.reason) == (str(error), 1, error.reason)


def test_an_image_without_memory_is_named(tmp_path, monkeypatch):
    images = open_images(class_folders(tmp_path, a=1, b=1), 8)

    def read_without_memory(*_, **__):
        raise MemoryError

    monkeypatch.setattr("cnnfast.training.reading.read", read_without_memory)
    with pytest.raises(UnreadableSample, match=r"a/0.png cannot be read: there is not enough memory for it"):
        images[0]


# ----------------------------------------------------------------------------------------------------------------------
# Parts


def test_a_set_of_many_files_is_small_to_send(tmp_path):
    """It is sent to each process that reads images: names in one piece, and no object for each."""
    class_folders(tmp_path, cat=2, dog=2)
    lines = [f"{name}/{i % 2}.png,{name}" for i in range(1000) for name in ("cat", "dog")]
    (tmp_path / "list.csv").write_text("\n".join(["file,label", *lines]))
    images = open_images(tmp_path / "list.csv", 8)
    sent = pickle.dumps(images)
    assert len(sent) < 2000 * (len("cat/0.png") + 8 + 8) + 10_000
    again = pickle.loads(sent)
    assert [again.name(i) for i in (0, 1, 1999)] == [
        str(tmp_path / name) for name in ("cat/0.png", "dog/0.png", "dog/1.png")
    ]
    assert torch.equal(again[1999].image, images[1999].image)


@pytest.mark.parametrize("data", ["digits", "files"])
def test_some_classes_only(tmp_path, data):
    given = "digits" if data == "digits" else class_folders(tmp_path, **dict(zip("0123", (2, 3, 1, 2), strict=True)))
    images = open_images(given, 8)
    some = images.only(["3", "1"])
    assert some.classes == ("3", "1")
    kept = [i for i in range(len(images)) if images.labels[i] in (1, 3)]
    assert [some.name(i) for i in range(len(some))] == [images.name(i) for i in kept]
    assert some.labels.tolist() == [{3: 0, 1: 1}[int(images.labels[i])] for i in kept]
    assert torch.equal(some[1].image, images[kept[1]].image)
    for wrong in (["3", "x"], ["3"], ["3", "3"]):
        with pytest.raises(ValueError, match="must be two or more different ones of '0', '1', '2'"):
            images.only(wrong)


def test_each_class_is_divided_alike(tmp_path):
    images = open_images("digits", 8)
    training, validation = split(images, 0.2, seed=3)
    assert sorted([*training.tolist(), *validation.tolist()]) == list(range(1797))
    counts, held_out = images.labels.bincount(), images.labels[validation].bincount()
    assert held_out.tolist() == [int(count * 0.2 + 0.5) for count in counts.tolist()]
    assert training.tolist() == sorted(training.tolist())
    assert validation.tolist() == sorted(validation.tolist())
    again = split(images, 0.2, seed=3)
    assert torch.equal(validation, again[1])
    other = split(images, 0.2, seed=4)[1]
    assert len(set(other.tolist()) & set(validation.tolist())) < 0.4 * len(other), "another seed, another split"


def test_a_split_is_the_same_on_every_machine():
    """These numbers are Philox's; they may not change."""
    training, validation = split(open_images("digits", 8), 0.002, seed=0)
    assert validation.tolist() == [166, 203, 462, 697, 720, 932, 1311, 1474, 1623, 1648]
    assert len(training) == 1787


@pytest.mark.parametrize(
    ("count", "fraction", "held_out"),
    [(1, 0.5, 0), (2, 0.01, 1), (2, 0.99, 1), (3, 0.5, 2), (5, 0.1, 1), (10, 0.25, 3), (4, 0.2, 1), (20, 0.1, 2)],
)
def test_both_parts_have_images_of_every_class(tmp_path, count, fraction, held_out):
    images = open_images(class_folders(tmp_path, a=count, b=2), 8)
    training, validation = split(images, fraction, seed=0)
    assert int((images.labels[validation] == 0).sum()) == held_out
    assert int((images.labels[training] == 0).sum()) == count - held_out


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 20, float("nan")])
def test_a_fraction_is_between_0_and_1(fraction):
    with pytest.raises(ValueError, match=r"the fraction for validation is .*, and must be between 0 and 1"):
        split(open_images("digits", 8), fraction, seed=0)


def test_weights_of_classes():
    labels = torch.tensor([0] * 6 + [1] * 3 + [3])
    weights = class_weights(labels, 5)
    assert weights.dtype == torch.float32
    assert weights.tolist() == pytest.approx([0.3333333, 0.6666667, 0, 2, 0])
    assert class_weights(torch.tensor([0, 1, 2]), 3).tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"size": 0}, "size is 0, and must be a number of pixels or"),
        ({"size": 8.0}, "size is 8.0, and must be"),
        ({"size": (8, 8, 8)}, "size is .8, 8, 8., and must be"),
        ({"size": True}, "size is True, and must be"),
        ({"size": 8, "channels": 4}, "channels is 4, and must be 1 .grey. or 3"),
    ],
)
def test_wrong_options_are_named(options, says):
    with pytest.raises(ValueError, match=says):
        open_images("digits", **options)


def test_without_pillow_it_is_said_how_to_get_it(tmp_path, monkeypatch):
    class_folders(tmp_path, a=1, b=1)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ModuleNotFoundError, match="images are read by Pillow, which is not installed"):
        open_images(tmp_path, 8)


def test_a_broken_image_among_others_breaks_only_itself(tmp_path):
    images = open_images(class_folders(tmp_path, a=2, b=2), 8)
    (tmp_path / "a" / "0.png").unlink()
    with pytest.raises(UnreadableSample, match="No such file or directory"):
        images[0]
    assert np.array_equal(pixels(images, 1), save_noise(tmp_path / "again.png", seed=1))
