"""A folder of class folders: which images it has, what is left out and told, and what is refused."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

import pytest

from cnnfast.training.samples import ImageSet, open_images
from tests.support.labelled_images import class_folders, save_noise
from tests.support.packages import package

pytest.importorskip("PIL")


def listed(images: ImageSet, root: Path) -> list[tuple[str, str]]:
    """Each file, from the folder on, and its class."""
    names = [images.name(i) for i in range(len(images))]
    return [(os.path.relpath(name, root), images.classes[images.labels[i]]) for i, name in enumerate(names)]


def test_files_and_labels_are_torchvisions(tmp_path):
    """10 stands before 9, and an upper case letter before a lower case one; images in folders of a class are of it."""
    for name in ("9/a.png", "10/z.png", "10/B.PNG", "b/deep/deeper/c.jpg", "b/a.bmp", "A/x.webp", "b/e.png"):
        save_noise(tmp_path / name)
    images = open_images(tmp_path, 8)
    theirs = package("torchvision.datasets").ImageFolder(tmp_path)
    assert images.classes == tuple(theirs.classes) == ("10", "9", "A", "b")
    found = [(images.name(i), int(images.labels[i])) for i in range(len(images))]
    assert sorted(found) == sorted(theirs.samples)
    assert [label for _, label in found] == sorted(label for _, label in found), "class after class"
    assert images.notes == ("2 classes have a single image, which is not held out for validation: '9', 'A'",)


def test_what_is_left_out_is_counted(tmp_path):
    class_folders(tmp_path, cat=2, dog=2)
    save_noise(tmp_path / "loose.png")
    for name in ("cat/.hidden.png", ".cache/x.png", "dog/.thumbnails/y.png"):
        save_noise(tmp_path / name)
    for name in ("cat/notes.txt", "dog/list.txt", "dog/model.h5", "dog/README"):
        (tmp_path / name).write_text("")
    images = open_images(tmp_path, 8)
    assert [file for file, _ in listed(images, tmp_path)] == ["cat/0.png", "cat/1.png", "dog/0.png", "dog/1.png"]
    assert images.notes == (
        f"1 file lies in {tmp_path} itself, outside of the classes' folders",
        "4 files are left out as no image (2 .txt, 1 without an extension, 1 .h5)",
        "3 hidden files and folders are left out",
    )


def test_links_are_followed_and_loops_end(tmp_path):
    root = class_folders(tmp_path / "data", cat=2, dog=2)
    elsewhere = class_folders(tmp_path / "elsewhere", bird=3)
    (root / "bird").symlink_to(elsewhere / "bird")
    (root / "cat" / "loop").symlink_to(root / "cat")
    (root / "dog" / "2.png").symlink_to(root / "dog" / "1.png")
    images = open_images(root, 8)
    assert images.labels.bincount().tolist() == [3, 2, 3]
    assert images.classes == ("bird", "cat", "dog")


def test_names_of_files_are_any_that_the_system_has(tmp_path):
    names = ["a/ä ü.png", "a/quote'\".png", "a/line\nfeed.png", "b/日本.png", "b/" + "x" * 200 + ".png"]
    for name in names:
        save_noise(tmp_path / name)
    raw = os.fsencode(tmp_path / "b") + b"/\xff\xfe.png"  # no UTF-8
    try:
        Path(os.fsdecode(raw)).write_bytes((tmp_path / "a" / "ä ü.png").read_bytes())
    except OSError:
        pytest.skip("this file system takes names in UTF-8 only")
    images = open_images(tmp_path, 8)
    assert {images.name(i) for i in range(6)} == {str(tmp_path / name) for name in names} | {os.fsdecode(raw)}
    assert all(images[i].image.shape == (8, 8, 3) for i in range(6))


@pytest.mark.parametrize("given", ["a text", "a path", "with a slash", "relative"])
def test_a_folder_may_be_named_in_any_way(tmp_path, monkeypatch, given):
    class_folders(tmp_path / "digits", cat=2, dog=2)
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "digits"
    ways = {"a text": str(folder), "a path": folder, "with a slash": f"{folder}/", "relative": "./digits"}
    images = open_images(ways[given], 8)
    assert len(images) == 4
    assert Path(images.name(3)).resolve() == folder / "dog" / "1.png"


# ----------------------------------------------------------------------------------------------------------------------
# Known classes


def test_known_classes_keep_their_labels(tmp_path):
    """Data of an evaluation need not show all of them."""
    class_folders(tmp_path, cat=1, dog=2)
    (tmp_path / "bird").mkdir()
    images = open_images(tmp_path, 8, classes=["dog", "fish", "cat", "bird"])
    assert images.classes == ("dog", "fish", "cat", "bird")
    assert images.labels.tolist() == [2, 0, 0]
    assert "there is no image of the class 'bird'" in images.notes


def test_one_class_is_enough_where_they_are_known(tmp_path):
    assert open_images(class_folders(tmp_path, cat=2), 8, classes=("dog", "cat")).labels.tolist() == [1, 1]


def test_classes_that_are_not_known_are_refused(tmp_path):
    class_folders(tmp_path, cat=1, dog=1, bird=1)
    with pytest.raises(ValueError, match="has the classes 'bird', 'dog', and the 2 known ones are 'cat', 'fish'"):
        open_images(tmp_path, 8, classes=["cat", "fish"])


# ----------------------------------------------------------------------------------------------------------------------
# Refused


def nothing(root: Path) -> str:
    return f"{root} holds nothing: there must be a folder with images for each class"


def loose_images(root: Path) -> str:
    save_noise(root / "a.png")
    save_noise(root / "b.png")
    return f"{root} holds 2 files but no folder: there must be a folder with images for each class"


def one_class(root: Path) -> str:
    class_folders(root, cat=3)
    return f"{root} has the class 'cat' only, and a network learns to tell two or more apart"


def empty_classes(root: Path) -> str:
    class_folders(root, cat=3, dog=3)
    for name in "abcd":
        (root / name).mkdir()
    (root / "a" / "x.txt").write_text("")
    return f"there is no image in the folders 'a', 'b', 'c' and 1 more of {root} (1 .txt)"


def no_images_at_all(root: Path) -> str:
    (root / "cat").mkdir()
    return f"there is no image in the folder 'cat' of {root}"


def parts(root: Path) -> str:
    class_folders(root / "train", cat=1, dog=1)
    class_folders(root / "val", cat=1, dog=1)
    says = f"the folders 'train', 'val' of {root} are parts of a data set and no classes"
    return f"{says}: give one of them, such as {root}/train"


@pytest.mark.parametrize(
    "make", [nothing, loose_images, one_class, empty_classes, no_images_at_all, parts], ids=lambda make: make.__name__
)
def test_other_layouts_are_refused_in_a_sentence(tmp_path, make):
    with pytest.raises(ValueError, match=f"^{re.escape(make(tmp_path))}$"):
        open_images(tmp_path, 8)


def test_classes_may_have_names_of_parts(tmp_path):
    """ "test" and "train" may be kinds of something, where images lie in their folders."""
    assert open_images(class_folders(tmp_path, test=1, train=1), 8).classes == ("test", "train")


@pytest.mark.parametrize("locked", [".", "cat", "cat/deep"])
def test_a_folder_that_cannot_be_looked_into_is_named(tmp_path, monkeypatch, locked):
    class_folders(tmp_path, cat=1, dog=1)
    (tmp_path / "cat" / "deep").mkdir()
    look = os.scandir

    def scandir(folder):  # root may look into every folder
        if Path(folder) == tmp_path / locked:
            raise PermissionError(errno.EACCES, "Permission denied", folder)
        return look(folder)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(ValueError, match=f"the folder {tmp_path / locked} cannot be looked into: Permission denied"):
        open_images(tmp_path, 8)


def test_what_is_not_there_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no folder and no CSV .*gone; 'digits' stands for"):
        open_images(tmp_path / "gone", 8)
    save_noise(tmp_path / "a.png")
    with pytest.raises(
        ValueError, match=r"a\.png is neither a folder nor a CSV, whose name ends in \.csv, \.tsv, \.txt"
    ):
        open_images(tmp_path / "a.png", 8)
