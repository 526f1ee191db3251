"""Images that cannot be read are found by their headers, all of them, before training meets one."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from cnnfast.training.samples import UnreadableSample, open_images
from cnnfast.training.unreadable import AT_ONCE, check
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
