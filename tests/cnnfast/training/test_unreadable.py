"""Images that cannot be read are found by their headers, all of them, before training meets one."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from cnnfast.training.samples import UnreadableSample, open_images
from cnnfast.training.unreadable import AT_ONCE, check, refuse_unreadable
from tests.support.labelled_images import class_folders


@pytest.mark.parametrize("workers", [0, 2])
def test_every_unreadable_image_is_told_with_its_reason(tmp_path, workers):
    images = open_images(class_folders(tmp_path, a=4, b=5), 8)
    for name, content in (("a/1.png", b""), ("b/0.png", b"no image")):
        (tmp_path / name).write_bytes(content)
    (tmp_path / "b" / "3.png").unlink()
    found = check(images, workers)
    assert [(error.number, error.file, error.reason) for error in found] == [
        (1, str(tmp_path / "a" / "1.png"), "the file is empty"),
        (4, str(tmp_path / "b" / "0.png"), "Pillow knows no image format like this"),
        (7, str(tmp_path / "b" / "3.png"), "No such file or directory"),
    ]
    unreadable = {error.number for error in found}
    rest = images.taken(torch.tensor([i for i in range(9) if i not in unreadable]))
    assert len(rest) == 6
    assert not check(rest)
    assert [rest[i].label for i in range(6)] == [0, 0, 0, 1, 1, 1]


def test_they_are_refused_in_one_sentence(tmp_path):
    images = open_images(class_folders(tmp_path, a=4, b=5), 8)
    refuse_unreadable(images, torch.arange(9))
    for i in range(4):
        (tmp_path / "a" / f"{i}.png").write_bytes(b"")
    refuse_unreadable(images, torch.arange(4, 9))
    first = f"{tmp_path}/a/1.png: the file is empty; {tmp_path}/a/3.png: the file is empty"
    with pytest.raises(ValueError, match=f"^2 of 3 images cannot be read, and must be replaced or removed: {first}$"):
        refuse_unreadable(images, torch.tensor([1, 3, 8]))
    for i in range(3):
        (tmp_path / "b" / f"{i}.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"^7 of 9 images .*; and 2 more$"):
        refuse_unreadable(images, torch.arange(9))


def test_training_does_not_begin_with_them(tmp_path):
    """Neither with those to learn from, nor with those that are held out and become too large."""
    from cnnfast.training import fit

    class_folders(tmp_path / "data", a=3, b=3)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 2))
    Image.new("L", (200_000, 1)).save(tmp_path / "data" / "b" / "0.png")
    held_out = torch.tensor([3])
    images = open_images(tmp_path / "data", 8)
    others = images.taken(held_out)
    augment = {"resize_size": 20}
    with pytest.raises(
        ValueError,
        match=r"1 of 1 images cannot be read, and .*: .*b/0.png: 200000 x 1 pixels would become",
    ):
        fit(model, images, validation=others, augment=augment, out=tmp_path / "run", progress=False)
    (tmp_path / "data" / "b" / "1.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"1 of 6 images cannot be read, and .*: .*b/1.png: the file is empty"):
        fit(model, images, validation=0, out=tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_pixels_are_not_read(tmp_path):
    images = open_images(class_folders(tmp_path, a=1, b=1), 8)
    file = tmp_path / "a" / "0.png"
    file.write_bytes(file.read_bytes()[:-40])
    assert check(images) == []
    with pytest.raises(UnreadableSample, match=r"a/0.png cannot be read"):
        images[0]


def test_what_is_too_large_for_evaluation_is_told(tmp_path):
    class_folders(tmp_path, a=1, b=1)
    Image.new("L", (20000, 1)).save(tmp_path / "b" / "line.png")
    images = open_images(tmp_path, 224)
    assert check(images) == []
    (error,) = check(images.resized(256))
    assert str(error) == (
        f"{tmp_path}/b/line.png cannot be read: 20000 x 1 pixels would become 5120000 x 256 when resized"
    )


def test_it_is_told_how_far_it_is():
    counts: list[int] = []
    assert check(open_images("digits", 8), on_checked=counts.append) == []
    assert counts == [*range(AT_ONCE, 1797, AT_ONCE), 1797]
